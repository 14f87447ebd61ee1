//! Which directories are watched, and which changes are the guest's own.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::Server;
use crate::abi::{SetattrIn, fattr};
use crate::directories::Directory;
use crate::nodes::NodeIndex;
use crate::request::Operation;
use crate::watches::{TOUCH, WatchedShare, Watches};

/// Time in nanoseconds in which a job that was begun writes its contents; longer ones end with
/// a FLUSH.
const JOB: i128 = 20_000_000;

/// The watches of a server, and the guest's changes.
#[derive(Debug)]
pub(super) struct Watching {
    watches: Arc<Watches>,
    /// Times of the guest's last changes of nodes, in nanoseconds since 1970.
    own: HashMap<u64, i128>,
}

impl Watching {
    pub(super) fn new(watches: Arc<Watches>) -> Self {
        Self {
            watches,
            own: HashMap::new(),
        }
    }
}

/// A change that a request of the guest makes.
pub(super) struct OwnChange {
    /// A further node that it changes.
    other: Option<u64>,
    /// The reply begins with the number of the node that it creates.
    creates: bool,
    /// A job makes it after the request.
    is_job: bool,
}

/// Returns true for a request of [`TOUCH`].
pub(super) fn is_touch(args: &SetattrIn) -> bool {
    let time = (args.mtime.cast_signed(), args.mtimensec);
    args.valid & (fattr::MTIME | fattr::MTIME_NOW) == fattr::MTIME && time == TOUCH
}

fn now() -> i128 {
    let now = clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

impl Server {
    /// Returns the change that an operation makes, if changes are noted.
    pub(super) fn own_change(&self, operation: &Operation<'_>) -> Option<OwnChange> {
        self.watching.as_ref()?;
        let mut change = OwnChange {
            other: None,
            creates: false,
            is_job: false,
        };
        match operation {
            Operation::Setattr(args) if is_touch(args) => return None,
            Operation::Setattr(_)
            | Operation::Unlink { .. }
            | Operation::Rmdir { .. }
            | Operation::Flush { .. }
            | Operation::Setxattr { .. }
            | Operation::Removexattr { .. } => {}
            Operation::Rename { new_parent, .. } => change.other = Some(*new_parent),
            Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Link { .. }
            | Operation::Create { .. } => change.creates = true,
            Operation::Write(_) | Operation::Fallocate(_) => change.is_job = true,
            Operation::CopyFileRange(args) => {
                change.other = Some(args.nodeid_out);
                change.is_job = true;
            }
            _ => return None,
        }
        Some(change)
    }

    /// Notes a change of the guest to node number `id`.
    pub(super) fn note_own(&mut self, id: u64, change: &OwnChange) {
        let created = self.reply.first_chunk().filter(|_| change.creates);
        let created = created.map(|bytes| u64::from_le_bytes(*bytes));
        let until = now() + if change.is_job { JOB } else { 0 };
        for id in [Some(id), change.other, created].into_iter().flatten() {
            let watched = self.nodes.find(id).and_then(|node| self.share_of(node));
            if watched.is_ok_and(|share| share.options.watch)
                && let Some(watching) = &mut self.watching
            {
                watching.own.insert(id, until);
            }
        }
    }

    /// Checks that the host has changed a node after the guest.
    ///
    /// # Errors
    /// `ECANCELED` if it has not.
    pub(super) fn check_touch(&mut self, node: NodeIndex) -> Result<(), Errno> {
        if self.is_synthetic(node) {
            return Ok(());
        }
        let changed = self.inode(node)?.changed();
        let id = self.nodes.id(node);
        let own = self
            .watching
            .as_ref()
            .and_then(|watching| watching.own.get(&id));
        match own {
            Some(own) if changed <= *own => Err(Errno::CANCELED),
            _ => Ok(()),
        }
    }

    /// Watches a directory that the guest has found.
    pub(super) fn watch_entry(
        &self,
        node: NodeIndex,
        parent: NodeIndex,
        name: &CStr,
        directory: &Directory,
    ) {
        if let Some(watching) = &self.watching
            && let Ok(known) = self.nodes.get(node)
            && self.share_of(node).is_ok_and(|share| share.options.watch)
        {
            let place = Some((self.nodes.id(parent), name));
            let found = (directory.as_fd(), name);
            let node = (self.nodes.id(node), known.share);
            watching.watches.watch(node, place, found);
        }
    }

    /// Watches the root of a share.
    pub(super) fn watch_share(&self, index: u16) {
        let share = self.shares.get(usize::from(index));
        if let Some(watching) = &self.watching
            && let Some(share) = share.filter(|share| share.options.watch)
        {
            let node = (self.nodes.id(NodeIndex::of_share(index)), index);
            watching
                .watches
                .watch(node, None, (share.directory.as_fd(), c"."));
        }
    }

    /// Forgets everything before a session.
    pub(super) fn begin_watching(&mut self) {
        if let Some(watching) = &mut self.watching {
            watching.own.clear();
            let shares = self.shares.iter().map(|share| WatchedShare {
                name: share.name.as_bytes().to_vec(),
                file: share.file.as_ref().map(|file| file.as_bytes().to_vec()),
            });
            watching.watches.begin(shares.collect());
        }
    }

    /// Watches the directories of a restored session, which the guest may not look up again.
    pub(super) fn watch_known(&mut self) {
        if self.watching.is_none() {
            return;
        }
        for index in (0..).take(self.shares.len()) {
            self.watch_share(index);
        }
        for node in self.nodes.directories() {
            let watched = self.share_of(node).is_ok_and(|share| share.options.watch);
            // One that is not there is found when the guest uses it.
            if watched && let Ok(directory) = self.directory(node) {
                self.watch_again(node, &directory);
            }
        }
    }

    fn watch_again(&self, node: NodeIndex, directory: &Directory) {
        if let Some(watching) = &self.watching
            && let Ok(known) = self.nodes.get(node)
            && let Some(parent) = known.parent
        {
            let place = Some((self.nodes.id(parent), known.name()));
            let id = (self.nodes.id(node), known.share);
            watching.watches.watch(id, place, (directory.as_fd(), c"."));
        }
    }

    /// Forgets a node that the guest does not know any more, and directories above it that
    /// went with it.
    pub(super) fn unwatch(&mut self, id: u64, parent: Option<u64>) {
        let Some(watching) = &mut self.watching else {
            return;
        };
        watching.own.remove(&id);
        watching.watches.forget(id);
        let mut above = parent;
        while let Some(id) = above.filter(|id| self.nodes.find(*id).is_err()) {
            watching.own.remove(&id);
            above = watching.watches.forget(id);
        }
    }
}
