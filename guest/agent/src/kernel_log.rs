//! Detection of a new VM generation ID in the kernel log.
//!
//! Linux has no other notification for user space: the driver passes the ID to the random
//! number generator, which reseeds and logs one line (`drivers/char/random.c`,
//! `add_vmfork_randomness`). Records of the kernel cannot be forged, because records that
//! user space writes to `/dev/kmsg` never have facility 0.

use std::fs::OpenOptions;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::io::Errno;

use crate::reactor::{Class, Interest, Reactor, Token, Watched};

const RESEEDED: &[u8] = b"crng reseeded due to virtual machine fork";

/// Size of the longest record that a version of Linux returns (`CONSOLE_EXT_LOG_MAX`). A
/// read with less space fails, and skips the record.
const MAX_RECORD: usize = 8192;

/// A reader of the kernel log that starts at its end.
#[derive(Debug)]
pub(crate) struct KernelLog {
    watched: Watched,
}

impl KernelLog {
    pub(crate) fn open() -> io::Result<Self> {
        let mut log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self::new(log.into()))
    }

    /// Creates a reader of a non-blocking file that returns one record per read.
    pub(crate) fn new(log: OwnedFd) -> Self {
        Self {
            watched: Watched::new(log),
        }
    }

    /// Starts or stops reporting new records as events. While it is on, every logged line
    /// wakes the agent.
    pub(crate) fn watch(&mut self, reactor: &Reactor, on: bool) -> io::Result<()> {
        let want = match on {
            true => Interest::READ,
            false => Interest::NONE,
        };
        let token = Token::single(Class::KernelLog, 0);
        self.watched.set(reactor, token, want)
    }

    /// Reads records logged since the last call. Returns true if one of them reports a
    /// new VM generation ID.
    ///
    /// # Errors
    /// The log cannot be read, and remains ready.
    pub(crate) fn vm_fork_seen(&mut self) -> io::Result<bool> {
        let mut record = [0; MAX_RECORD];
        let mut seen = false;
        loop {
            match rustix::io::read(&self.watched, &mut record) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(seen),
                Ok(count) => seen |= is_vm_fork(record.get(..count).unwrap_or_default()),
                // EPIPE: records were overwritten before they were read; the next read
                // continues with the oldest remaining one.
                Err(Errno::PIPE | Errno::INTR) => {}
                Err(_) if seen => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Returns true if a record (`priority,sequence,time,flags;text`) is the kernel's message
/// about a new generation ID.
fn is_vm_fork(record: &[u8]) -> bool {
    let mut parts = record.splitn(2, |byte| *byte == b';');
    let (Some(prefix), Some(text)) = (parts.next(), parts.next()) else {
        return false;
    };
    let priority = prefix
        .split(|byte| *byte == b',')
        .next()
        .unwrap_or_default();
    // Facility 0 (the kernel) leaves one digit below 8, the level.
    let by_kernel = matches!(priority, [b'0'..=b'7']);
    by_kernel
        && text
            .windows(RESEEDED.len())
            .any(|window| window == RESEEDED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_record_counts() {
        let text = "random: crng reseeded due to virtual machine fork\n";
        let record = |prefix: &str| is_vm_fork(format!("{prefix};{text}").as_bytes());
        assert!(record("5,1234,99999,-"));
        assert!(!record("13,1234,99999,-"), "written by user space");
        assert!(!record("53,1,1,-"));
        assert!(!is_vm_fork(text.as_bytes()));
        assert!(!is_vm_fork(b"5,1,1,-;random: crng init done\n"));
    }
}
