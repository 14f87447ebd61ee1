//! Device nodes that the agent keeps hold of.
//!
//! devtmpfs is one instance for the whole guest: what root of the workload removes
//! from its `/dev`, or puts there, is so in the agent's `/dev` too. A FIFO in the place
//! of `/dev/kmsg` would block PID 1 for good. Nodes are therefore found before any
//! workload runs, and opened through the descriptor from then on.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};

/// A character device, whatever its name leads to by now.
#[derive(Debug)]
pub(crate) struct Node(OwnedFd);

impl Node {
    /// The character device at `path`.
    ///
    /// # Errors
    /// There is none, or something else.
    pub(crate) fn find(path: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&fd)?.st_mode) != FileType::CharacterDevice {
            return Err(io::Error::other(format!("{path} is no character device")));
        }
        Ok(Self(fd))
    }

    /// Opens the device, with an open file of its own.
    pub(crate) fn open(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        Ok(open(path, flags, Mode::empty())?)
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_character_device_is_a_node() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), Mode::RWXU).unwrap();
        std::os::unix::fs::symlink("/dev/null", path("link")).unwrap();
        std::fs::write(path("file"), "").unwrap();
        for name in ["fifo", "link", "file", "absent"] {
            assert!(Node::find(&path(name)).is_err(), "{name}");
        }
        let null = Node::find("/dev/null").unwrap();
        let opened = null.open(OFlags::RDONLY).unwrap();
        assert_eq!(rustix::io::read(&opened, &mut [0; 8]).unwrap(), 0);
    }
}
