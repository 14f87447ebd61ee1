//! Assembly of the workload's root file system.
//!
//! Runs in the workload's init, in a mount namespace of its own that starts as a copy of
//! the agent's. The finished root is moved over `/`, so that the previous root (the
//! initramfs with the agent) has no path any more.
//!
//! The image is hostile input: `/proc` may be a symlink to `/etc`, and `/etc/hosts` a
//! FIFO. Mount points are therefore opened with `openat2` relative to the root, without
//! leaving it, and mounted on through the descriptor.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat2, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    mount_move, mount_remount,
};
use sm_guest_proto::control::{AttachRoot, Upper};
use thiserror::Error;

use crate::bind::{self, Place, descriptor_path};
use crate::{device, sys};

/// Timeout for a block device to appear with a capacity. The host sets the capacity
/// before it sends the request, so that only the guest's own detection can be late.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);

/// Default size of `/dev/shm` in bytes.
const DEFAULT_SHM: u64 = 64 << 20;

/// The files of the agent that are mounted over the image's, by their names in the
/// agent's directory.
const FILES: [(&str, &str); 3] = [
    ("hostname", "etc/hostname"),
    ("hosts", "etc/hosts"),
    (RESOLV_CONF_FILE, "etc/resolv.conf"),
];

/// The overlay's upper directory, in the file system for changes.
const CHANGES: &str = "upper";

/// Names of files in the agent's directory.
pub(crate) const BOOT_ID_FILE: &str = "boot_id";
pub(crate) const MACHINE_ID_FILE: &str = "machine-id";
pub(crate) const EPOCH_FILE: &str = "epoch";
pub(crate) const RESOLV_CONF_FILE: &str = "resolv.conf";

/// Paths of these files below the workload's root.
pub(crate) const BOOT_ID: &str = "proc/sys/kernel/random/boot_id";
pub(crate) const MACHINE_ID: &str = "etc/machine-id";
pub(crate) const EPOCH: &str = "run/sm-epoch";
const RUN: &str = "run";
const EPOCH_NAME: &str = "sm-epoch";

/// Failure of a step.
#[derive(Debug, Error)]
#[error("{operation}: {cause}")]
pub(crate) struct RootError {
    operation: String,
    cause: io::Error,
}

trait Context<T> {
    fn context(self, operation: impl FnOnce() -> String) -> Result<T, RootError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, operation: impl FnOnce() -> String) -> Result<T, RootError> {
        self.map_err(|cause| RootError {
            operation: operation(),
            cause: cause.into(),
        })
    }
}

/// Maximum number of bytes read from a file with an identifier.
pub(crate) const MAX_ID: u64 = 256;

/// Reads a small file of the workload's tree in the way of a process of the workload:
/// links are resolved in its root. Only regular files are read.
pub(crate) fn read_in(root: &OwnedFd, path: &str) -> io::Result<String> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = fs::File::from(openat2(root, path, flags, Mode::empty(), resolve)?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, MAX_ID), &mut text)?;
    Ok(text.trim().to_owned())
}

/// A root that was assembled.
pub(crate) struct Assembled {
    /// The directory with the changes.
    pub(crate) upper: OwnedFd,
    /// The root of the image.
    pub(crate) lower: OwnedFd,
    /// The container's machine ID file, if it is a file of the root.
    pub(crate) machine_id: Option<OwnedFd>,
}

