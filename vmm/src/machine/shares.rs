//! The directories of the host that a machine shares with its guest.

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use sm_control::config::{HostChown, HostOwner};
use sm_control::launch::{LaunchRequest, MountSource};
use sm_control::with_causes;
use sm_devices_fs::{ChownPolicy, Fs, FsConfig, Share, ShareOptions, ShareOwner};

/// Returns true if directories of the host are mounted.
pub(super) fn has_any(request: &LaunchRequest) -> bool {
    let mut mounts = request.mounts.iter();
    mounts.any(|mount| matches!(mount.source, MountSource::Host { .. }))
}

/// Returns the device that shares the directories of the request's mounts: each is an entry
/// of its root, named by its number among them. `files` are the maximum numbers of open files
/// and of directories that are kept open.
///
/// # Errors
/// A directory cannot be opened; a sentence.
pub(super) fn device(request: &LaunchRequest, files: (u32, u32)) -> Result<Fs, String> {
    let user = &request.config.workload.user;
    let mut config = FsConfig::default()
        .max_handles(files.0)
        .max_directories(files.1);
    let mut number = 0u32;
    for mount in &request.mounts {
        let MountSource::Host {
            directory,
            file,
            options: chosen,
            volume,
        } = &mount.source
        else {
            continue;
        };
        let failed = |error: &dyn std::error::Error| {
            let path = directory.display();
            format!("cannot share \"{path}\": {}", with_causes(error))
        };
        // A path only: entries are opened when the guest asks for them. The launcher has
        // resolved all links, so one that is there now was put there by somebody else.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let opened = openat2(CWD, directory, flags, Mode::empty(), resolve);
        let opened = opened.map_err(|errno| failed(&std::io::Error::from(errno)))?;
        let options = ShareOptions::default()
            .read_only(mount.read_only)
            .owner(match volume {
                Some(_) => owner_in_volume(),
                None => owner(chosen.owner, user)?,
            })
            .chown(chown(chosen.chown)?)
            .submounts(true);
        let name = number.to_string();
        let share = match file {
            Some(file) => Share::file(name, opened, file, options),
            None => Share::new(name, opened, options),
        };
        config = config.share(share.map_err(|error| failed(&error))?);
        number += 1;
    }
    Fs::new(config).map_err(|error| {
        let causes = with_causes(&error);
        format!("cannot share directories of the host: {causes}")
    })
}

/// Returns the owners that the guest sees. By default, root of the host has the files of all
/// users, with their owners; files of another user are those of the workload.
fn owner(chosen: Option<HostOwner>, user: &str) -> Result<ShareOwner, String> {
    // A name is known to the guest only, where root may use all files.
    let (user, group) = user.split_once(':').unwrap_or((user, ""));
    let uid = user.parse().unwrap_or(0);
    let gid = group.parse().unwrap_or(uid);
    match chosen {
        None if rustix::process::geteuid().is_root() => Ok(ShareOwner::Keep),
        None | Some(HostOwner::Squash) => Ok(ShareOwner::Squash { uid, gid }),
        Some(HostOwner::Keep) => Ok(ShareOwner::Keep),
        Some(HostOwner::Fixed { uid, gid }) => Ok(ShareOwner::Fixed { uid, gid }),
        Some(other) => Err(format!("this program does not know the owners {other:?}")),
    }
}

/// Returns the owners that the guest sees in a volume, which are those that guests gave: root
/// of the host can store them, another user has files of its root, and marks all others.
fn owner_in_volume() -> ShareOwner {
    match rustix::process::geteuid().is_root() {
        true => ShareOwner::Keep,
        false => ShareOwner::Squash { uid: 0, gid: 0 },
    }
}

/// Returns the effect of chown(2).
fn chown(chosen: HostChown) -> Result<ChownPolicy, String> {
    match chosen {
        HostChown::Xattr => Ok(ChownPolicy::Override),
        HostChown::Ignore => Ok(ChownPolicy::Ignore),
        HostChown::Deny => Ok(ChownPolicy::Deny),
        other => Err(format!("this program does not know chown={other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_belong_to_the_workload_or_as_chosen() {
        let squash = |uid, gid| Ok(ShareOwner::Squash { uid, gid });
        let chosen = Some(HostOwner::Squash);
        assert_eq!(owner(chosen, ""), squash(0, 0));
        assert_eq!(owner(chosen, "www-data"), squash(0, 0));
        assert_eq!(owner(chosen, "1000"), squash(1000, 1000));
        assert_eq!(owner(chosen, "1000:50"), squash(1000, 50));
        let default = owner(None, "1000");
        match rustix::process::geteuid().is_root() {
            true => assert_eq!(default, Ok(ShareOwner::Keep)),
            false => assert_eq!(default, squash(1000, 1000)),
        }
        let fixed = Some(HostOwner::Fixed { uid: 7, gid: 8 });
        assert_eq!(owner(fixed, "1"), Ok(ShareOwner::Fixed { uid: 7, gid: 8 }));
        assert_eq!(owner(Some(HostOwner::Keep), "1"), Ok(ShareOwner::Keep));
        assert_eq!(chown(HostChown::Deny), Ok(ChownPolicy::Deny));
    }
}
