//! Identifiers of containers.
//!
//! A container is a root file system with its mounts, the processes that run in it, and
//! their cgroup. The containers of a guest share its network, host name and clock.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Maximum length of an identifier in bytes.
pub const MAX_CONTAINER_ID: usize = 64;

/// The identifier of a container, which is unique in its guest: 1 to [`MAX_CONTAINER_ID`]
/// lower-case letters, digits, `-`, `_` and `.`, of which the first is a letter or a
/// digit. The agent uses it as the name of a directory and of a cgroup.
///
/// ```
/// use sm_guest_proto::container::ContainerId;
///
/// assert_eq!(ContainerId::default().as_str(), "main");
/// assert!(ContainerId::new("web-1").is_ok());
/// assert!(ContainerId::new("../web").is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

/// A text that is not a [`ContainerId`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("\"{0}\" is not the identifier of a container")]
pub struct ContainerIdError(String);

impl ContainerId {
    /// Checks an identifier.
    ///
    /// # Errors
    /// The text is too long, or has other characters.
    pub fn new(text: impl Into<String>) -> Result<Self, ContainerIdError> {
        let text = text.into();
        let is_alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let is_valid = |byte: &u8| is_alphanumeric(byte) || matches!(byte, b'-' | b'_' | b'.');
        let bytes = text.as_bytes();
        match bytes.len() <= MAX_CONTAINER_ID
            && bytes.first().is_some_and(is_alphanumeric)
            && bytes.iter().all(is_valid)
        {
            true => Ok(Self(text)),
            false => {
                let shown = text.chars().take(MAX_CONTAINER_ID).collect();
                Err(ContainerIdError(shown))
            }
        }
    }

    /// Returns the identifier as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The container of a VM that was started from one image.
impl Default for ContainerId {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = ContainerIdError;

    fn try_from(text: String) -> Result<Self, ContainerIdError> {
        Self::new(text)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_is_the_name_of_one_directory() {
        let longest = "a".repeat(MAX_CONTAINER_ID);
        for good in ["main", "0", "a.b_c-d", &longest] {
            assert_eq!(ContainerId::new(good).unwrap().as_str(), good);
        }
        let long = "a".repeat(MAX_CONTAINER_ID + 1);
        for bad in ["", ".", "..", "-a", "A", "a/b", "a\0", "ä", &long] {
            assert!(ContainerId::new(bad).is_err(), "{bad:?}");
            let json = serde_json::to_string(bad).unwrap();
            assert!(serde_json::from_str::<ContainerId>(&json).is_err());
        }
        let id: ContainerId = serde_json::from_str(r#""main""#).unwrap();
        assert_eq!(id, ContainerId::default());
        assert_eq!(serde_json::to_string(&id).unwrap(), r#""main""#);
    }
}
