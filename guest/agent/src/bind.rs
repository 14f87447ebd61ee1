//! Replacement of files of the image by files of this guest.
//!
//! The image determines the existing file: a regular file, a link to one, a link to
//! `/dev/null`, a dangling link, a directory, a FIFO. As in Docker, only a regular file
//! of the root file system, at the end of any links, is mounted over or written; the
//! target of a dangling link is created. Everything else is replaced, because a link to
//! other objects (a device, an entry of `/proc`, a file that is mounted already) leads to
//! something that does not belong to the image.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat, openat2,
    readlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::mount_bind;

/// Maximum number of links followed for one path (`MAXSYMLINKS` of Linux).
const MAX_LINKS: u32 = 40;

/// Flags to truncate and write the file that was found.
const REWRITE: OFlags = OFlags::WRONLY.union(OFlags::TRUNC).union(OFlags::CLOEXEC);

const PATH_FLAGS: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Mounts the file `source` over `path` below `root`. The target of a link is not used if
/// it is one of the files `taken`.
///
/// # Errors
/// [`is_nowhere`] is true for the error if the image has no directory that can contain
/// `path`.
pub(crate) fn mount_over(
    root: &OwnedFd,
    path: &Path,
    source: &Path,
    taken: &[PathBuf],
) -> io::Result<()> {
    let target = resolve_target(root, path, taken)?;
    mount_bind(source, descriptor_path(&target.fd))?;
    Ok(())
}

/// Makes `path` below `root` an empty file of the root, distinct from all files in
/// `taken`, and returns its path without links.
///
/// # Errors
/// As [`over`].
pub(crate) fn empty(root: &OwnedFd, path: &Path, taken: &[PathBuf]) -> io::Result<PathBuf> {
    let target = resolve_target(root, path, taken)?;
    open(descriptor_path(&target.fd), REWRITE, Mode::empty())?;
    Ok(target.path)
}

/// Finds or creates the file that is used for `path`.
fn resolve_target(root: &OwnedFd, path: &Path, taken: &[PathBuf]) -> io::Result<Place> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = directory(root, parent)?;
    match at_the_end(root, &parent, name) {
        Ok(target) if !taken.contains(&target.path) => Ok(target),
        _ => {
            remove(&parent.fd, name)?;
            Ok(Place {
                fd: make_file(&parent.fd, name)?,
                path: parent.path.join(name),
            })
        }
    }
}

/// Returns true if `path` has no valid parent in the image: the parent is a file, a link
/// to itself, or on another file system.
pub(crate) fn is_nowhere(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOTDIR | Errno::LOOP | Errno::XDEV)
    )
}

/// Returns the path of a descriptor, which is resolved in the agent's own `/proc`.
pub(crate) fn descriptor_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A file or directory of the root, and its path below the root without links.
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    pub(crate) fd: OwnedFd,
}

/// Opens the directory `path`, and creates missing components.
pub(crate) fn directory(root: &OwnedFd, path: &Path) -> io::Result<Place> {
    let path = resolve(root, Path::new(""), path)?;
    let fd = make_directories(root, &path)?;
    Ok(Place { path, fd })
}

/// Opens the regular file that `name` in `parent` resolves to. The target of a dangling
/// link is created.
fn at_the_end(root: &OwnedFd, parent: &Place, name: &OsStr) -> io::Result<Place> {
    let path = resolve(root, &parent.path, Path::new(name))?;
    match find(root, &path) {
        Err(Errno::NOENT) => {}
        found => {
            let found = found?;
            let kind = FileType::from_raw_mode(fstat(&found)?.st_mode);
            return match kind {
                FileType::RegularFile => Ok(Place { path, fd: found }),
                _ => Err(io::ErrorKind::InvalidInput.into()),
            };
        }
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let parent = make_directories(root, parent)?;
    let fd = make_file(&parent, name)?;
    Ok(Place { path, fd })
}

/// Opens `path`, which contains no links, in the root's own file system.
fn find(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    // NO_SYMLINKS permits a link as the last component with O_PATH and O_NOFOLLOW.
    openat2(root, path, PATH_FLAGS, Mode::empty(), resolve)
}

/// Resolves all links in `path`, starting at the directory `from`. Components that do not
/// exist are kept unchanged.
fn resolve(root: &OwnedFd, from: &Path, path: &Path) -> io::Result<PathBuf> {
    let mut resolved = from.to_path_buf();
    let mut left = components(path);
    let mut links = 0;
    while let Some(component) = left.pop_front() {
        if component == "/" {
            resolved.clear();
            continue;
        }
        if component == ".." {
            resolved.pop();
            continue;
        }
        let next = resolved.join(&component);
        match find(root, &next) {
            Err(Errno::NOENT) => resolved = next,
            Err(error) => return Err(error.into()),
            Ok(found) if is_link(&found)? => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = readlinkat(&found, "", Vec::new())?;
                let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                let mut path = components(target);
                path.append(&mut left);
                left = path;
            }
            Ok(_) => resolved = next,
        }
    }
    Ok(resolved)
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|component| *component != Component::CurDir)
        .map(|component| component.as_os_str().to_owned())
        .collect()
}

