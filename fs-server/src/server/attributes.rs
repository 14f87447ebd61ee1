//! Attributes of inodes: GETATTR, SETATTR, ACCESS.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use super::watching::is_touch;
use super::{Answer, Server, SharedDirectory};
use crate::abi::{Attr, AttrOut, SetattrIn, fattr, flag};
use crate::config::{CacheMode, ShareOptions};
use crate::directories::Directory;
use crate::inode::{Inode, stored_owner, synthetic};
use crate::job::clear_ids;
use crate::nodes::NodeIndex;

/// `W_OK` of access(2).
const WRITE_ACCESS: u32 = 2;

/// Returns the validity of names and attributes in seconds.
pub(super) fn validity(options: ShareOptions) -> u64 {
    match options.cache {
        CacheMode::Auto => 1,
        CacheMode::Exclusive => 86_400,
    }
}

impl SharedDirectory {
    /// Examines an entry of `directory`.
    ///
    /// # Errors
    /// The operating system's error; `EXDEV` for the root of another file system, if it is
    /// not part of the share.
    pub(super) fn entry(
        &self,
        directory: &Directory,
        name: &std::ffi::CStr,
    ) -> Result<Inode, Errno> {
        let mut inode = Inode::at(directory, name)?;
        if inode.is_mount() && !self.options.submounts {
            return Err(Errno::XDEV);
        }
        let storable = inode.is_regular() || inode.is_directory();
        if self.overrides && storable && directory.has_overrides() {
            let flags = OFlags::RDONLY | super::files::SAFE;
            // A file that cannot be read keeps its owner.
            if let Ok(file) = rustix::fs::openat(directory, name, flags, Mode::empty()) {
                inode.stored = stored_owner(std::os::fd::AsFd::as_fd(&file));
            }
        }
        Ok(inode)
    }

    /// Examines an open file or directory.
    ///
    /// # Errors
    /// The operating system's error.
    pub(super) fn opened(&self, file: &OwnedFd) -> Result<Inode, Errno> {
        let mut inode = Inode::of(file)?;
        if self.overrides {
            inode.stored = stored_owner(std::os::fd::AsFd::as_fd(file));
        }
        Ok(inode)
    }

    /// Returns the attributes of an inode as the guest sees them.
    pub(super) fn attributes(&self, inode: &Inode, user: u32) -> Attr {
        inode.attributes(inode.owner(self.options.owner, user))
    }
}

impl Server {
    /// Examines a node: by a descriptor of it, if one is open, else at its last place.
    ///
    /// # Errors
    /// `ESTALE` if another inode is there.
    pub(super) fn inode(&mut self, node: NodeIndex) -> Result<Inode, Errno> {
        let id = self.nodes.id(node);
        let open = if self.nodes.is_pinned(node) {
            Some(Arc::clone(&self.share_of(node)?.directory.fd))
        } else if let Some(file) = self.handles.any_of(id, false) {
            Some(file)
        } else {
            self.directories
                .get(id)
                .map(|directory| Arc::clone(&directory.fd))
        };
        if let Some(file) = open {
            return self.share_of(node)?.opened(&file);
        }
        let (directory, name) = self.place(node)?;
        let inode = match self.share_of(node)?.entry(&directory, &name) {
            Err(Errno::NOENT) => return Err(Errno::STALE),
            inode => inode?,
        };
        if inode.identity() != self.nodes.get(node)?.identity {
            return Err(Errno::STALE);
        }
        Ok(inode)
    }

    /// Returns the attributes of a node, and their validity in seconds.
    pub(super) fn attributes(&mut self, node: NodeIndex) -> Result<(Attr, u64), Errno> {
        if self.is_synthetic(node) {
            // Directories that exist only here are numbered below the inodes of any disk.
            let ino = if node == NodeIndex::ROOT { 1 } else { 2 };
            return Ok((synthetic(ino), 86_400));
        }
        let inode = self.inode(node)?;
        let share = self.share_of(node)?;
        let attributes = share.attributes(&inode, self.user);
        Ok((attributes, validity(share.options)))
    }

    fn put_attributes(&mut self, attr: Attr, attr_valid: u64) -> Answer {
        self.put(AttrOut {
            attr_valid,
            attr_valid_nsec: 0,
            dummy: 0,
            attr,
        })
    }

    pub(super) fn getattr(
        &mut self,
        node: NodeIndex,
        handle: Option<u64>,
    ) -> Result<Answer, Errno> {
        if let Some(handle) = handle
            && !self.is_synthetic(node)
        {
            let file = Arc::clone(self.handles.file(handle, self.nodes.id(node))?);
            let share = self.share_of(node)?;
            let inode = share.opened(&file)?;
            let (attr, valid) = (share.attributes(&inode, self.user), validity(share.options));
            return Ok(self.put_attributes(attr, valid));
        }
        let (attr, valid) = self.attributes(node)?;
        Ok(self.put_attributes(attr, valid))
    }

    pub(super) fn access(&mut self, node: NodeIndex, mask: u32) -> Result<Answer, Errno> {
        // The guest's kernel compares owner and mode itself.
        if mask & WRITE_ACCESS != 0 && !self.is_synthetic(node) {
            self.writable_share(node)?;
        }
        self.attributes(node)?;
        Ok(Answer::Empty)
    }

