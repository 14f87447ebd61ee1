//! Regular files: opening them, and operations on open ones.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, openat};
use rustix::io::Errno;

use super::{Answer, Server};
use crate::abi::{self, flag, linux};
use crate::buffers::WritePosition;
use crate::config::CacheMode;
use crate::handles::Handle;
use crate::inode::Inode;
use crate::job::{SyncKind, Task, clear_ids};
use crate::nodes::NodeIndex;

/// Flags of every open(2) of an entry: nothing waits for another process, becomes the
/// terminal of this one, or leads elsewhere.
pub(super) const SAFE: OFlags = OFlags::NOFOLLOW
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

/// Maximum number of bytes that one COPY_FILE_RANGE copies, so that a pause of the machine
/// does not wait long; the driver repeats it.
const MAX_COPY: u64 = 64 << 20;

impl Server {
    /// Returns the flags of open(2) on the host for those of the guest. Truncation and
    /// creation are operations of their own, positions are part of each write, and caches
    /// of the host are always used.
    pub(super) fn host_flags(&self, flags: u32) -> OFlags {
        let writeback = self.session.is_some_and(|session| session.has_writeback());
        let mut host = match flags & linux::O_ACCMODE {
            linux::O_RDONLY => OFlags::RDONLY,
            // The guest completes pages that it writes in part.
            linux::O_WRONLY if !writeback => OFlags::WRONLY,
            _ => OFlags::RDWR,
        };
        if flags & linux::O_SYNC == linux::O_SYNC {
            host |= OFlags::SYNC;
        } else if flags & linux::O_DSYNC != 0 {
            host |= OFlags::DSYNC;
        }
        host
    }

    /// Opens a regular file at its last place. Its type is known before it is opened, and
    /// compared afterwards.
    ///
    /// # Errors
    /// `ESTALE` if another inode is there; `EACCES` for files of other types.
    pub(super) fn open_file(&mut self, node: NodeIndex, access: OFlags) -> Result<OwnedFd, Errno> {
        let known = self.nodes.get(node)?.identity;
        if known.kind == linux::S_IFDIR {
            return Err(Errno::ISDIR);
        }
        if known.kind != linux::S_IFREG {
            return Err(Errno::ACCESS);
        }
        let (directory, name) = self.place(node)?;
        let gone = |errno| match errno {
            Errno::NOENT | Errno::LOOP | Errno::NXIO => Errno::STALE,
            other => other,
        };
        let before = Inode::at(&*directory, &name).map_err(gone)?;
        if before.identity() != known {
            return Err(Errno::STALE);
        }
        if before.is_mount() && !self.share_of(node)?.options.submounts {
            return Err(Errno::XDEV);
        }
        let file = self
            .with_descriptors(|_| openat(&*directory, &*name, access | SAFE, Mode::empty()))
            .map_err(gone)?;
        if Inode::of(&file)?.identity() != known {
            return Err(Errno::STALE);
        }
        Ok(file)
    }

    /// Adds a handle of a file; returns the reply of OPEN.
    pub(super) fn add_file(
        &mut self,
        node: NodeIndex,
        file: OwnedFd,
        writable: bool,
    ) -> Result<abi::OpenOut, Errno> {
        let cache = self.share_of(node)?.options.cache;
        let handle = Handle::File {
            file: Arc::new(file),
            writable,
        };
        let fh = self.handles.insert(self.nodes.id(node), handle)?;
        let mut open_flags = 0;
        if cache == CacheMode::Exclusive {
            open_flags |= flag::FOPEN_KEEP_CACHE;
        }
        if !writable {
            // There is nothing that could fail when it is closed.
            open_flags |= flag::FOPEN_NOFLUSH;
        }
        Ok(abi::OpenOut {
            fh,
            open_flags,
            padding: 0,
        })
    }

    pub(super) fn open(&mut self, node: NodeIndex, args: &abi::OpenIn) -> Result<Answer, Errno> {
        if self.is_synthetic(node) {
            return Err(Errno::ISDIR);
        }
        let writes = args.flags & linux::O_ACCMODE != linux::O_RDONLY;
        if writes || args.flags & linux::O_TRUNC != 0 {
            self.writable_share(node)?;
        }
        if !self.handles.has_room() {
            return Err(Errno::NFILE);
        }
        let access = self.host_flags(args.flags);
        let file = match self.open_file(node, access) {
            // Not readable, although the guest only writes.
            Err(Errno::ACCESS) if args.flags & linux::O_ACCMODE == linux::O_WRONLY => {
                self.open_file(node, access & !OFlags::RWMODE | OFlags::WRONLY)?
            }
            file => file?,
        };
        if args.open_flags & flag::OPEN_KILL_SUIDGID != 0 && self.user == 0 {
            clear_ids(&file)?;
        }
        let out = self.add_file(node, file, writes)?;
        Ok(self.put(out))
    }

    pub(super) fn read(&self, node: u64, args: &abi::ReadIn) -> Result<Answer, Errno> {
        Ok(Answer::Task(Task::Read {
            file: Arc::clone(self.handles.file(args.fh, node)?),
            position: args.offset,
            len: usize::try_from(args.size).map_err(|_| Errno::INVAL)?,
        }))
    }

