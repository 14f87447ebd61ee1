//! Saving a session, and restoring it over the same shares.

use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Server;
use super::session::Session;
use crate::handles::Handle;
use crate::inode::Inode;
use crate::nodes::NodeIndex;
use crate::saved::{FsStateError, FsStateV1, HandleStateV1, ShareStateV1};

/// Flags with which a file is opened again.
const REOPENED: OFlags = OFlags::RWMODE.union(OFlags::SYNC).union(OFlags::DSYNC);

impl Server {
    /// Returns the state of the session; `None` before INIT and after DESTROY. No request may
    /// be in execution.
    ///
    /// Files that are open and have no name any more cannot be opened again: after a
    /// restore, the guest gets `EIO` for them.
    #[must_use]
    pub fn save(&self) -> Option<FsStateV1> {
        let session = self.session?;
        let shares = (0..).zip(&self.shares).map(|(index, share)| ShareStateV1 {
            name: share.name.as_bytes().to_vec(),
            device: self
                .nodes
                .get(NodeIndex::of_share(index))
                .map_or(0, |node| node.identity.device),
        });
        let mut handles: Vec<HandleStateV1> = self.pending.clone();
        handles.extend(self.handles.iter().map(|(number, node, handle)| {
            let flags = match handle {
                Handle::File { file, writable } => {
                    let access = if *writable {
                        OFlags::RDWR
                    } else {
                        OFlags::RDONLY
                    };
                    let flags = rustix::fs::fcntl_getfl(file).unwrap_or(access);
                    Some((flags & REOPENED).bits())
                }
                Handle::Lost => Some(OFlags::RDONLY.bits()),
                Handle::Directory(_) => None,
            };
            HandleStateV1 {
                number,
                node,
                flags,
            }
        }));
        handles.sort_by_key(|handle| handle.number);
        handles.dedup_by_key(|handle| handle.number);
        Some(FsStateV1 {
            flags: session.flags(),
            shares: shares.collect(),
            nodes: self.nodes.save(),
            handles,
        })
    }

    /// Returns the number of open files that have no name any more: after a restore, the guest
    /// gets `EIO` for them. No request may be in execution.
    #[must_use]
    pub fn unnamed_files(&self) -> usize {
        let unnamed = |handle: &Handle| match handle {
            Handle::File { file, .. } => {
                rustix::fs::fstat(file).is_ok_and(|stat| stat.st_nlink == 0)
            }
            Handle::Lost | Handle::Directory(_) => false,
        };
        let handles = self.handles.iter();
        handles.filter(|(_, _, handle)| unnamed(handle)).count()
    }

    /// Restores a session over the directories of this server, which has the same shares. It
    /// goes on without another INIT. Files are opened again with the first request.
    ///
    /// # Errors
    /// State of other shares, or malformed state; there is then no session.
    pub fn restore(&mut self, state: &FsStateV1) -> Result<(), FsStateError> {
        self.end_session();
        let restored = self.try_restore(state);
        if restored.is_err() {
            self.end_session();
        }
        restored
    }

    fn try_restore(&mut self, state: &FsStateV1) -> Result<(), FsStateError> {
        self.arrange(&state.shares)?;
        let mut nodes = state.nodes.clone();
        for node in &mut nodes {
            // Numbers of devices change when a host starts again.
            let share = usize::from(node.share);
            if let Some(saved) = state.shares.get(share)
                && saved.device == node.device
                && let Ok(root) = self.nodes.get(NodeIndex::of_share(node.share))
            {
                node.device = root.identity.device;
            }
        }
        self.nodes.restore(&nodes)?;
        self.handles.restore(&state.handles)?;
        self.pending.clone_from(&state.handles);
        self.session = Some(Session::restored(state.flags));
        self.begin_watching();
        self.watch_known();
        Ok(())
    }

    /// Brings the shares into the order that the session's numbers have.
    fn arrange(&mut self, saved: &[ShareStateV1]) -> Result<(), FsStateError> {
        let mut order = Vec::with_capacity(saved.len());
        for share in saved {
            let mut own = self.shares.iter();
            order.extend(own.position(|own| own.name.as_bytes() == share.name));
        }
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if saved.len() != self.shares.len() || !sorted.iter().copied().eq(0..saved.len()) {
            let names = |names: &mut dyn Iterator<Item = &[u8]>| {
                let names: Vec<_> = names
                    .map(|name| String::from_utf8_lossy(name).into_owned())
                    .collect();
                format!("[{}]", names.join(", "))
            };
            return Err(FsStateError::Shares {
                saved: names(&mut saved.iter().map(|share| share.name.as_slice())),
                own: names(&mut self.shares.iter().map(|share| share.name.as_bytes())),
            });
        }
        let mut shares: Vec<_> = std::mem::take(&mut self.shares)
            .into_iter()
            .map(Some)
            .collect();
        // Each position occurs once.
        self.shares = order
            .into_iter()
            .filter_map(|position| shares.get_mut(position).and_then(Option::take))
            .collect();
        for (index, share) in (0..).zip(&self.shares) {
            if let Ok(inode) = Inode::of(&*share.directory) {
                self.nodes.replace_share(index, inode.identity());
            }
        }
        Ok(())
    }

    /// Opens the files of a restored session.
    pub(super) fn open_pending(&mut self) {
        for saved in std::mem::take(&mut self.pending) {
            let handle = self.reopened(&saved).unwrap_or(Handle::Lost);
            self.handles.replace(saved.number, handle);
        }
    }

    fn reopened(&mut self, saved: &HandleStateV1) -> Result<Handle, Errno> {
        let node = self.nodes.find(saved.node)?;
        let Some(flags) = saved.flags else {
            return Ok(Handle::Directory(if self.is_synthetic(node) {
                None
            } else {
                Some(self.directory(node)?)
            }));
        };
        let flags = OFlags::from_bits_retain(flags) & REOPENED;
        let writable = flags & OFlags::RWMODE != OFlags::RDONLY;
        if writable {
            self.writable_share(node)?;
        }
        Ok(Handle::File {
            file: Arc::new(self.open_file(node, flags)?),
            writable,
        })
    }
}