    pub(super) fn setattr(&mut self, node: NodeIndex, args: &SetattrIn) -> Result<Answer, Errno> {
        if is_touch(args) && self.share_of(node)?.options.watch {
            self.check_touch(node)?;
            let (attr, valid) = self.attributes(node)?;
            return Ok(self.put_attributes(attr, valid));
        }
        if self.is_synthetic(node) {
            return Err(Errno::PERM);
        }
        self.writable_share(node)?;
        let inode = self.inode(node)?;
        let handle = if args.valid & fattr::FH != 0 {
            let handles = &self.handles;
            Some(Arc::clone(handles.file(args.fh, self.nodes.id(node))?))
        } else {
            None
        };
        if args.valid & (fattr::UID | fattr::GID) != 0 {
            let uid = (args.valid & fattr::UID != 0).then_some(args.uid);
            let gid = (args.valid & fattr::GID != 0).then_some(args.gid);
            self.chown(node, &inode, handle.as_ref(), uid, gid)?;
        }
        if args.valid & fattr::MODE != 0 {
            self.chmod(node, &inode, handle.as_ref(), args.mode)?;
        }
        if args.valid & fattr::SIZE != 0 {
            let kill = args.valid & fattr::KILL_SUIDGID != 0;
            self.truncate(node, &inode, args, kill)?;
        }
        if args.valid & (fattr::ATIME | fattr::MTIME) != 0 {
            self.set_times(node, &inode, handle.as_ref(), args)?;
        }
        let (attr, valid) = self.attributes(node)?;
        Ok(self.put_attributes(attr, valid))
    }

    /// Returns a descriptor by which attributes of a regular file or directory can be
    /// changed, whose permissions may allow neither reading nor writing.
    ///
    /// # Errors
    /// `EACCES` in that case; `EPERM` for other types.
    pub(super) fn for_attributes(
        &mut self,
        node: NodeIndex,
        inode: &Inode,
        handle: Option<&Arc<OwnedFd>>,
    ) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(handle) = handle {
            return Ok(Arc::clone(handle));
        }
        if inode.is_directory() {
            let directory = self.directory(node)?;
            return Ok(Arc::clone(&directory.fd));
        }
        if !inode.is_regular() {
            return Err(Errno::PERM);
        }
        if let Some(file) = self.handles.any_of(self.nodes.id(node), false) {
            return Ok(file);
        }
        match self.open_file(node, OFlags::RDONLY) {
            Err(Errno::ACCESS) => self.open_file(node, OFlags::WRONLY).map(Arc::new),
            file => file.map(Arc::new),
        }
    }

    fn chmod(
        &mut self,
        node: NodeIndex,
        inode: &Inode,
        handle: Option<&Arc<OwnedFd>>,
        mode: u32,
    ) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let by_descriptor = match self.for_attributes(node, inode, handle) {
            Ok(file) => rustix::fs::fchmod(&file, mode),
            Err(errno) => Err(errno),
        };
        match by_descriptor {
            // Neither readable nor writable: through the name of its descriptor, which
            // needs a /proc.
            Err(Errno::ACCESS | Errno::BADF) => {
                let file = if inode.is_directory() {
                    Arc::clone(&self.directory(node)?.fd)
                } else {
                    Arc::new(self.open_file(node, OFlags::PATH)?)
                };
                let number = std::os::fd::AsRawFd::as_raw_fd(&file);
                let path = format!("/proc/self/fd/{number}");
                let changed = rustix::fs::chmodat(rustix::fs::CWD, path, mode, AtFlags::empty());
                changed.map_err(|errno| match errno {
                    Errno::NOENT => Errno::ACCESS,
                    other => other,
                })
            }
            result => result,
        }
    }

    fn truncate(
        &mut self,
        node: NodeIndex,
        inode: &Inode,
        args: &SetattrIn,
        kill: bool,
    ) -> Result<(), Errno> {
        if !inode.is_regular() {
            return Err(Errno::INVAL);
        }
        let id = self.nodes.id(node);
        let file = if args.valid & fattr::FH != 0 {
            Arc::clone(self.handles.writable(args.fh, id)?)
        } else {
            // Permissions count, which an open file may not have any more.
            match self.open_file(node, OFlags::WRONLY) {
                Ok(file) => Arc::new(file),
                Err(errno) => self.handles.any_of(id, true).ok_or(errno)?,
            }
        };
        if kill && self.user == 0 {
            clear_ids(&file)?;
        }
        rustix::fs::ftruncate(&file, args.size)
    }

    fn set_times(
        &mut self,
        node: NodeIndex,
        inode: &Inode,
        handle: Option<&Arc<OwnedFd>>,
        args: &SetattrIn,
    ) -> Result<(), Errno> {
        let time = |set: u32, now: u32, seconds: u64, nanoseconds: u32| {
            if args.valid & set == 0 {
                (0, UTIME_OMIT)
            } else if args.valid & now != 0 {
                (0, UTIME_NOW)
            } else {
                (seconds.cast_signed(), i64::from(nanoseconds))
            }
        };
        let (atime, atimensec) = time(fattr::ATIME, fattr::ATIME_NOW, args.atime, args.atimensec);
        let (mtime, mtimensec) = time(fattr::MTIME, fattr::MTIME_NOW, args.mtime, args.mtimensec);
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: atime,
                tv_nsec: atimensec,
            },
            last_modification: Timespec {
                tv_sec: mtime,
                tv_nsec: mtimensec,
            },
        };
        let open = handle
            .cloned()
            .or_else(|| self.handles.any_of(self.nodes.id(node), false));
        if let Some(file) = open {
            return rustix::fs::futimens(&file, &times);
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        if inode.is_directory() {
            let directory = self.directory(node)?;
            return rustix::fs::utimensat(&*directory, c".", &times, flags);
        }
        let (directory, name) = self.place(node)?;
        rustix::fs::utimensat(&*directory, name.as_c_str(), &times, flags)
    }

    /// Sets the flag by which the guest mounts a file system of its own.
    pub(super) fn mark_submount(&self, attr: &mut Attr) {
        if self.session.is_some_and(|session| session.has_submounts()) {
            attr.flags |= flag::ATTR_SUBMOUNT;
        }
    }
}