    pub(super) fn write(&self, node: u64, args: &abi::WriteIn) -> Result<Answer, Errno> {
        let file = Arc::clone(self.handles.writable(args.fh, node)?);
        // The end of the file is that of the host, which may have moved it. Writes from the
        // page cache have positions, and the flags of any file.
        let cached = args.write_flags & flag::WRITE_CACHE != 0;
        let append = args.flags & linux::O_APPEND != 0 && !cached;
        let writeback = self.session.is_some_and(|session| session.has_writeback());
        Ok(Answer::Task(Task::Write {
            file,
            position: if append && !writeback {
                WritePosition::End
            } else {
                WritePosition::At(args.offset)
            },
            len: usize::try_from(args.size).map_err(|_| Errno::INVAL)?,
            // Linux does it for other users.
            kill: self.user == 0 && args.write_flags & flag::WRITE_KILL_SUIDGID != 0,
        }))
    }

    /// Closes a duplicate of the file: file systems of networks then write its contents,
    /// which other hosts see.
    pub(super) fn flush(&self, node: u64, handle: u64) -> Result<Answer, Errno> {
        let file = self.handles.file(handle, node)?;
        drop(rustix::io::fcntl_dupfd_cloexec(file, 0)?);
        Ok(Answer::Empty)
    }

    pub(super) fn fsync(&self, node: u64, handle: u64, data_only: bool) -> Result<Answer, Errno> {
        let file = Arc::clone(self.handles.file(handle, node)?);
        Ok(Answer::Task(sync(vec![file], data_only)))
    }

    pub(super) fn fsyncdir(
        &self,
        node: u64,
        handle: u64,
        data_only: bool,
    ) -> Result<Answer, Errno> {
        match self.handles.get(handle, node)? {
            Handle::Directory(Some(directory)) => Ok(Answer::Task(sync(
                vec![Arc::clone(&directory.fd)],
                data_only,
            ))),
            Handle::Directory(None) => Ok(Answer::Empty),
            Handle::File { .. } => Err(Errno::BADF),
            Handle::Lost => Err(Errno::IO),
        }
    }

    pub(super) fn syncfs(&self, node: NodeIndex) -> Result<Answer, Errno> {
        let all = node == NodeIndex::ROOT;
        let of_node = self.nodes.get(node)?.share;
        let shares = (0..)
            .zip(&self.shares)
            .filter(|(index, share)| !share.options.read_only && (all || *index == of_node));
        let files = shares
            .map(|(_, share)| Arc::clone(&share.directory.fd))
            .collect();
        Ok(Answer::Task(Task::Sync {
            files,
            kind: SyncKind::FileSystem,
        }))
    }

    pub(super) fn fallocate(&self, node: u64, args: &abi::FallocateIn) -> Result<Answer, Errno> {
        let mode = FallocateFlags::from_bits_truncate(args.mode);
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if mode.bits() != args.mode || !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(Answer::Task(Task::Allocate {
            file: Arc::clone(self.handles.writable(args.fh, node)?),
            mode,
            offset: args.offset,
            len: args.length,
        }))
    }

    pub(super) fn lseek(&mut self, node: u64, args: &abi::LseekIn) -> Result<Answer, Errno> {
        if self.session.is_some_and(|session| session.has_writeback()) {
            // The guest has data that this file lacks: its kernel then takes everything for
            // data.
            return Err(Errno::NOSYS);
        }
        // Other kinds are those of the guest's kernel.
        let position = match args.whence {
            3 => SeekFrom::Data(args.offset),
            4 => SeekFrom::Hole(args.offset),
            _ => return Err(Errno::INVAL),
        };
        let file = self.handles.file(args.fh, node)?;
        let offset = rustix::fs::seek(file, position)?;
        Ok(self.put(abi::LseekOut { offset }))
    }

    pub(super) fn copy_file_range(
        &self,
        node: u64,
        args: &abi::CopyFileRangeIn,
    ) -> Result<Answer, Errno> {
        if args.flags != 0 {
            return Err(Errno::INVAL);
        }
        let len = usize::try_from(args.len.min(MAX_COPY)).map_err(|_| Errno::INVAL)?;
        Ok(Answer::Task(Task::Copy {
            from: Arc::clone(self.handles.file(args.fh_in, node)?),
            from_offset: args.off_in,
            to: Arc::clone(self.handles.writable(args.fh_out, args.nodeid_out)?),
            to_offset: args.off_out,
            len,
        }))
    }

    pub(super) fn statfs(&mut self, node: NodeIndex) -> Result<Answer, Errno> {
        let mut reply = abi::StatfsOut {
            bsize: 4096,
            frsize: 4096,
            namelen: 255,
            ..abi::StatfsOut::default()
        };
        if node != NodeIndex::ROOT {
            let directory = if self.nodes.get(node)?.identity.kind == linux::S_IFDIR {
                self.directory(node)?
            } else {
                Arc::clone(&self.share_of(node)?.directory)
            };
            let stat = rustix::fs::fstatvfs(&*directory)?;
            reply.blocks = stat.f_blocks;
            reply.bfree = stat.f_bfree;
            reply.bavail = stat.f_bavail;
            reply.files = stat.f_files;
            reply.ffree = stat.f_ffree;
            reply.bsize = u32::try_from(stat.f_bsize).unwrap_or(4096);
            reply.frsize = u32::try_from(stat.f_frsize).unwrap_or(4096);
        }
        Ok(self.put(reply))
    }
}

fn sync(files: Vec<Arc<OwnedFd>>, data_only: bool) -> Task {
    Task::Sync {
        files,
        kind: if data_only {
            SyncKind::Data
        } else {
            SyncKind::File
        },
    }
}
