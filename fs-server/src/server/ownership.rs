//! Owners of files: chown(2), and new files.

use std::ffi::CStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, XattrFlags};
use rustix::io::Errno;

use super::Server;
use super::files::SAFE;
use crate::abi::linux;
use crate::config::{ChownPolicy, ShareOwner};
use crate::directories::Directory;
use crate::inode::{Ids, Inode, OVERRIDES, OWNER, owner_text};
use crate::job::without_ids;
use crate::nodes::NodeIndex;
use crate::request::Caller;

impl Server {
    /// Returns true if owners of the guest are those of the host.
    fn changes_owners(&self, node: NodeIndex) -> Result<bool, Errno> {
        Ok(self.share_of(node)?.options.owner == ShareOwner::Keep && self.user == 0)
    }

    pub(super) fn chown(
        &mut self,
        node: NodeIndex,
        inode: &Inode,
        handle: Option<&Arc<OwnedFd>>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(), Errno> {
        if self.changes_owners(node)? {
            return self.chown_on_host(node, inode, handle, uid, gid);
        }
        let options = self.share_of(node)?.options;
        let now = inode.owner(options.owner, self.user);
        let wanted = Ids {
            uid: uid.unwrap_or(now.uid),
            gid: gid.unwrap_or(now.gid),
        };
        match options.chown {
            ChownPolicy::Ignore => return Ok(()),
            _ if wanted == now && inode.is_link() => return Ok(()),
            ChownPolicy::Deny if wanted == now => return Ok(()),
            ChownPolicy::Deny => return Err(Errno::PERM),
            ChownPolicy::Override => {}
        }
        if inode.is_link() {
            // Links have no attributes of users. Their owner has no effect.
            return Ok(());
        }
        if self.user != 0 && inode.host_owner().uid != self.user {
            return Err(Errno::PERM);
        }
        let file = self.for_attributes(node, inode, handle)?;
        if wanted == inode.natural_owner(options.owner, self.user) {
            if inode.stored.is_some() {
                rustix::fs::fremovexattr(&file, OWNER)?;
            }
        } else {
            self.mark_parent(node)?;
            store_owner(&file, inode.mode(), wanted)?;
        }
        let kept = without_ids(inode.mode());
        if inode.is_regular() && kept != inode.mode() {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(kept & 0o7777))?;
        }
        Ok(())
    }

    fn chown_on_host(
        &mut self,
        node: NodeIndex,
        inode: &Inode,
        handle: Option<&Arc<OwnedFd>>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(), Errno> {
        // Numbers of all ones mean "no change" to chown(2).
        if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
            return Err(Errno::INVAL);
        }
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        let open = handle
            .cloned()
            .or_else(|| self.handles.any_of(self.nodes.id(node), false));
        if let Some(file) = open {
            return rustix::fs::fchown(&file, uid, gid);
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        if inode.is_directory() {
            let directory = self.directory(node)?;
            return rustix::fs::chownat(&*directory, c".", uid, gid, flags);
        }
        let (directory, name) = self.place(node)?;
        rustix::fs::chownat(&*directory, name.as_c_str(), uid, gid, flags)
    }

    /// Notes in the directory of a node that owners are stored at its entries.
    fn mark_parent(&mut self, node: NodeIndex) -> Result<(), Errno> {
        if self.nodes.is_pinned(node) {
            // The root of a share is always searched for a stored owner.
            return Ok(());
        }
        match self.nodes.get(node)?.parent {
            Some(parent) => {
                let directory = self.directory(parent)?;
                mark(&directory)
            }
            None => Ok(()),
        }
    }

    /// Gives a new entry of `parent` to the user of the guest that created it.
    ///
    /// # Errors
    /// The operating system's error; the entry then belongs to the user of the server.
    pub(super) fn adopt(
        &mut self,
        parent: NodeIndex,
        name: &CStr,
        file: Option<&OwnedFd>,
        caller: Caller,
    ) -> Result<(), Errno> {
        let owner = self.share_of(parent)?.options.owner;
        let wanted = Ids {
            uid: caller.uid,
            gid: caller.gid,
        };
        let on_host = self.changes_owners(parent)?;
        let natural = match owner {
            ShareOwner::Squash { uid, gid } => Some(Ids { uid, gid }),
            ShareOwner::Fixed { .. } => None,
            ShareOwner::Keep => {
                let gid = rustix::process::getegid().as_raw();
                Some(Ids {
                    uid: self.user,
                    gid,
                })
            }
        };
        if natural.is_none_or(|natural| natural == wanted) {
            return Ok(());
        }
        let directory = self.directory(parent)?;
        if on_host {
            // The group of a directory with the set-group-ID bit is that of its entries.
            let inherits = Inode::of(&*directory)?.mode() & linux::S_ISGID != 0;
            let uid = Some(Uid::from_raw(wanted.uid));
            let gid = (!inherits).then(|| Gid::from_raw(wanted.gid));
            return match file {
                Some(file) => rustix::fs::fchown(file, uid, gid),
                None => {
                    let flags = AtFlags::SYMLINK_NOFOLLOW;
                    rustix::fs::chownat(&*directory, name, uid, gid, flags)
                }
            };
        }
        if !self.share_of(parent)?.overrides {
            return Ok(());
        }
        let opened;
        let file = match file {
            Some(file) => file,
            None => {
                let inode = Inode::at(&*directory, name)?;
                if !inode.is_regular() && !inode.is_directory() {
                    return Ok(());
                }
                let flags = OFlags::RDONLY | SAFE;
                opened = rustix::fs::openat(&*directory, name, flags, Mode::empty())?;
                &opened
            }
        };
        mark(&directory)?;
        store_owner(file, Inode::of(file)?.mode(), wanted)
    }

    /// Notes that the entries of `to` may have stored owners if those of `from` may.
    pub(super) fn carry_mark(from: &Directory, to: &Directory) {
        if from.has_overrides() {
            // Without the mark, the entry appears with its owner on the host.
            let _ = mark(to);
        }
    }
}

/// Notes that owners are stored at entries of a directory.
fn mark(directory: &Directory) -> Result<(), Errno> {
    if !directory.has_overrides() {
        rustix::fs::fsetxattr(directory.as_fd(), OVERRIDES, b"1", XattrFlags::empty())
            .map_err(refused)?;
        directory.set_overrides();
    }
    Ok(())
}

/// Stores the owner that the guest sees at a file of this user.
fn store_owner(file: &OwnedFd, mode: u32, owner: Ids) -> Result<(), Errno> {
    let text = owner_text(owner, mode);
    let store = || rustix::fs::fsetxattr(file.as_fd(), OWNER, text.as_bytes(), XattrFlags::empty());
    match store() {
        // Attributes of users need the permission to write.
        Err(Errno::ACCESS) => {
            rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o7777 | 0o200))?;
            let stored = store();
            rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o7777))?;
            stored
        }
        result => result,
    }
    .map_err(refused)
}

/// A file system without attributes of users refuses chown(2) as it is refused to users.
fn refused(errno: Errno) -> Errno {
    match errno {
        Errno::OPNOTSUPP | Errno::ACCESS | Errno::BADF => Errno::PERM,
        other => other,
    }
}
