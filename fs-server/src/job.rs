//! Operations on open files, which may take long and can be performed on any thread.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, Mode};
use rustix::io::Errno;

use crate::abi::{OUT_HEADER_LEN, WriteOut, linux};
use crate::buffers::{Buffers, WritePosition};
use crate::inode::Inode;
use crate::reply;
use crate::request::CONTENTS_AT;

/// Bytes that are moved without the delay that another thread would notice.
const SHORT: usize = 64 << 10;

/// The part of a request that moves contents or waits for a disk. It holds its file open,
/// and needs nothing of its server.
#[derive(Debug)]
pub struct Job {
    pub(crate) unique: u64,
    pub(crate) task: Task,
}

/// Operation of a job.
#[derive(Debug)]
pub(crate) enum Task {
    Read {
        file: Arc<OwnedFd>,
        position: u64,
        len: usize,
    },
    Write {
        file: Arc<OwnedFd>,
        position: WritePosition,
        len: usize,
        /// Clear set-user-ID and set-group-ID bits.
        kill: bool,
    },
    Sync {
        files: Vec<Arc<OwnedFd>>,
        kind: SyncKind,
    },
    Allocate {
        file: Arc<OwnedFd>,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    },
    Copy {
        from: Arc<OwnedFd>,
        from_offset: u64,
        to: Arc<OwnedFd>,
        to_offset: u64,
        len: usize,
    },
}

/// Extent of a synchronisation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SyncKind {
    Data,
    File,
    FileSystem,
}

impl Job {
    /// Returns true if the job may take longer than waking another thread: more than 64 KiB
    /// to read or write, or work of a disk.
    #[must_use]
    pub fn is_long(&self) -> bool {
        match &self.task {
            Task::Read { len, .. } | Task::Write { len, .. } => *len > SHORT,
            _ => true,
        }
    }

    /// Performs the job and writes the reply; returns its length in bytes, which is 0 if
    /// there is no space for it. `buffers` are those of the request.
    pub fn run(self, buffers: &mut impl Buffers) -> usize {
        let unique = self.unique;
        match self.task {
            Task::Read {
                file,
                position,
                len,
            } => {
                let space = buffers.reply_capacity().saturating_sub(OUT_HEADER_LEN);
                let read =
                    buffers.read_file(file.as_fd(), position, OUT_HEADER_LEN, len.min(space));
                reply::contents(buffers, unique, read.map_err(errno))
            }
            Task::Write {
                file,
                position,
                len,
                kill,
            } => {
                let written = if kill { clear_ids(&file) } else { Ok(()) }
                    .and_then(|()| {
                        buffers
                            .write_file(file.as_fd(), position, CONTENTS_AT, len)
                            .map_err(errno)
                    })
                    .map(count);
                reply::structure(buffers, unique, written)
            }
            Task::Sync { files, kind } => {
                let synced = files.iter().try_for_each(|file| match kind {
                    SyncKind::Data => rustix::fs::fdatasync(file),
                    SyncKind::File => rustix::fs::fsync(file),
                    SyncKind::FileSystem => rustix::fs::syncfs(file),
                });
                reply::empty(buffers, unique, synced)
            }
            Task::Allocate {
                file,
                mode,
                offset,
                len,
            } => {
                let allocated = rustix::fs::fallocate(&file, mode, offset, len);
                reply::empty(buffers, unique, allocated)
            }
            Task::Copy {
                from,
                from_offset,
                to,
                to_offset,
                len,
            } => {
                let (mut from_offset, mut to_offset) = (from_offset, to_offset);
                let (off_in, off_out) = (Some(&mut from_offset), Some(&mut to_offset));
                let copied = rustix::fs::copy_file_range(&from, off_in, &to, off_out, len);
                reply::structure(buffers, unique, copied.map(count))
            }
        }
    }
}

fn count(bytes: usize) -> WriteOut {
    WriteOut {
        // Requests of more than 4 GiB do not exist.
        size: u32::try_from(bytes).unwrap_or(u32::MAX),
        padding: 0,
    }
}

/// Returns the number of an error of [`Buffers`].
fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Clears the set-user-ID bit, and the set-group-ID bit of a file that its group may execute,
/// as Linux does for writes of ordinary users.
pub(crate) fn clear_ids(file: &OwnedFd) -> Result<(), Errno> {
    let inode = Inode::of(file)?;
    let mode = inode.mode();
    let kept = without_ids(mode);
    if kept != mode && inode.is_regular() {
        rustix::fs::fchmod(file, Mode::from_raw_mode(kept & 0o7777))?;
    }
    Ok(())
}

/// Returns `mode` without the bits that a change of contents or owner clears.
pub(crate) fn without_ids(mode: u32) -> u32 {
    let mut mode = mode & !linux::S_ISUID;
    if mode & linux::S_IXGRP != 0 {
        mode &= !linux::S_ISGID;
    }
    mode
}

impl Task {
    pub(crate) fn into_job(self, unique: u64) -> Job {
        Job { unique, task: self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_clear_the_bits_of_ordinary_users() {
        assert_eq!(without_ids(0o6755), 0o0755);
        assert_eq!(without_ids(0o6745), 0o2745);
        assert_eq!(without_ids(0o1644), 0o1644);
    }
}
