//! Entries of directories: finding, creating, removing, renaming them.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, openat};
use rustix::io::Errno;

use super::attributes::validity;
use super::files::SAFE;
use super::{Answer, Server};
use crate::abi::{self, EntryOut, flag, linux};
use crate::config::CacheMode;
use crate::directories::Directory;
use crate::inode::{Inode, synthetic};
use crate::names::Name;
use crate::nodes::NodeIndex;
use crate::request::Caller;

/// Renaming flags that guests may use: all but the creation of a whiteout device.
const RENAME_FLAGS: RenameFlags = RenameFlags::NOREPLACE.union(RenameFlags::EXCHANGE);

impl Server {
    /// Returns the directory `parent` for a change of its entries.
    ///
    /// # Errors
    /// `EROFS`; `EPERM` in directories that exist only here.
    fn changeable(&mut self, parent: NodeIndex) -> Result<Arc<Directory>, Errno> {
        if parent == NodeIndex::ROOT {
            return Err(Errno::PERM);
        }
        self.writable_share(parent)?;
        if self.is_synthetic(parent) {
            return Err(Errno::PERM);
        }
        self.directory(parent)
    }

    /// Returns the entry of a node whose attributes are known.
    fn entry_out(&self, node: NodeIndex, inode: &Inode) -> Result<EntryOut, Errno> {
        let share = self.share_of(node)?;
        let mut attr = share.attributes(inode, self.user);
        if inode.is_mount() && inode.is_directory() {
            self.mark_submount(&mut attr);
        }
        let valid = validity(share.options);
        Ok(EntryOut {
            nodeid: self.nodes.id(node),
            generation: 0,
            entry_valid: if self.nodes.is_crowded() { 0 } else { valid },
            attr_valid: valid,
            entry_valid_nsec: 0,
            attr_valid_nsec: 0,
            attr,
        })
    }

    /// Examines an entry of a directory, and counts a reference of the guest.
    ///
    /// # Errors
    /// The operating system's error; `ENFILE` if the guest knows too many inodes.
    pub(super) fn find_entry(
        &mut self,
        parent: NodeIndex,
        directory: &Directory,
        name: &CStr,
    ) -> Result<EntryOut, Errno> {
        let share = self.share_of(parent)?;
        let inode = share.entry(directory, name)?;
        if share.file.is_some() && self.nodes.is_pinned(parent) && !inode.is_regular() {
            // The file that was shared has been replaced.
            return Err(Errno::NOENT);
        }
        let node = self.nodes.seen(parent, name.to_bytes(), inode.identity())?;
        if self.watching.is_some() && inode.is_directory() {
            self.watch_entry(node, parent, name, directory);
        }
        self.entry_out(node, &inode)
    }

    pub(super) fn lookup(&mut self, parent: NodeIndex, name: Name<'_>) -> Result<Answer, Errno> {
        if parent == NodeIndex::ROOT {
            return self.lookup_share(name);
        }
        let share = self.share_of(parent)?;
        let negative = share.options.cache == CacheMode::Exclusive;
        if self.nodes.is_pinned(parent)
            && let Some(file) = &share.file
            && file.as_bytes() != name.bytes()
        {
            return Err(Errno::NOENT);
        }
        let directory = self.directory(parent)?;
        match self.find_entry(parent, &directory, name.as_c_str()) {
            Ok(entry) => Ok(self.put(entry)),
            // Nobody else creates it, so its absence is valid as long as its attributes are.
            Err(Errno::NOENT) if negative => Ok(self.put(EntryOut {
                entry_valid: 86_400,
                ..EntryOut::default()
            })),
            Err(errno) => Err(errno),
        }
    }

    fn lookup_share(&mut self, name: Name<'_>) -> Result<Answer, Errno> {
        let mut shares = (0..).zip(&self.shares);
        let found = shares.find(|(_, share)| share.name.as_bytes() == name.bytes());
        let (index, _) = found.ok_or(Errno::NOENT)?;
        let node = NodeIndex::of_share(index);
        let (mut attr, valid) = self.attributes(node)?;
        self.mark_submount(&mut attr);
        self.watch_share(index);
        let nodeid = self.nodes.id(node);
        Ok(self.put(EntryOut {
            nodeid,
            generation: 0,
            entry_valid: 86_400,
            attr_valid: valid,
            entry_valid_nsec: 0,
            attr_valid_nsec: 0,
            attr,
        }))
    }

