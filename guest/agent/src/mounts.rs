//! Mounts of volumes, shared directories and tmpfs in the workload's root.
//!
//! Runs in a child of the agent. File systems are mounted in a mount namespace of the
//! child's own, from which a copy of the mount is moved to the workload's: nothing is left in
//! the agent's, and no path of the workload decides which device is mounted.
//!
//! The root is hostile: a target is resolved inside it, as the workload would resolve it.

mod copy;
mod shed;
mod touch;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{
    CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, fstat, fstatvfs, mkdirat, open,
    openat, openat2,
};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_bind,
    mount_change, mount_remount, move_mount, open_tree,
};
use sm_guest_proto::control::{GuestMount, GuestMountSource};

pub(crate) use self::shed::unused_names;
pub(crate) use self::touch::touch;
use crate::workload::Namespaces;
use crate::{device, sys};

/// Timeout for the disk of a volume to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);

/// Type of file system of the host's shared directories.
pub(crate) const SHARES_TYPE: &str = "virtiofs";

/// Tag of them.
const SHARES: &str = "sm";

/// The directory of a volume's file system that VMs see.
const DATA: &str = "data";

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);
/// As processes of the workload resolve paths, which are in its root.
const INSIDE: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// Mounts file systems, in this order. `own` is the agent's directory.
///
/// # Errors
/// A sentence about the first that cannot be mounted.
pub(crate) fn perform(
    mounts: &[GuestMount],
    namespaces: &Namespaces,
    own: &Path,
) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("cannot {what}: {error}");
    share_with_agent(mounts, own).map_err(|error| failed("mount shared directories", error))?;
    sys::unshare(sys::NEW_MOUNTS)
        .and_then(|()| {
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            Ok(mount_change("/", private)?)
        })
        .map_err(|error| failed("make a mount namespace", error))?;
    let mut trees = Vec::with_capacity(mounts.len());
    for (number, mount) in mounts.iter().enumerate() {
        let at = own.join("mounts").join(number.to_string());
        let tree = prepare(mount, &at, &shares_at(own));
        trees.push(tree.map_err(|error| failed(&format!("mount {:?}", mount.target), error))?);
    }
    namespaces
        .join_mounts()
        .map_err(|error| failed("join the workload's mount namespace", error))?;
    let root = open("/", OFlags::PATH | DIRECTORY, Mode::empty())
        .map_err(|error| failed("open the root", error.into()))?;
    let placed = || {
        for (mount, tree) in mounts.iter().zip(&trees) {
            if mount.optional && directory(&root, Path::new(&mount.target)).is_err() {
                continue;
            }
            place(&root, mount, tree).map_err(|error| refusal(&mount.target, error))?;
        }
        Ok(())
    };
    writable(&root, placed)
        .map_err(|error| failed("change whether the root is read-only", error))?
}

/// A sentence about a file system that cannot be mounted on `target`.
fn refusal(target: &str, error: io::Error) -> String {
    match Errno::from_io_error(&error) {
        Some(Errno::ISDIR) => {
            format!("cannot mount {target:?}: the source is a file, and a directory is there")
        }
        Some(Errno::NOTDIR) => format!(
            "cannot mount {target:?}: the source is a directory, and a file is there, or in \
             its path"
        ),
        _ => format!("cannot mount {target:?}: {error}"),
    }
}

/// Calls `place`, which may need mount points in a root that is read-only; no process of the
/// workload runs yet.
fn writable<T>(root: &OwnedFd, place: impl FnOnce() -> T) -> io::Result<T> {
    if !fstatvfs(root)?.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(place());
    }
    mount_remount("/", MountFlags::BIND, "")?;
    let placed = place();
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "")?;
    Ok(placed)
}

/// Returns the mount point of all shared directories.
fn shares_at(directory: &Path) -> PathBuf {
    directory.join("shares")
}

/// Mounts shared directories in the agent's mount namespace, which is this process's still, if
/// programs are to be notified of changes in them ([`touch`]). Each is a file system of its
/// own, mounted where it is first used: mounts of the workload are copies of these.
fn share_with_agent(mounts: &[GuestMount], directory: &Path) -> io::Result<()> {
    for mount in mounts {
        if let GuestMountSource::Shared {
            name, watch: true, ..
        } = &mount.source
        {
            let root = mounted_shares(&shares_at(directory))?;
            open(
                root.join(name).join("."),
                OFlags::PATH | DIRECTORY,
                Mode::empty(),
            )?;
        }
    }
    Ok(())
}

