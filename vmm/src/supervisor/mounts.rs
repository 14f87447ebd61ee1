//! Mounts of the launch request, as the guest's agent gets them.

use sm_control::launch::{MountRequest, MountSource};
use sm_guest_proto::control::{GuestMount, GuestMountSource};

/// Permissions of a tmpfs, as in Docker.
const TMPFS_MODE: u32 = 0o1777;

/// Returns the block device of a volume in the guest, by its number among the volumes: the
/// disks of image and changes are `vda` and `vdb`.
fn device(number: u8) -> String {
    format!("/dev/vd{}", char::from(b'c'.saturating_add(number)))
}

/// Returns the mounts for the agent, in the order of the request.
pub(super) fn of_guest(requested: &[MountRequest]) -> Vec<GuestMount> {
    let mut volumes = 0..;
    let mut shares = 0u32..;
    let mount = |mount: &MountRequest| GuestMount {
        source: match &mount.source {
            MountSource::Volume { copy, .. } => GuestMountSource::Disk {
                device: device(volumes.next().unwrap_or(u8::MAX)),
                copy: *copy,
            },
            MountSource::Host {
                file,
                options,
                volume,
                ..
            } => GuestMountSource::Shared {
                // As `machine/shares.rs` names them.
                name: shares.next().unwrap_or(u32::MAX).to_string(),
                file: file.clone(),
                copy: volume.as_ref().is_some_and(|volume| volume.copy),
                watch: options.watch,
            },
            MountSource::Tmpfs { size, mode } => GuestMountSource::Tmpfs {
                size: *size,
                mode: mode.unwrap_or(TMPFS_MODE),
            },
        },
        target: mount.target.clone(),
        read_only: mount.read_only,
        optional: mount.optional,
    };
    requested.iter().map(mount).collect()
}

#[cfg(test)]
mod tests {
    use sm_control::config::HostOptionsV1;

    use super::*;

    #[test]
    fn volumes_are_numbered_among_themselves() {
        let mount = |source, target: &str| MountRequest {
            source,
            target: target.to_owned(),
            read_only: false,
            optional: false,
        };
        let volume = |name: &str| MountSource::Volume {
            name: name.to_owned(),
            directory: Some("/x".into()),
            copy: true,
        };
        let tmpfs = MountSource::Tmpfs {
            size: None,
            mode: None,
        };
        let host = |file: Option<&str>| MountSource::Host {
            options: HostOptionsV1::default(),
            directory: "/x".into(),
            file: file.map(str::to_owned),
            volume: None,
        };
        let requested = [
            mount(volume("a"), "/a"),
            mount(host(None), "/h"),
            mount(tmpfs, "/t"),
            mount(volume("b"), "/b"),
            mount(host(Some("f")), "/f"),
        ];
        let sources: Vec<_> = of_guest(&requested).into_iter().map(|m| m.source).collect();
        let disk = |device: &str| GuestMountSource::Disk {
            device: device.to_owned(),
            copy: true,
        };
        let tmpfs = GuestMountSource::Tmpfs {
            size: None,
            mode: 0o1777,
        };
        let shared = |name: &str, file: Option<&str>| GuestMountSource::Shared {
            name: name.to_owned(),
            file: file.map(str::to_owned),
            copy: false,
            watch: false,
        };
        assert_eq!(
            sources,
            [
                disk("/dev/vdc"),
                shared("0", None),
                tmpfs,
                disk("/dev/vdd"),
                shared("1", Some("f")),
            ]
        );
    }
}
