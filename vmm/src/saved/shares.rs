//! Directories of the host in snapshots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A directory or file of the host that a guest in a snapshot has mounted. The path is a name,
/// and no right to what is there: whoever restores the snapshot supplies a directory or a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedShare {
    /// Path of the mount in the guest, by which mounts are found.
    pub target: String,
    /// Path of the directory on the host when the snapshot was taken.
    pub directory: PathBuf,
    /// Name of the file in it, if that is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Name of the volume, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// The guest cannot write to it.
    #[serde(default)]
    pub read_only: bool,
}

impl SavedShare {
    /// Returns the path of what was mounted, or the name of the volume.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match (&self.volume, &self.file) {
            (Some(volume), _) => volume.into(),
            (None, None) => self.directory.clone(),
            (None, Some(file)) => self.directory.join(file),
        }
    }
}

/// Reason why mounts do not fit the ones that a snapshot has.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShareMismatch {
    /// The snapshot has a mount that was not supplied.
    #[error("\"{}\" of the host was mounted at \"{target}\", and a snapshot is no right to it", path.display())]
    Missing {
        /// Path of the mount in the guest.
        target: String,
        /// Path on the host when the snapshot was taken, or the name of the volume.
        path: PathBuf,
    },
    /// A mount was supplied that the snapshot does not have.
    #[error("nothing of the host was mounted at \"{target}\"")]
    Unknown {
        /// Path of the mount in the guest.
        target: String,
    },
}

/// Brings mounts of the host, which have different targets, into the order that they have in
/// a snapshot.
///
/// # Errors
/// They are not those of the snapshot.
pub fn arrange<T>(
    saved: &[SavedShare],
    mut supplied: Vec<T>,
    target: impl Fn(&T) -> &str,
) -> Result<Vec<T>, ShareMismatch> {
    let mut arranged = Vec::with_capacity(saved.len());
    for share in saved {
        let found = supplied
            .iter()
            .position(|mount| target(mount) == share.target);
        match found {
            Some(position) => arranged.push(supplied.remove(position)),
            None => {
                return Err(ShareMismatch::Missing {
                    target: share.target.clone(),
                    path: share.path(),
                });
            }
        }
    }
    match supplied.first() {
        Some(mount) => Err(ShareMismatch::Unknown {
            target: target(mount).to_owned(),
        }),
        None => Ok(arranged),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_those_of_the_snapshot_in_its_order() {
        let share = |target: &str, file: Option<&str>| SavedShare {
            target: target.to_owned(),
            directory: "/home/me".into(),
            file: file.map(str::to_owned),
            volume: None,
            read_only: false,
        };
        let saved = [share("/work", None), share("/etc/conf", Some("conf"))];
        let arranged = |given: &[&'static str]| arrange(&saved, given.to_vec(), |target| target);
        for given in [["/work", "/etc/conf"], ["/etc/conf", "/work"]] {
            assert_eq!(arranged(&given), Ok(vec!["/work", "/etc/conf"]));
        }
        let missing = arranged(&["/work"]).unwrap_err();
        assert_eq!(
            missing,
            ShareMismatch::Missing {
                target: "/etc/conf".to_owned(),
                path: "/home/me/conf".into(),
            }
        );
        let text = "\"/home/me/conf\" of the host was mounted at \"/etc/conf\"";
        assert!(missing.to_string().contains(text), "{missing}");
        assert_eq!(
            arranged(&["/work", "/etc/conf", "/root"]),
            Err(ShareMismatch::Unknown {
                target: "/root".to_owned()
            })
        );
        assert_eq!(arrange(&[], Vec::new(), |target: &&str| target), Ok(vec![]));
        let json = serde_json::to_string(&saved[0]).unwrap();
        let known = r#"{"target":"/work","directory":"/home/me","read_only":false}"#;
        assert_eq!(json, known);
        assert_eq!(serde_json::from_str::<SavedShare>(known).unwrap(), saved[0]);
    }
}
