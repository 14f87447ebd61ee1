//! Mounts as a launch request has them: volumes exist, and paths of the host are resolved.

use std::path::Path;

use sm_control::config::{HostOptionsV1, MountSourceV1, MountV1};
use sm_control::launch::{MountRequest, MountSource, VolumeShare};

use super::{VolumeError, VolumeKind, VolumeOptions, Volumes, host};
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
                name: None, copy, ..
            } => MountSource::Volume {
                name: String::new(),
                directory: None,
                copy: *copy,
            },
            MountSourceV1::Volume {
                name: Some(name),
                copy,
                anonymous,
            } => of_volume(volumes, name, *copy, *anonymous)?,
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

/// Returns the source of a volume, which is created if it does not exist.
fn of_volume(
    volumes: &Volumes,
    name: &str,
    copy: bool,
    anonymous: bool,
) -> Result<MountSource, Error> {
    let volume = match volumes.get(name) {
        Err(Error::Volume(VolumeError::NotFound(_))) => {
            let options = VolumeOptions {
                anonymous,
                ..VolumeOptions::new()
            };
            volumes.create(Some(name), &options)?
        }
        found => found?,
    };
    let name = name.to_owned();
    Ok(match volume.kind() {
        VolumeKind::Disk => MountSource::Volume {
            name,
            directory: Some(volume.path().to_owned()),
            copy,
        },
        VolumeKind::Directory => MountSource::Host {
            directory: volume.path().canonicalize().map_err(|source| Error::File {
                operation: "mount",
                path: volume.path().to_owned(),
                source,
            })?,
            file: None,
            options: HostOptionsV1::default(),
            volume: Some(VolumeShare { name, copy }),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::Mount;
    use super::*;

    #[test]
    fn a_directory_is_shared_and_a_disk_is_inserted() {
        let dir = tempfile::tempdir().unwrap();
        let sm = crate::Sm::builder().below(dir.path()).build().unwrap();
        let volumes = sm.volumes();
        let options = VolumeOptions::new().kind(VolumeKind::Directory);
        volumes.create(Some("shared"), &options).unwrap();
        let mounts = [
            Mount::volume("shared", "/a").without_copy(),
            Mount::volume("disk", "/b"),
        ];
        let found = requests(&volumes, &mounts.map(|mount| mount.stored())).unwrap();
        let MountSource::Host {
            directory,
            file: None,
            volume: Some(volume),
            ..
        } = &found[0].source
        else {
            panic!("{found:?}");
        };
        assert!(directory.is_dir() && directory.ends_with("volumes/shared/data"));
        assert_eq!((volume.name.as_str(), volume.copy), ("shared", false));
        assert!(matches!(found[1].source, MountSource::Volume { .. }));
        assert_eq!(super::super::warnings(sm.home(), &found), [""; 0]);
    }

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