    pub(super) fn readlink(&mut self, node: NodeIndex) -> Result<Answer, Errno> {
        if self.nodes.get(node)?.identity.kind != linux::S_IFLNK {
            return Err(Errno::INVAL);
        }
        let (directory, name) = self.place(node)?;
        let target = rustix::fs::readlinkat(&*directory, &*name, Vec::new());
        let target = target.map_err(|errno| match errno {
            Errno::NOENT | Errno::INVAL => Errno::STALE,
            other => other,
        })?;
        self.reply.extend_from_slice(target.as_bytes());
        Ok(Answer::Reply)
    }

    pub(super) fn symlink(
        &mut self,
        parent: NodeIndex,
        caller: Caller,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Answer, Errno> {
        let directory = self.changeable(parent)?;
        self.check_room()?;
        rustix::fs::symlinkat(target, &*directory, name.as_c_str())?;
        self.adopt(parent, name.as_c_str(), None, caller)?;
        let entry = self.find_entry(parent, &directory, name.as_c_str())?;
        Ok(self.put(entry))
    }

    pub(super) fn mknod(
        &mut self,
        parent: NodeIndex,
        caller: Caller,
        name: Name<'_>,
        mode: u32,
    ) -> Result<Answer, Errno> {
        let directory = self.changeable(parent)?;
        self.check_room()?;
        let permissions = Mode::from_raw_mode(mode & 0o7777);
        match mode & linux::S_IFMT {
            linux::S_IFREG | 0 => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | SAFE;
                let file = self.with_descriptors(|_| {
                    openat(&*directory, name.as_c_str(), flags, permissions)
                })?;
                self.adopt(parent, name.as_c_str(), Some(&file), caller)?;
            }
            linux::S_IFIFO => {
                let fifo = FileType::Fifo;
                rustix::fs::mknodat(&*directory, name.as_c_str(), fifo, permissions, 0)?;
                self.adopt(parent, name.as_c_str(), None, caller)?;
            }
            // Devices would be those of the host, and sockets have no peer there.
            _ => return Err(Errno::PERM),
        }
        let entry = self.find_entry(parent, &directory, name.as_c_str())?;
        Ok(self.put(entry))
    }

    pub(super) fn mkdir(
        &mut self,
        parent: NodeIndex,
        caller: Caller,
        name: Name<'_>,
        mode: u32,
    ) -> Result<Answer, Errno> {
        let directory = self.changeable(parent)?;
        self.check_room()?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::mkdirat(&*directory, name.as_c_str(), mode)?;
        self.adopt(parent, name.as_c_str(), None, caller)?;
        let entry = self.find_entry(parent, &directory, name.as_c_str())?;
        Ok(self.put(entry))
    }

    /// Creates a file and opens it. One that the host has created meanwhile is opened like
    /// any other: its type is not known yet.
    pub(super) fn create(
        &mut self,
        parent: NodeIndex,
        caller: Caller,
        name: Name<'_>,
        args: &abi::CreateIn,
    ) -> Result<Answer, Errno> {
        let directory = self.changeable(parent)?;
        self.check_room()?;
        if !self.handles.has_room() {
            return Err(Errno::NFILE);
        }
        let writes = args.flags & linux::O_ACCMODE != linux::O_RDONLY;
        let flags = self.host_flags(args.flags) | OFlags::CREATE | OFlags::EXCL | SAFE;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        let name = name.as_c_str();
        let created = self.with_descriptors(|_| openat(&*directory, name, flags, mode));
        let file: Option<OwnedFd> = match created {
            Ok(file) => {
                self.adopt(parent, name, Some(&file), caller)?;
                Some(file)
            }
            Err(Errno::EXIST) if args.flags & linux::O_EXCL == 0 => None,
            Err(errno) => return Err(errno),
        };
        let entry = self.find_entry(parent, &directory, name)?;
        let node = self.nodes.find(entry.nodeid)?;
        let opened = self.open_created(node, file, args, writes);
        match opened {
            Ok(out) => {
                self.put(entry);
                Ok(self.put(out))
            }
            Err(errno) => {
                // The guest does not learn of the node.
                self.forget(entry.nodeid, 1);
                Err(errno)
            }
        }
    }

