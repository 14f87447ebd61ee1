//! Mounts as a launch request has them: volumes exist, and paths of the host are resolved.

use std::path::Path;

use sm_control::config::{MountSourceV1, MountV1};
use sm_control::launch::{MountRequest, MountSource};

use super::{VolumeError, VolumeOptions, Volumes, host};
use crate::{Error, OptionError};

/// Returns the mounts for a launch request, parents before children. Volumes that do not
/// exist are created, and paths of the host are resolved.
///
/// # Errors
/// Two mounts have the same target, a volume cannot be created, or a path of the host cannot
/// be mounted.
pub(crate) fn requests(volumes: &Volumes, mounts: &[MountV1]) -> Result<Vec<MountRequest>, Error> {
    let mut requests = Vec::with_capacity(mounts.len());
    for mount in mounts {
        let target = Path::new(&mount.target);
        let taken = |other: &MountRequest| Path::new(&other.target) == target;
        if requests.iter().any(taken) {
            return Err(OptionError::MountedTwice(mount.target.clone()).into());
        }
        let source = match &mount.source {
            MountSourceV1::Volume {
                name,
                copy,
                anonymous,
            } => MountSource::Volume {
                name: name.clone().unwrap_or_default(),
                directory: match name {
                    Some(name) => {
                        let volume = match volumes.get(name) {
                            Err(Error::Volume(VolumeError::NotFound(_))) => {
                                let options = VolumeOptions {
                                    anonymous: *anonymous,
                                    ..VolumeOptions::new()
                                };
                                volumes.create(Some(name), &options)
                            }
                            found => found,
                        };
                        Some(volume?.path().to_owned())
                    }
                    None => None,
                },
                copy: *copy,
            },
            MountSourceV1::Host { path, options } => {
                host::resolved(volumes.sm.home(), path, *options, mount.read_only)?
            }
            MountSourceV1::Tmpfs { size, mode } => MountSource::Tmpfs {
                size: *size,
                mode: *mode,
            },
        };
        requests.push(MountRequest {
            source,
            target: mount.target.clone(),
            read_only: mount.read_only,
            optional: mount.optional,
        });
    }
    requests.sort_by_key(|mount| Path::new(&mount.target).components().count());
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::super::Mount;
    use super::*;

    #[test]
    fn parents_come_first_and_targets_differ() {
        let dir = tempfile::tempdir().unwrap();
        let sm = crate::Sm::builder().below(dir.path()).build().unwrap();
        let mounts = [
            Mount::tmpfs("/a/b/c"),
            Mount::volume("db", "/a"),
            Mount::anonymous("/a/b"),
        ]
        .map(|mount| mount.stored());
        let found = requests(&sm.volumes(), &mounts).unwrap();
        let targets: Vec<_> = found.iter().map(|mount| mount.target.as_str()).collect();
        assert_eq!(targets, ["/a", "/a/b", "/a/b/c"]);
        // It was created.
        assert!(sm.volumes().get("db").is_ok());
        let twice = [Mount::tmpfs("/a"), Mount::tmpfs("/a/")].map(|mount| mount.stored());
        let error = requests(&sm.volumes(), &twice).unwrap_err().to_string();
        assert!(error.contains("\"/a/\""), "{error}");
        assert!(requests(&sm.volumes(), &[Mount::volume("-", "/a").stored()]).is_err());
    }
}
