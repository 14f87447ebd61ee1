//! Paths of a container.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2, readlinkat};
use rustix::io::Errno;

/// Flags of a descriptor that identifies a file.
const PLACE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Attempts to resolve a path while other processes rename directories in it.
const ATTEMPTS: u32 = 16;

/// The root of a container, and the agent's `/proc`: that of the container does not show
/// this process.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) root: OwnedFd,
    pub(super) proc: OwnedFd,
}

impl Places {
    /// Opens `path` with `flags`, resolved like by a process of the container.
    fn open_with(&self, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let path = match path {
            b"" => return Err(Errno::NOENT),
            path => OsStr::from_bytes(path),
        };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut attempts = 0;
        loop {
            match openat2(&self.root, path, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::AGAIN | Errno::INTR) if attempts < ATTEMPTS => attempts += 1,
                opened => return opened,
            }
        }
    }

    /// Finds a file, without opening it.
    pub(super) fn find(&self, path: &[u8], follow: bool) -> Result<OwnedFd, Errno> {
        let nofollow = match follow {
            true => OFlags::empty(),
            false => OFlags::NOFOLLOW,
        };
        self.open_with(path, PLACE | nofollow, Mode::empty())
    }

    /// Finds a directory.
    pub(super) fn directory(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        self.open_with(path, PLACE | OFlags::DIRECTORY, Mode::empty())
    }

    /// Opens a file for writing, and creates it if it is missing.
    pub(super) fn create(&self, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY;
        self.open_with(path, flags, mode)
    }

    /// Finds the directory of `path`, and returns the last name of the path.
    pub(super) fn parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p OsStr), Errno> {
        let trimmed = trim(path);
        let (parent, name) = match trimmed.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => trimmed.split_at(slash + 1),
            None => (&b"/"[..], trimmed),
        };
        match name {
            b"" | b"." | b".." => Err(Errno::INVAL),
            name => Ok((self.directory(parent)?, OsStr::from_bytes(name))),
        }
    }

    /// Opens a file that was found.
    pub(super) fn reopen(&self, found: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        openat(&self.proc, own(found), flags, Mode::empty())
    }

    /// Returns the path of a file that was found, without links.
    pub(super) fn path(&self, found: &OwnedFd) -> Result<Vec<u8>, Errno> {
        Ok(readlinkat(&self.proc, own(found), Vec::new())?.into_bytes())
    }
}

/// Returns the path of a descriptor of this process below `/proc`.
fn own(fd: &OwnedFd) -> String {
    format!("self/fd/{}", fd.as_raw_fd())
}

/// Removes slashes at the end.
fn trim(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte != b'/');
    path.get(..end.map_or(0, |end| end + 1)).unwrap_or_default()
}