/// Mounts a file system at `at`, or all shared directories at `shares`; returns a copy of the
/// mount, or of a directory or file in it.
fn prepare(mount_of: &GuestMount, at: &Path, shares: &Path) -> io::Result<OwnedFd> {
    fs::create_dir_all(at)?;
    let read_only = match mount_of.read_only {
        true => MountFlags::RDONLY,
        false => MountFlags::empty(),
    };
    // As for every file system that somebody else may have written.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | read_only;
    let tree: PathBuf = match &mount_of.source {
        GuestMountSource::Disk { device, .. } => {
            device::wait_for_capacity(Path::new(device), DEVICE_DEADLINE)?;
            device::mount_ext4(device, at, flags)?;
            at.join(DATA)
        }
        GuestMountSource::Shared { name, file, .. } => {
            let root = mounted_shares(shares)?;
            let source = root.join(name);
            let (source, at) = match file {
                None => (source, at.to_path_buf()),
                Some(file) => {
                    let at = at.join("file");
                    fs::write(&at, "")?;
                    (source.join(file), at)
                }
            };
            // A mount of its own, whose flags are those of this share.
            mount_bind(&source, &at)?;
            mount_remount(&at, MountFlags::BIND | flags, "")?;
            at
        }
        GuestMountSource::Tmpfs { size, mode } => {
            let size = size.map_or_else(|| "50%".to_owned(), |size| size.to_string());
            let options = format!("mode={:o},size={size}\0", mode & 0o7777);
            let options = std::ffi::CStr::from_bytes_until_nul(options.as_bytes());
            mount("tmpfs", at, "tmpfs", flags, options.ok())?;
            at.to_path_buf()
        }
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, tree, flags)?)
}

/// Mounts the root of all shared directories at `path`, unless it is.
fn mounted_shares(path: &Path) -> io::Result<PathBuf> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => created?,
    }
    let is_mounted = fs::metadata(path)?.dev() != fs::metadata(path.join(".."))?.dev();
    if !is_mounted {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount(SHARES, path, SHARES_TYPE, flags, None)?;
    }
    Ok(path.to_path_buf())
}

/// Moves a mount to its target in the workload's root.
fn place(root: &OwnedFd, mount: &GuestMount, tree: &OwnedFd) -> io::Result<()> {
    let target = Path::new(&mount.target);
    let target = match &mount.source {
        GuestMountSource::Shared { file: Some(_), .. } => file(root, target)?,
        _ => directory(root, target)?,
    };
    let copy = match mount.source {
        GuestMountSource::Disk { copy, .. } | GuestMountSource::Shared { copy, .. } => copy,
        GuestMountSource::Tmpfs { .. } => false,
    };
    if copy && !mount.read_only {
        copy::fill_if_empty(&target, tree)?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", &target, "", flags)?)
}

/// Opens a directory below `root`, and creates missing components.
fn directory(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    match openat2(root, path, OFlags::PATH | DIRECTORY, Mode::empty(), INSIDE) {
        Err(Errno::NOENT) => {}
        found => return Ok(found?),
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = directory(root, parent)?;
    match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        // A link to nothing: the workload would find nothing there, either.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(openat2(
        root,
        path,
        OFlags::PATH | DIRECTORY,
        Mode::empty(),
        INSIDE,
    )?)
}

/// Opens a file below `root`, and creates it and missing directories.
fn file(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let open = || openat2(root, path, flags, Mode::empty(), INSIDE);
    match open() {
        Err(Errno::NOENT) => {}
        found => {
            let found = found?;
            let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
            return match kind.is_dir() {
                true => Err(Errno::ISDIR.into()),
                false => Ok(found),
            };
        }
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = directory(root, parent)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    match openat(&parent, name, flags, Mode::from_raw_mode(0o644)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(open()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn targets_are_resolved_in_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("root");
        fs::create_dir_all(inside.join("run")).unwrap();
        fs::create_dir(inside.join("var")).unwrap();
        symlink("/run", inside.join("var/run")).unwrap();
        symlink("../../..", inside.join("up")).unwrap();
        symlink("/missing", inside.join("dangling")).unwrap();
        fs::write(inside.join("file"), "").unwrap();
        let root = open(&inside, OFlags::PATH | DIRECTORY, Mode::empty()).unwrap();
        for (path, made) in [
            ("/var/run/new/deep", "run/new/deep"),
            ("/up/top", "top"),
            ("/../../etc", "etc"),
            ("/", "."),
        ] {
            directory(&root, Path::new(path)).unwrap();
            assert!(inside.join(made).is_dir(), "{path}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        for path in ["/dangling", "/file", "/file/below"] {
            assert!(directory(&root, Path::new(path)).is_err(), "{path}");
        }
        for (path, made) in [("/var/run/d/f", "run/d/f"), ("/file", "file")] {
            file(&root, Path::new(path)).unwrap();
            assert!(inside.join(made).is_file(), "{path}");
        }
        for path in ["/run", "/dangling", "/file/below", "/"] {
            assert!(file(&root, Path::new(path)).is_err(), "{path}");
        }
    }
}
