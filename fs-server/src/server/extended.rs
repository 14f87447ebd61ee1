//! Extended attributes: those of users, and no others.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;

use super::{Answer, Server};
use crate::abi::GetxattrOut;
use crate::inode::{OVERRIDES, OWNER};
use crate::nodes::NodeIndex;

/// Maximum length of a value or a list in bytes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_LEN: usize = 64 << 10;

/// Returns true if guests may use an attribute.
fn is_allowed(name: &CStr) -> bool {
    name.to_bytes().starts_with(b"user.") && name != OWNER && name != OVERRIDES
}

impl Server {
    /// Returns a descriptor for the attributes of a node.
    ///
    /// # Errors
    /// `EPERM` for types other than regular files and directories, which have none.
    fn with_extended(&mut self, node: NodeIndex) -> Result<Arc<OwnedFd>, Errno> {
        if self.is_synthetic(node) {
            return Err(Errno::PERM);
        }
        if self.nodes.is_pinned(node) {
            return Ok(Arc::clone(&self.share_of(node)?.directory.fd));
        }
        let kind = self.nodes.get(node)?.identity.kind;
        if kind == crate::abi::linux::S_IFDIR {
            return Ok(Arc::clone(&self.directory(node)?.fd));
        }
        if kind != crate::abi::linux::S_IFREG {
            return Err(Errno::PERM);
        }
        if let Some(file) = self.handles.any_of(self.nodes.id(node), false) {
            return Ok(file);
        }
        self.open_file(node, OFlags::RDONLY).map(Arc::new)
    }

    pub(super) fn setxattr(
        &mut self,
        node: NodeIndex,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<Answer, Errno> {
        if !self.is_synthetic(node) {
            self.writable_share(node)?;
        }
        check_change(name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let file = self.with_extended(node)?;
        fsetxattr(&file, name, value, flags)?;
        Ok(Answer::Empty)
    }

    pub(super) fn removexattr(&mut self, node: NodeIndex, name: &CStr) -> Result<Answer, Errno> {
        if !self.is_synthetic(node) {
            self.writable_share(node)?;
        }
        check_change(name)?;
        let file = self.with_extended(node)?;
        fremovexattr(&file, name)?;
        Ok(Answer::Empty)
    }

    pub(super) fn getxattr(
        &mut self,
        node: NodeIndex,
        name: &CStr,
        size: u32,
    ) -> Result<Answer, Errno> {
        if name.to_bytes().starts_with(b"system.") {
            // Access control lists: none, as the mode says everything.
            return Err(Errno::OPNOTSUPP);
        }
        if !is_allowed(name) {
            return Err(Errno::NODATA);
        }
        let file = match self.with_extended(node) {
            Err(Errno::PERM) => return Err(Errno::NODATA),
            file => file?,
        };
        let mut value = Vec::with_capacity(MAX_LEN);
        fgetxattr(&file, name, rustix::buffer::spare_capacity(&mut value)).map_err(unreadable)?;
        self.sized(&value, size)
    }

    pub(super) fn listxattr(&mut self, node: NodeIndex, size: u32) -> Result<Answer, Errno> {
        let mut names = Vec::new();
        match self.with_extended(node) {
            Ok(file) => {
                let mut all = Vec::with_capacity(MAX_LEN);
                match flistxattr(&file, rustix::buffer::spare_capacity(&mut all)) {
                    // File systems without attributes have an empty list.
                    Ok(_) | Err(Errno::OPNOTSUPP) => {}
                    Err(errno) => return Err(unreadable(errno)),
                }
                for name in all.split_inclusive(|byte| *byte == 0) {
                    if CStr::from_bytes_with_nul(name).is_ok_and(is_allowed) {
                        names.extend_from_slice(name);
                    }
                }
            }
            Err(Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
        self.sized(&names, size)
    }

    /// Replies with `bytes`, or with their number if `size` is 0.
    fn sized(&mut self, bytes: &[u8], size: u32) -> Result<Answer, Errno> {
        let len = u32::try_from(bytes.len()).map_err(|_| Errno::TOOBIG)?;
        if size == 0 {
            return Ok(self.put(GetxattrOut {
                size: len,
                padding: 0,
            }));
        }
        if len > size {
            return Err(Errno::RANGE);
        }
        self.reply.extend_from_slice(bytes);
        Ok(Answer::Reply)
    }
}

/// Checks that guests may change an attribute. File capabilities, labels and lists of access
/// control would have an effect on the host.
fn check_change(name: &CStr) -> Result<(), Errno> {
    if is_allowed(name) {
        Ok(())
    } else if name.to_bytes().starts_with(b"system.") {
        Err(Errno::OPNOTSUPP)
    } else {
        Err(Errno::PERM)
    }
}

/// A descriptor that can only be searched has no attributes for the guest.
fn unreadable(errno: Errno) -> Errno {
    match errno {
        Errno::BADF => Errno::NODATA,
        other => other,
    }
}