fn is_link(fd: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::Symlink)
}

/// Opens the directory `path`, which contains no links, and creates missing components.
fn make_directories(root: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let mut fd = find(root, Path::new(""))?;
    let mut prefix = PathBuf::new();
    for component in path.components() {
        prefix.push(component);
        fd = match find(root, &prefix) {
            Err(Errno::NOENT) => {
                mkdirat(&fd, component.as_os_str(), Mode::from_raw_mode(0o755))?;
                find(root, &prefix)?
            }
            other => other?,
        };
    }
    if FileType::from_raw_mode(fstat(&fd)?.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR.into());
    }
    Ok(fd)
}

/// Removes the entry `name`, recursively if it is a directory.
fn remove(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => {
            std::fs::remove_dir_all(Path::new(&descriptor_path(parent)).join(name))
        }
        Err(error) => Err(error.into()),
    }
}

fn make_file(parent: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::from_raw_mode(0o644))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Creates a root directory for a test.
    fn root(build: impl FnOnce(&Path)) -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        build(directory.path());
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = rustix::fs::open(directory.path(), flags, Mode::empty()).unwrap();
        (directory, fd)
    }

    fn target(root: &OwnedFd) -> io::Result<PathBuf> {
        let parent = directory(root, Path::new("etc"))?;
        let found = at_the_end(root, &parent, OsStr::new("x"))?;
        fs::read_link(descriptor_path(&found.fd))
    }

    #[test]
    fn links_lead_to_regular_files_inside_the_root() {
        for link in [
            "/usr/lib/x",
            "../usr/lib/x",
            "../../../../usr/lib/./x",
            "/l/x",
        ] {
            let (directory, fd) = root(|path| {
                fs::create_dir_all(path.join("etc")).unwrap();
                fs::create_dir_all(path.join("usr/lib")).unwrap();
                fs::write(path.join("usr/lib/x"), "").unwrap();
                symlink("/usr/lib", path.join("l")).unwrap();
                symlink(link, path.join("etc/x")).unwrap();
            });
            let expected = directory.path().join("usr/lib/x");
            assert_eq!(target(&fd).unwrap(), expected, "{link}");
        }
    }

    #[test]
    fn the_target_of_a_dangling_link_is_made_in_the_root() {
        let link = "/run/systemd/resolve/stub-resolv.conf";
        let (directory, fd) = root(|path| {
            fs::create_dir(path.join("usr")).unwrap();
            symlink("usr", path.join("etc")).unwrap();
            symlink(link, path.join("usr/x")).unwrap();
        });
        let expected = directory.path().join(&link[1..]);
        assert_eq!(target(&fd).unwrap(), expected);
        assert!(expected.is_file());
        assert!(!Path::new(link).exists(), "not outside");
    }

    #[test]
    fn a_missing_or_dangling_parent_is_created() {
        let (directory, fd) = root(|path| symlink("/usr/etc", path.join("etc")).unwrap());
        assert_eq!(target(&fd).unwrap(), directory.path().join("usr/etc/x"));
        let (directory, fd) = root(|_| {});
        assert_eq!(target(&fd).unwrap(), directory.path().join("etc/x"));
    }

    #[test]
    fn a_file_in_place_of_the_parent_is_an_error() {
        let (_directory, fd) = root(|path| fs::write(path.join("etc"), "").unwrap());
        assert!(is_nowhere(&target(&fd).unwrap_err()));
        let (_directory, fd) = root(|path| symlink("etc", path.join("etc")).unwrap());
        assert!(is_nowhere(&target(&fd).unwrap_err()));
    }

    #[test]
    fn other_files_are_replaced() {
        type Build = fn(&Path);
        let builds: [Build; 5] = [
            |x| fs::create_dir_all(x.join("deep/er")).unwrap(),
            |x| rustix::fs::mkfifoat(rustix::fs::CWD, x, Mode::RWXU).unwrap(),
            |x| symlink("x", x).unwrap(),
            |x| symlink("/usr", x).unwrap(),
            |x| symlink("/usr/file/below", x).unwrap(),
        ];
        for (number, build) in builds.iter().enumerate() {
            let (directory, fd) = root(|path| {
                fs::create_dir(path.join("etc")).unwrap();
                fs::create_dir(path.join("usr")).unwrap();
                fs::write(path.join("usr/file"), "kept").unwrap();
                build(&path.join("etc/x"));
            });
            assert!(target(&fd).is_err(), "{number}");
            let parent = super::directory(&fd, Path::new("etc")).unwrap();
            remove(&parent.fd, OsStr::new("x")).unwrap();
            make_file(&parent.fd, OsStr::new("x")).unwrap();
            let file = fs::symlink_metadata(directory.path().join("etc/x")).unwrap();
            assert!(file.is_file(), "{number}");
            let kept = fs::read_to_string(directory.path().join("usr/file")).unwrap();
            assert_eq!(kept, "kept");
        }
    }
}
