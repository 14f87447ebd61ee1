//! Device nodes that the agent holds open.
//!
//! devtmpfs is one instance for the whole guest: when root in the workload removes or
//! creates a file in its `/dev`, the agent's `/dev` changes too. A FIFO in place of
//! `/dev/kmsg` would block PID 1 forever. Nodes are therefore opened with O_PATH before
//! any workload runs, and opened through that descriptor later.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};

/// A character device, independent of later changes of its path.
#[derive(Debug)]
pub(crate) struct Node(OwnedFd);

impl Node {
    /// Finds the character device at `path`.
    ///
    /// # Errors
    /// The path does not exist or is not a character device.
    pub(crate) fn find(path: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&fd)?.st_mode) != FileType::CharacterDevice {
            return Err(io::Error::other(format!(
                "{path} is not a character device"
            )));
        }
        Ok(Self(fd))
    }

    /// Opens the device with a new open file description.
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