/// Builds the root that `plan` describes and makes it the root of this process and its
/// mount namespace. `identity` is the directory with the files of [`crate::identity`];
/// `directory` is the container's own, which contains the devpts instance.
///
/// Its directories are also returned, as the assembled root hides them.
pub(crate) fn assemble(
    identity: &Path,
    directory: &Path,
    plan: &AttachRoot,
) -> Result<Assembled, RootError> {
    // Mounts must not propagate to the agent's namespace.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .context(|| "make mounts private".into())?;
    let lower = mount_lower(directory, &plan.lower)?;
    let upper = mount_upper(directory, plan)?;
    let root = mount_overlay(directory, &lower, &upper)?;
    let root_fd = open(
        &root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| "open the new root".into())?;
    let tree = Tree { fd: root_fd };
    mount_kernel_file_systems(&tree, directory, plan)?;
    // Links come last, because they may resolve to another of these files.
    let (links, files): (Vec<_>, Vec<_>) = FILES
        .into_iter()
        .partition(|(_, target)| tree.is_link(target));
    let run = bind::directory(&tree.fd, Path::new(RUN));
    let mut taken: Vec<_> = run.iter().map(|run| run.path.join(EPOCH_NAME)).collect();
    tree.mount_files(identity, &files, &taken);
    let machine_id = if plan.read_only {
        tree.mount_machine_id(identity, &taken)?;
        None
    } else {
        tree.bind_machine_id(&upper, &taken)?
    };
    let (path, machine_id) = machine_id.unzip();
    taken.extend(path);
    tree.mount_files(identity, &links, &taken);
    let mounted = run.and_then(|run| tree.mount_epoch(identity, &run, plan.read_only));
    crate::log::note_failure(EPOCH, mounted);
    tree.mount_boot_id(&identity.join(BOOT_ID_FILE))?;
    if plan.read_only {
        mount_remount(&root, MountFlags::BIND | MountFlags::RDONLY, "")
            .context(|| "make the root read-only".into())?;
    }
    let layer = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(path, flags, Mode::empty()).context(|| format!("open {}", path.display()))
    };
    let (upper, lower) = (layer(&upper.join(CHANGES))?, layer(&lower)?);
    enter(&root)?;
    Ok(Assembled {
        upper,
        lower,
        machine_id,
    })
}

fn enter(root: &Path) -> Result<(), RootError> {
    // The initramfs root cannot be pivoted away from, so the new root is moved over it,
    // as every initramfs does.
    std::env::set_current_dir(root).context(|| "enter the new root".into())?;
    mount_move(".", "/").context(|| "move the new root to /".into())?;
    rustix::process::chroot(".").context(|| "change root".into())?;
    std::env::set_current_dir("/").context(|| "enter /".into())
}

fn make_directory(path: PathBuf) -> Result<PathBuf, RootError> {
    fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
    Ok(path)
}

/// Mounts the read-only layer: an EROFS block device, or a directory by a bind mount.
fn mount_lower(directory: &Path, lower: &str) -> Result<PathBuf, RootError> {
    let target = make_directory(directory.join("lower"))?;
    if fs::metadata(lower).is_ok_and(|metadata| metadata.is_dir()) {
        mount_bind(lower, &target).context(|| format!("bind {lower}"))?;
        return Ok(target);
    }
    wait_if_block(lower)?;
    mount(lower, &target, "erofs", MountFlags::RDONLY, None)
        .context(|| format!("mount the image {lower} (erofs)"))?;
    Ok(target)
}

fn wait_if_block(path: &str) -> Result<(), RootError> {
    if fs::metadata(path).is_ok_and(|metadata| !metadata.file_type().is_block_device()) {
        return Ok(());
    }
    device::wait_for_capacity(Path::new(path), DEVICE_DEADLINE)
        .context(|| format!("wait for block device {path}"))
}

fn mount_upper(directory: &Path, plan: &AttachRoot) -> Result<PathBuf, RootError> {
    let target = make_directory(directory.join("upper"))?;
    let tmpfs = |size: &str| {
        let options = format!("mode=0755,size={size}\0");
        let options = std::ffi::CStr::from_bytes_until_nul(options.as_bytes()).ok();
        mount("tmpfs", &target, "tmpfs", MountFlags::empty(), options)
            .context(|| "mount a tmpfs for changes".into())
    };
    match &plan.upper {
        // A read-only root writes only mount points that the image lacks.
        _ if plan.read_only => tmpfs("1m")?,
        Upper::Tmpfs { size: 0 } => tmpfs("50%")?,
        Upper::Tmpfs { size } => tmpfs(&size.to_string())?,
        Upper::Ext4 { device } => {
            wait_if_block(device)?;
            device::mount_ext4(device, &target, MountFlags::empty())
                .context(|| format!("mount {device} (ext4) for changes"))?;
        }
    }
    Ok(target)
}

