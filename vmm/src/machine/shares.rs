//! The directories of the host that a machine shares with its guest.

use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use sm_control::config::{HostChown, HostOptionsV1, HostOwner};
use sm_control::launch::{LaunchRequest, MountRequest, MountSource, StartSource};
use sm_control::with_causes;
use sm_devices_fs::{ChownPolicy, Fs, FsConfig, Share, ShareOptions, ShareOwner, Watches};
use sm_snapshot::manifest::Layer;

use crate::environment::VmRecord;
use crate::failure::StartFailure;
use crate::saved::{self, SavedShare};
use crate::source::StartPlan;

/// Returns true if directories of the host are mounted.
pub(super) fn has_any(request: &LaunchRequest) -> bool {
    let mut mounts = request.mounts.iter();
    mounts.any(|mount| matches!(mount.source, MountSource::Host { .. }))
}

/// Returns the mounts of the host, for a machine that starts as planned, in the order of their
/// numbers: that of the request, or of the snapshot that is restored.
///
/// # Errors
/// They are not those of the snapshot; a sentence.
pub(super) fn mounts(
    request: &LaunchRequest,
    record: &dyn VmRecord,
    plan: &StartPlan,
) -> Result<Vec<MountRequest>, StartFailure> {
    let is_host = |mount: &&MountRequest| matches!(mount.source, MountSource::Host { .. });
    let mounts: Vec<_> = request.mounts.iter().filter(is_host).cloned().collect();
    if plan.restored() != Some(Layer::App) {
        return Ok(mounts);
    }
    let saved = &plan.content.shares;
    if let StartSource::IdentityReport(_) = request.source {
        return nothing(saved, record).map_err(|error| error.into());
    }
    let refused = |why: String| format!("the snapshot cannot be continued: {why}");
    let mounts = saved::arrange(saved, mounts, |mount| &mount.target)
        .map_err(|mismatch| refused(mismatch.to_string()))?;
    for (mount, saved) in mounts.iter().zip(saved) {
        if let MountSource::Host { file, .. } = &mount.source
            && *file != saved.file
        {
            let what = match &saved.file {
                None => "a directory".to_owned(),
                Some(name) => format!("a file named \"{name}\""),
            };
            let why = format!("{what} was mounted at \"{}\"", mount.target);
            return Err(refused(why).into());
        }
    }
    Ok(mounts)
}

/// Returns mounts of an empty directory, for a machine whose workload does not run.
fn nothing(saved: &[SavedShare], record: &dyn VmRecord) -> Result<Vec<MountRequest>, String> {
    if saved.is_empty() {
        return Ok(Vec::new());
    }
    let directory = record.directory().join("nothing");
    std::fs::create_dir_all(&directory)
        .map_err(|error| format!("cannot create {directory:?}: {error}"))?;
    let mount = |share: &SavedShare| MountRequest {
        source: MountSource::Host {
            directory: directory.clone(),
            file: None,
            options: HostOptionsV1::default(),
            volume: None,
        },
        target: share.target.clone(),
        read_only: true,
        optional: false,
    };
    Ok(saved.iter().map(mount).collect())
}

/// Returns the description of mounts of the host for a snapshot.
pub(super) fn saved(mounts: &[MountRequest]) -> Vec<SavedShare> {
    let shares = mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Host {
            directory,
            file,
            volume,
            ..
        } => Some(SavedShare {
            target: mount.target.clone(),
            directory: directory.clone(),
            file: file.clone(),
            volume: volume.as_ref().map(|volume| volume.name.clone()),
            read_only: mount.read_only,
        }),
        MountSource::Volume { .. } | MountSource::Tmpfs { .. } => None,
    });
    shares.collect()
}

/// Returns a warning if the guest has `count` files open that a clone cannot open.
pub(super) fn lost(count: usize) -> Option<String> {
    let what = match count {
        0 => return None,
        1 => "a file of the host that was removed".to_owned(),
        _ => format!("{count} files of the host that were removed"),
    };
    Some(format!(
        "the workload has {what} open, which clones can neither read nor write"
    ))
}

/// Returns watches of changes by the host, if the guest is to be notified of them.
///
/// # Errors
/// This user has too many already; a sentence.
pub(super) fn watches(mounts: &[MountRequest]) -> Result<Option<Arc<Watches>>, String> {
    let watched = |mount: &MountRequest| match &mount.source {
        MountSource::Host { options, .. } => options.watch,
        MountSource::Volume { .. } | MountSource::Tmpfs { .. } => false,
    };
    if !mounts.iter().any(watched) {
        return Ok(None);
    }
    let watches = Watches::new();
    watches
        .map(Some)
        .map_err(|error| format!("cannot watch files of the host: {error}"))
}

/// Returns the device that shares the directories of mounts of the host: each is an entry of
/// its root, named by its number. `user` is that of the workload, `files` are the maximum
/// numbers of open files and of directories that are kept open.
///
/// # Errors
/// A directory cannot be opened; a sentence.
pub(super) fn device(
    mounts: &[MountRequest],
    user: &str,
    files: (u32, u32),
    watches: Option<Arc<Watches>>,
) -> Result<Fs, String> {
    let mut config = FsConfig::default()
        .max_handles(files.0)
        .max_directories(files.1);
    if let Some(watches) = watches {
        config = config.watches(watches);
    }
    let mut number = 0u32;
    for mount in mounts {
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
            .watch(chosen.watch)
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

    /// The guest's agent sends the times that the server knows.
    #[test]
    fn both_sides_agree_about_notifications() {
        assert_eq!(sm_devices_fs::TOUCH, sm_guest_proto::control::TOUCH);
    }
}
