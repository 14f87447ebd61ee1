//! Differences between a container's root and its image.
//!
//! The differences are those of the overlay's upper directory, in which a file is a copy or
//! a replacement, and a deletion a device 0:0 (Linux, filesystems/overlayfs.rst,
//! "whiteouts and opaque directories"). Directories that do not continue one of the image
//! (new, opaque or renamed ones) are compared as the overlay shows them, so that redirects
//! are followed by the kernel.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fgetxattr, openat, statat};
use rustix::io::Errno;
use sm_guest_proto::files::ChangeKind;

/// Paths of files and directories that the agent creates in every root, which are no
/// differences.
const OWN: [&[u8]; 8] = [
    b"dev",
    b"proc",
    b"sys",
    b"etc/hostname",
    b"etc/hosts",
    b"etc/machine-id",
    b"etc/resolv.conf",
    b"run/sm-epoch",
];

/// Directories that the agent creates for its files where the image has none.
const PARENTS: [&[u8]; 2] = [b"etc", b"run"];

/// Extended attribute of an upper directory that hides that of the image.
const OPAQUE: &str = "trusted.overlay.opaque";
/// Extended attribute of an upper directory that continues another one of the image.
const REDIRECT: &str = "trusted.overlay.redirect";

/// Returns true if `path`, relative to the root, is a file of the agent.
pub(super) fn is_own(path: &[u8]) -> bool {
    OWN.contains(&path)
}

/// Receives the differences, in the order of a walk: a directory before its files, files by
/// name. Paths are relative to the root.
pub(super) trait Differences {
    /// A directory that continues one of the image. It is a difference if its attributes
    /// differ, or if a file in it is one.
    fn enter(&mut self, path: &Path, differs: bool) -> io::Result<()>;
    /// The end of the last directory that was entered.
    fn leave(&mut self) -> io::Result<()>;
    /// A file that is not a directory.
    fn file(&mut self, path: &Path, kind: ChangeKind) -> io::Result<()>;
    /// A file or directory of the image that the root does not have.
    fn deleted(&mut self, path: &Path) -> io::Result<()>;
    /// A directory that does not continue one of the image, with all files in it.
    /// `replaces` tells whether the image has a directory at this path.
    fn subtree(&mut self, path: &Path, kind: ChangeKind, replaces: bool) -> io::Result<()>;
}

/// The trees that are compared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trees<'a> {
    /// The overlay's upper directory.
    pub(super) upper: BorrowedFd<'a>,
    /// The image.
    pub(super) lower: BorrowedFd<'a>,
    /// The overlay, without the file systems that are mounted in it.
    pub(super) merged: BorrowedFd<'a>,
}

impl Trees<'_> {
    /// Finds the differences.
    pub(super) fn compare(&self, found: &mut impl Differences) -> io::Result<()> {
        self.directory(Path::new(""), found)
    }

    fn directory(&self, path: &Path, found: &mut impl Differences) -> io::Result<()> {
        for name in names(self.upper, path)? {
            let path = path.join(name);
            if is_own(path.as_os_str().as_bytes()) {
                continue;
            }
            let Some(upper) = stat(self.upper, &path)? else {
                continue;
            };
            let lower = stat(self.lower, &path)?;
            let kind = match lower {
                Some(_) => ChangeKind::Changed,
                None => ChangeKind::Added,
            };
            if is_whiteout(&upper) {
                if lower.is_some() {
                    found.deleted(&path)?;
                }
            } else if is_directory(&upper) {
                let replaces = lower.as_ref().is_some_and(is_directory);
                match lower {
                    Some(lower) if replaces && continues(self.upper, &path)? => {
                        found.enter(&path, attributes_differ(&upper, &lower))?;
                        self.directory(&path, found)?;
                        found.leave()?;
                    }
                    // It is a difference if there are other files in it.
                    None if PARENTS.contains(&path.as_os_str().as_bytes())
                        && !is_renamed(self.upper, &path)? =>
                    {
                        found.enter(&path, false)?;
                        self.directory(&path, found)?;
                        found.leave()?;
                    }
                    _ => found.subtree(&path, kind, replaces)?,
                }
            } else if lower.is_none_or(|lower| differs(&upper, &lower)) {
                found.file(&path, kind)?;
            }
        }
        Ok(())
    }

    /// Compares all files below a directory that does not continue one of the image, one by
    /// one with the image's files at the same paths.
    pub(super) fn compare_subtree(
        &self,
        path: &Path,
        found: &mut dyn FnMut(&Path, ChangeKind) -> io::Result<()>,
    ) -> io::Result<()> {
        let shown = names(self.merged, path)?;
        let mut missing = match stat(self.lower, path)? {
            Some(lower) if is_directory(&lower) => names(self.lower, path)?,
            _ => Vec::new(),
        };
        missing.retain(|name| shown.binary_search(name).is_err());
        for name in shown {
            let path = path.join(name);
            if is_own(path.as_os_str().as_bytes()) {
                continue;
            }
            let Some(merged) = stat(self.merged, &path)? else {
                continue;
            };
            match stat(self.lower, &path)? {
                None => found(&path, ChangeKind::Added)?,
                Some(lower) if differs(&merged, &lower) => found(&path, ChangeKind::Changed)?,
                Some(_) => {}
            }
            if is_directory(&merged) {
                self.compare_subtree(&path, found)?;
            }
        }
        for name in missing {
            found(&path.join(name), ChangeKind::Deleted)?;
        }
        Ok(())
    }
}

/// Returns the names in a directory, sorted; none if it has disappeared.
fn names(tree: BorrowedFd<'_>, path: &Path) -> io::Result<Vec<OsString>> {
    let directory = match open_directory(tree, path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
        directory => directory?,
    };
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn open_directory(tree: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(tree, at(path), flags, Mode::empty())
}

fn stat(tree: BorrowedFd<'_>, path: &Path) -> io::Result<Option<Stat>> {
    match statat(tree, at(path), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns a path that is not empty.
fn at(path: &Path) -> PathBuf {
    Path::new(".").join(path)
}

fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Returns true if an upper directory continues that of the image.
fn continues(upper: BorrowedFd<'_>, path: &Path) -> io::Result<bool> {
    let directory = open_directory(upper, path)?;
    Ok(!has(&directory, OPAQUE)? && !has(&directory, REDIRECT)?)
}

/// Returns true if an upper directory continues another one of the image.
fn is_renamed(upper: BorrowedFd<'_>, path: &Path) -> io::Result<bool> {
    has(&open_directory(upper, path)?, REDIRECT)
}

fn has(directory: &OwnedFd, name: &str) -> io::Result<bool> {
    match fgetxattr(directory.as_fd(), name, &mut [0; 0][..]) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        // The value is longer than the buffer, or of unknown length.
        Ok(_) | Err(Errno::RANGE) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

fn attributes_differ(one: &Stat, other: &Stat) -> bool {
    let attributes = |stat: &Stat| (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev);
    attributes(one) != attributes(other)
}

/// Returns true if two files are not the same, by the attributes that Docker compares. The
/// time and size of a directory do not count.
fn differs(one: &Stat, other: &Stat) -> bool {
    let contents = |stat: &Stat| (stat.st_mtime, stat.st_mtime_nsec, stat.st_size);
    attributes_differ(one, other) || (!is_directory(one) && contents(one) != contents(other))
}

#[cfg(test)]
mod tests;