fn mount_overlay(directory: &Path, lower: &Path, upper: &Path) -> Result<PathBuf, RootError> {
    let changes = upper.join(CHANGES);
    // A disk that was used before has the attributes that its last user gave.
    if !changes.exists() {
        make_directory(changes.clone())?;
        copy_attributes(lower, &changes).context(|| "copy the attributes of /".into())?;
    }
    let work = make_directory(upper.join("work"))?;
    let target = make_directory(directory.join("root"))?;
    // index and xino suit a lower layer that never changes; redirect_dir permits renames
    // of directories of the image.
    let options = |extra: &str| {
        let text = format!(
            "lowerdir={},upperdir={},workdir={}{extra}\0",
            lower.display(),
            changes.display(),
            work.display()
        );
        std::ffi::CString::from_vec_with_nul(text.into_bytes()).unwrap_or_default()
    };
    let full = options(",index=off,xino=auto,redirect_dir=on");
    let flags = MountFlags::empty();
    let mounted = mount("overlay", &target, "overlay", flags, Some(full.as_c_str()))
        // A kernel that lacks one of these options refuses all of them.
        .or_else(|_| {
            mount(
                "overlay",
                &target,
                "overlay",
                flags,
                Some(options("").as_c_str()),
            )
        });
    mounted.context(|| "mount the overlay".into())?;
    Ok(target)
}

/// In an overlay, the root directory has the attributes of the upper one.
fn copy_attributes(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::metadata(from)?;
    chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))
}

fn mount_kernel_file_systems(
    tree: &Tree,
    directory: &Path,
    plan: &AttachRoot,
) -> Result<(), RootError> {
    let safe = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    tree.mount("proc", "proc", safe, "")?;
    tree.mount("sys", "sysfs", safe, "")?;
    tree.mount("dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        // The links are created in the agent's own mount of the same devtmpfs, so that no
        // file of the image is involved.
        let _ = symlink(target, Path::new("/dev").join(name));
    }
    let pts = tree.directory("dev/pts")?;
    mount_bind(directory.join("pts"), descriptor_path(&pts)).context(|| "mount /dev/pts".into())?;
    let shm = if plan.shm_size == 0 {
        DEFAULT_SHM
    } else {
        plan.shm_size
    };
    tree.mount("dev/shm", "tmpfs", safe, &format!("mode=1777,size={shm}"))?;
    crate::log::note_failure(
        "mount /dev/mqueue",
        tree.mount("dev/mqueue", "mqueue", safe, ""),
    );
    // From here on this process's cgroup is the root of the hierarchy that it sees.
    let cgroups = sys::unshare(sys::NEW_CGROUPS)
        .context(|| "make a cgroup namespace".into())
        .and_then(|()| tree.mount("sys/fs/cgroup", "cgroup2", safe, ""));
    crate::log::note_failure("mount /sys/fs/cgroup", cgroups);
    Ok(())
}

/// Tolerates a path at which no file can exist, because clones then share nothing there.
/// Every other failure to give this guest a machine ID is an error.
fn unless_nowhere<T>(placed: io::Result<T>) -> Result<Option<T>, RootError> {
    match placed {
        Ok(placed) => Ok(Some(placed)),
        Err(error) if bind::is_nowhere(&error) => {
            crate::log::error(MACHINE_ID, error);
            Ok(None)
        }
        Err(error) => Err(error).context(|| format!("make this guest's own /{MACHINE_ID}")),
    }
}

/// The new root, accessed only through a descriptor.
struct Tree {
    fd: OwnedFd,
}

impl Tree {
    fn is_link(&self, path: &str) -> bool {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat2(&self.fd, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
            .and_then(fstat)
            .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Symlink)
    }

    /// Mounts files of the agent's `directory` over the root's, but not over `taken`.
    fn mount_files(&self, directory: &Path, files: &[(&str, &str)], taken: &[PathBuf]) {
        for (name, target) in files {
            let mounted =
                bind::mount_over(&self.fd, Path::new(target), &directory.join(name), taken);
            crate::log::note_failure(target, mounted);
        }
    }

    /// Mounts the agent's machine ID over that of a root that is not writable.
    fn mount_machine_id(&self, directory: &Path, taken: &[PathBuf]) -> Result<(), RootError> {
        let source = directory.join(MACHINE_ID_FILE);
        let mounted = bind::mount_over(&self.fd, Path::new(MACHINE_ID), &source, taken);
        unless_nowhere(mounted)?;
        Ok(())
    }