    fn open_created(
        &mut self,
        node: NodeIndex,
        file: Option<OwnedFd>,
        args: &abi::CreateIn,
        writes: bool,
    ) -> Result<abi::OpenOut, Errno> {
        let file = match file {
            Some(file) if Inode::of(&file)?.identity() == self.nodes.get(node)?.identity => file,
            // Another file has replaced the new one.
            Some(_) => return Err(Errno::STALE),
            None => {
                let file = self.open_file(node, self.host_flags(args.flags))?;
                if args.flags & linux::O_TRUNC != 0 && writes {
                    rustix::fs::ftruncate(&file, 0)?;
                }
                if args.open_flags & flag::OPEN_KILL_SUIDGID != 0 && self.user == 0 {
                    crate::job::clear_ids(&file)?;
                }
                file
            }
        };
        self.add_file(node, file, writes)
    }

    pub(super) fn remove(
        &mut self,
        parent: NodeIndex,
        name: Name<'_>,
        directory: bool,
    ) -> Result<Answer, Errno> {
        let from = self.changeable(parent)?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        rustix::fs::unlinkat(&*from, name.as_c_str(), flags)?;
        Ok(Answer::Empty)
    }

    pub(super) fn rename(
        &mut self,
        (parent, name): (NodeIndex, Name<'_>),
        (new_parent, new_name): (NodeIndex, Name<'_>),
        flags: u32,
    ) -> Result<Answer, Errno> {
        let flags = RenameFlags::from_bits_retain(flags);
        if !RENAME_FLAGS.contains(flags) {
            return Err(Errno::INVAL);
        }
        let from = self.changeable(parent)?;
        let to = self.changeable(new_parent)?;
        if self.nodes.get(parent)?.share != self.nodes.get(new_parent)?.share {
            return Err(Errno::XDEV);
        }
        if self.share_of(parent)?.overrides {
            Self::carry_mark(&from, &to);
        }
        let (name, new_name) = (name.as_c_str(), new_name.as_c_str());
        if flags.is_empty() {
            rustix::fs::renameat(&*from, name, &*to, new_name)?;
        } else {
            rustix::fs::renameat_with(&*from, name, &*to, new_name, flags)?;
        }
        // The places of the nodes; if the host has been faster, the next LOOKUP finds them.
        self.moved(new_parent, &to, new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.moved(parent, &from, name);
        }
        Ok(Answer::Empty)
    }

    /// Records that what is `name` in `parent` now was elsewhere.
    fn moved(&mut self, parent: NodeIndex, directory: &Directory, name: &CStr) {
        if let Ok(inode) = Inode::at(directory, name)
            && let Some(node) = self.nodes.moved(parent, name.to_bytes(), inode.identity())
            && inode.is_directory()
        {
            self.watch_entry(node, parent, name, directory);
        }
    }

    pub(super) fn link(
        &mut self,
        node: NodeIndex,
        new_parent: NodeIndex,
        new_name: Name<'_>,
    ) -> Result<Answer, Errno> {
        let to = self.changeable(new_parent)?;
        if self.is_synthetic(node) || self.nodes.is_pinned(node) {
            return Err(Errno::PERM);
        }
        if self.nodes.get(node)?.share != self.nodes.get(new_parent)?.share {
            return Err(Errno::XDEV);
        }
        let known = self.nodes.get(node)?.identity;
        let (from, name) = self.place(node)?;
        let gone = |errno| match errno {
            Errno::NOENT => Errno::STALE,
            other => other,
        };
        if Inode::at(&*from, &name).map_err(gone)?.identity() != known {
            return Err(Errno::STALE);
        }
        let flags = AtFlags::empty();
        rustix::fs::linkat(&*from, &*name, &*to, new_name.as_c_str(), flags)?;
        if self.share_of(node)?.overrides {
            Self::carry_mark(&from, &to);
        }
        let entry = self.find_entry(new_parent, &to, new_name.as_c_str())?;
        Ok(self.put(entry))
    }

    /// Checks that a new inode can be recorded, before it is created.
    fn check_room(&self) -> Result<(), Errno> {
        if self.nodes.has_room() {
            Ok(())
        } else {
            Err(Errno::NFILE)
        }
    }

    /// Returns the entry for a directory that exists only here, in a listing.
    pub(super) fn synthetic_attr() -> abi::Attr {
        synthetic(2)
    }
}
