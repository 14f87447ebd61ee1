//! Options of a directory or file of the host that is mounted in a guest.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A text that is no [`HostOwner`] or [`HostChown`]; a clause with the possible values.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("\"{text}\" is none of {values}")]
pub struct HostOptionError {
    text: String,
    values: &'static str,
}

/// Owners of the host's files in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HostOwner {
    /// Files of the user who starts the VM belong to the workload's user, others keep their
    /// numbers: the default, unless root starts the VM.
    Squash,
    /// Files keep their numbers: the default if root starts the VM. New files then belong to
    /// the user of the guest that creates them.
    Keep,
    /// All files belong to this user and group of the guest.
    Fixed {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
}

impl FromStr for HostOwner {
    type Err = HostOptionError;

    /// Parses `squash`, `keep` or `UID:GID`.
    fn from_str(text: &str) -> Result<Self, HostOptionError> {
        let fixed = || {
            let (uid, gid) = text.split_once(':')?;
            let number = |text: &str| match text.parse() {
                // No user has this number.
                Ok(u32::MAX) | Err(_) => None,
                Ok(number) => Some(number),
            };
            let (uid, gid) = (number(uid)?, number(gid)?);
            Some(Self::Fixed { uid, gid })
        };
        match text {
            "squash" => Ok(Self::Squash),
            "keep" => Ok(Self::Keep),
            _ => fixed().ok_or_else(|| HostOptionError {
                text: text.to_owned(),
                values: "squash, keep and UID:GID",
            }),
        }
    }
}

/// Effect of chown(2) in a guest on files of the host. Root of the host with
/// [`HostOwner::Keep`] changes their owners instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HostChown {
    /// The owner is stored in the extended attribute `user.containers.override_stat`.
    #[default]
    Xattr,
    /// None; the call succeeds.
    Ignore,
    /// It fails with `EPERM`.
    Deny,
}

impl FromStr for HostChown {
    type Err = HostOptionError;

    /// Parses `xattr`, `ignore` or `deny`.
    fn from_str(text: &str) -> Result<Self, HostOptionError> {
        match text {
            "xattr" => Ok(Self::Xattr),
            "ignore" => Ok(Self::Ignore),
            "deny" => Ok(Self::Deny),
            _ => Err(HostOptionError {
                text: text.to_owned(),
                values: "xattr, ignore and deny",
            }),
        }
    }
}

/// Options of a mount of the host. JSON in a VM's record; members may be added with a
/// default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostOptionsV1 {
    /// Owners of files in the guest; absent for the default of the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<HostOwner>,
    /// Effect of chown(2).
    #[serde(skip_serializing_if = "is_default")]
    pub chown: HostChown,
    /// Programs in the guest are notified of changes by the host.
    #[serde(skip_serializing_if = "is_default")]
    pub watch: bool,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_texts_and_json() {
        for (text, owner, json) in [
            ("squash", HostOwner::Squash, r#"{"owner":"squash"}"#),
            ("keep", HostOwner::Keep, r#"{"owner":"keep"}"#),
            (
                "1000:0",
                HostOwner::Fixed { uid: 1000, gid: 0 },
                r#"{"owner":{"fixed":{"uid":1000,"gid":0}}}"#,
            ),
        ] {
            assert_eq!(text.parse(), Ok(owner));
            let options = HostOptionsV1 {
                owner: Some(owner),
                ..HostOptionsV1::default()
            };
            assert_eq!(serde_json::to_string(&options).unwrap(), json);
            assert_eq!(
                serde_json::from_str::<HostOptionsV1>(json).unwrap(),
                options
            );
        }
        for bad in [
            "",
            "root",
            "1000",
            "1000:",
            ":0",
            "-1:0",
            "4294967295:0",
            "1:2:3",
        ] {
            let error = bad.parse::<HostOwner>().unwrap_err().to_string();
            assert!(error.contains("squash, keep and UID:GID"), "{bad}: {error}");
        }
        let watch = r#"{"watch":true}"#;
        let watched: HostOptionsV1 = serde_json::from_str(watch).unwrap();
        assert!(watched.watch);
        assert_eq!(serde_json::to_string(&watched).unwrap(), watch);
        let deny: HostOptionsV1 = serde_json::from_str(r#"{"chown":"deny"}"#).unwrap();
        assert_eq!(Ok(deny.chown), "deny".parse());
        assert_eq!("ignore".parse(), Ok(HostChown::Ignore));
        assert!("no".parse::<HostChown>().is_err());
        assert_eq!(
            serde_json::to_string(&HostOptionsV1::default()).unwrap(),
            "{}"
        );
    }
}