    /// Makes the machine ID a file of the root, and returns its path and a descriptor for
    /// writing.
    ///
    /// It is not a mount, because systemd treats a machine ID that is a mount point as
    /// one to be committed: it writes the ID to the file below and unmounts it, so that
    /// all clones would share the committed ID (systemd-machine-id-commit.service(8)). A
    /// workload that replaces the file has an ID of its own from then on, which its
    /// clones share.
    fn bind_machine_id(
        &self,
        upper: &Path,
        taken: &[PathBuf],
    ) -> Result<Option<(PathBuf, OwnedFd)>, RootError> {
        let mounted = bind::empty(&self.fd, Path::new(MACHINE_ID), taken);
        let Some(path) = unless_nowhere(mounted)? else {
            return Ok(None);
        };
        // The descriptor is opened in the file system for changes, which contains the
        // file now. A writable descriptor in the overlay would prevent the workload from
        // remounting its root read-only.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = open(upper.join(CHANGES), flags, Mode::empty()).and_then(|changes| {
            let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            openat2(changes, &path, flags, Mode::empty(), resolve)
        });
        let file = file.context(|| format!("open this guest's own /{MACHINE_ID}"))?;
        Ok(Some((path, file)))
    }

    /// Mounts the epoch. `/run` becomes a mount point if possible, because systemd mounts
    /// a file system over one that is not, which would hide the epoch.
    fn mount_epoch(&self, directory: &Path, run: &Place, read_only: bool) -> io::Result<()> {
        let source = directory.join(EPOCH_FILE);
        if read_only || run.path.as_os_str().is_empty() {
            return bind::mount_over(&run.fd, Path::new(EPOCH_NAME), &source, &[]);
        }
        let path = descriptor_path(&run.fd);
        mount_bind_recursive(&path, &path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let run = openat2(&self.fd, &run.path, flags, Mode::empty(), resolve)?;
        bind::mount_over(&run, Path::new(EPOCH_NAME), &source, &[])
    }

    /// Mounts `source` over the kernel's boot ID, which clones share.
    fn mount_boot_id(&self, source: &Path) -> Result<(), RootError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        openat2(&self.fd, BOOT_ID, flags, Mode::empty(), resolve)
            .and_then(|target| mount_bind(source, descriptor_path(&target)))
            .context(|| format!("mount this guest's own file on /{BOOT_ID}"))
    }

    /// Opens or creates the directory `path`, one of a few fixed names. Any other file of
    /// the image at that path is replaced.
    fn directory(&self, path: &str) -> Result<OwnedFd, RootError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        let open = || openat2(&self.fd, path, flags, Mode::empty(), resolve);
        let opened = open().or_else(|error| {
            match error {
                Errno::NOENT => {}
                Errno::LOOP | Errno::NOTDIR => unlinkat(&self.fd, path, AtFlags::empty())?,
                other => return Err(other),
            }
            mkdirat(&self.fd, path, Mode::from_raw_mode(0o755))?;
            open()
        });
        opened.context(|| format!("make mount point /{path}"))
    }

    fn mount(
        &self,
        path: &str,
        kind: &str,
        flags: MountFlags,
        options: &str,
    ) -> Result<(), RootError> {
        let target = self.directory(path)?;
        let options = std::ffi::CString::new(options).unwrap_or_default();
        mount(
            kind,
            descriptor_path(&target),
            kind,
            flags,
            Some(options.as_c_str()),
        )
        .context(|| format!("mount {kind} on /{path}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(directory: &Path) -> Tree {
        let fd = open(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        Tree { fd }
    }

    #[test]
    fn mount_points_never_follow_the_images_links() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        symlink(outside.path(), root.path().join("proc")).unwrap();
        fs::write(root.path().join("sys"), "a file").unwrap();
        let tree = tree(root.path());
        for name in ["proc", "sys", "dev"] {
            tree.directory(name).unwrap();
            let metadata = fs::symlink_metadata(root.path().join(name)).unwrap();
            assert!(metadata.is_dir(), "{name} is a directory of the root now");
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_roots_own_mode_is_the_images() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(from.path(), fs::Permissions::from_mode(0o1751)).unwrap();
        copy_attributes(from.path(), to.path()).unwrap();
        assert_eq!(fs::metadata(to.path()).unwrap().mode() & 0o7777, 0o1751);
    }
}
