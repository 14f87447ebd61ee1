//! The inodes that the guest knows, without a descriptor for any of them.
//!
//! A node is an inode of a share, found by its identity, with the directory and the name by
//! which it was seen last. Names of the host change at any time: a name only leads to a
//! node if the inode there still has the node's identity.
//!
//! Parents form a tree. If the host moves a directory below one of its descendants' former
//! places, the recorded names of two directories could contradict each other; a link that
//! would close a circle shows that an earlier one is outdated, and cuts it.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

use rustix::io::Errno;

mod name;
mod saved;

use self::name::NodeName;

/// Secret numbers of a hash function, so that nobody can choose files whose inodes are in one
/// bucket.
#[derive(Debug)]
struct Secrets([u64; 3]);

impl Secrets {
    fn new() -> Self {
        let state = RandomState::new();
        Self([1u8, 2, 3].map(|number| state.hash_one(number)))
    }

    /// Returns the hash of an inode: products of 128 bits, both halves of which are used.
    fn hash(&self, share: u16, identity: &Identity) -> u32 {
        let [first, second, third] = self.0;
        let Identity {
            device,
            inode,
            born,
            kind,
        } = *identity;
        let hash = folded(inode ^ first, born ^ second);
        let rest = device ^ u64::from(kind) << 16 ^ u64::from(share);
        let hash = folded(hash ^ rest, third);
        u32::try_from(hash >> 32).unwrap_or(0)
    }
}

/// Returns the exclusive or of the halves of a product.
fn folded(a: u64, b: u64) -> u64 {
    let high = (u128::from(a) * u128::from(b)) >> 64;
    a.wrapping_mul(b) ^ u64::try_from(high).unwrap_or(0)
}

/// Identity of an inode of the host. The time of creation distinguishes inodes that had one
/// number after each other, where the file system has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Time of creation in nanoseconds, truncated; 0 if it is unknown.
    pub(crate) born: u64,
    /// File type, as in `mode`.
    pub(crate) kind: u32,
}

/// Position of a node in the table.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) struct NodeIndex(u32);

impl NodeIndex {
    /// The synthetic root of all shares.
    pub(crate) const ROOT: Self = Self(0);

    /// Returns the root of share `share`.
    pub(crate) fn of_share(share: u16) -> Self {
        Self(u32::from(share) + 1)
    }

    fn slot(self) -> usize {
        // `usize` has at least 32 bits on the hosts of this crate.
        self.0 as usize
    }
}

/// No node, as a link in a list.
const NONE: u32 = u32::MAX;

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) share: u16,
    pub(crate) identity: Identity,
    /// Directory in which the node was seen last. `None` if a later observation has shown
    /// that it is not there.
    pub(crate) parent: Option<NodeIndex>,
    /// Name in that directory.
    name: NodeName,
    /// References of the guest, as far as it says so. Saturates.
    lookups: u64,
    /// Number of nodes with this parent.
    children: u32,
    generation: u32,
    /// Hash of share and identity.
    hash: u32,
    /// Next node of the bucket, or of the free list.
    next: u32,
    used: bool,
}

impl Node {
    /// Returns the name in the parent, with its NUL.
    pub(crate) fn name(&self) -> &std::ffi::CStr {
        self.name.as_c_str()
    }
}

/// The table of nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    slots: Vec<Node>,
    /// First node of each bucket; a power of two of them.
    buckets: Vec<u32>,
    free: u32,
    used: usize,
    /// Root and shares, which are never removed.
    pinned: usize,
    max: usize,
    secrets: Secrets,
}

impl Nodes {
    /// Creates a table with the root, and nodes for roots of shares.
    pub(crate) fn new(shares: &[Identity], max: u32) -> Self {
        let root = Identity {
            device: 0,
            inode: 1,
            born: 0,
            kind: crate::abi::linux::S_IFDIR,
        };
        let mut nodes = Self {
            slots: Vec::new(),
            buckets: vec![NONE; 16],
            free: NONE,
            used: 0,
            pinned: shares.len() + 1,
            max: usize::try_from(max.min(1 << 31)).unwrap_or(1 << 31),
            secrets: Secrets::new(),
        };
        // The root and the shares are not found by identity: a share may be inside another.
        nodes.slots.push(Self::pinned(u16::MAX, root));
        for (share, identity) in (0..).zip(shares) {
            nodes.slots.push(Self::pinned(share, *identity));
        }
        nodes
    }

    fn pinned(share: u16, identity: Identity) -> Node {
        Node {
            share,
            identity,
            parent: None,
            name: NodeName::default(),
            lookups: 1,
            children: 0,
            generation: 0,
            hash: 0,
            next: NONE,
            used: true,
        }
    }

    /// Returns the directories beside root and shares.
    pub(crate) fn directories(&self) -> Vec<NodeIndex> {
        let slots = (0..).zip(&self.slots).skip(self.pinned);
        slots
            .filter(|(_, node)| node.used && node.identity.kind == crate::abi::linux::S_IFDIR)
            .map(|(index, _)| NodeIndex(index))
            .collect()
    }

    /// Returns the number of nodes beside root and shares.
    pub(crate) fn len(&self) -> usize {
        self.used
    }

    /// Returns true if `index` is the root or that of a share.
    pub(crate) fn is_pinned(&self, index: NodeIndex) -> bool {
        index.slot() < self.pinned
    }

    /// Returns the number by which the guest knows a node: no other node ever has it.
    pub(crate) fn id(&self, index: NodeIndex) -> u64 {
        let generation = self
            .slots
            .get(index.slot())
            .map_or(0, |node| node.generation);
        u64::from(generation) << 32 | (u64::from(index.0) + crate::abi::ROOT_ID)
    }

    /// Returns the node with a number of the guest.
    ///
    /// # Errors
    /// `ESTALE` if there is none.
    pub(crate) fn find(&self, id: u64) -> Result<NodeIndex, Errno> {
        let low = u32::try_from(id & 0xffff_ffff).map_err(|_| Errno::STALE)?;
        let index = NodeIndex(low.checked_sub(1).ok_or(Errno::STALE)?);
        let node = self.slots.get(index.slot()).filter(|node| node.used);
        match node {
            Some(node) if u64::from(node.generation) == id >> 32 => Ok(index),
            _ => Err(Errno::STALE),
        }
    }

    /// Returns a node of the table. An index is only valid until its node is removed, and a
    /// removed one has an identity that no inode has.
    pub(crate) fn get(&self, index: NodeIndex) -> Result<&Node, Errno> {
        let node = self.slots.get(index.slot()).filter(|node| node.used);
        node.ok_or(Errno::STALE)
    }

    fn bucket(&self, hash: u32) -> usize {
        // `usize` has at least 32 bits on the hosts of this crate.
        hash as usize & (self.buckets.len() - 1)
    }

    fn search(&self, hash: u32, share: u16, identity: &Identity) -> Option<NodeIndex> {
        let mut at = *self.buckets.get(self.bucket(hash))?;
        while let Some(node) = self.slots.get(at as usize) {
            if node.hash == hash && node.share == share && node.identity == *identity {
                return Some(NodeIndex(at));
            }
            at = node.next;
        }
        None
    }

    /// Returns the node of an inode that was seen as `name` in `parent`, and counts a
    /// reference of the guest.
    ///
    /// # Errors
    /// `ENFILE` if the table is full; `ELOOP` for a directory that contains itself.
    pub(crate) fn seen(
        &mut self,
        parent: NodeIndex,
        name: &[u8],
        identity: Identity,
    ) -> Result<NodeIndex, Errno> {
        let share = self.get(parent)?.share;
        let hash = self.secrets.hash(share, &identity);
        let Some(index) = self.search(hash, share, &identity) else {
            return self.insert((hash, share), parent, name, identity);
        };
        if index == parent {
            // A directory that is mounted in itself.
            return Err(Errno::LOOP);
        }
        self.refer(index);
        self.place(index, parent, name);
        Ok(index)
    }

    /// Records the place of an inode, if the guest knows it; returns its node.
    pub(crate) fn moved(
        &mut self,
        parent: NodeIndex,
        name: &[u8],
        identity: Identity,
    ) -> Option<NodeIndex> {
        let share = self.get(parent).ok()?.share;
        let hash = self.secrets.hash(share, &identity);
        let index = self.search(hash, share, &identity)?;
        if index == parent {
            return None;
        }
        self.refer(index);
        self.place(index, parent, name);
        self.forget(index, 1);
        Some(index)
    }

    /// Counts a reference of the guest.
    pub(crate) fn refer(&mut self, index: NodeIndex) {
        if let Some(node) = self.slots.get_mut(index.slot()) {
            node.lookups = node.lookups.saturating_add(1);
        }
    }

    /// Returns true if the guest should not keep what it does not use: it cannot be asked to
    /// forget inodes, but forgets those at once whose names are not valid any more.
    pub(crate) fn is_crowded(&self) -> bool {
        self.used >= self.max / 4 * 3
    }

    /// Returns true if a further inode can be recorded.
    pub(crate) fn has_room(&self) -> bool {
        self.used < self.max
    }

    fn insert(
        &mut self,
        (hash, share): (u32, u16),
        parent: NodeIndex,
        name: &[u8],
        identity: Identity,
    ) -> Result<NodeIndex, Errno> {
        if self.used >= self.max {
            return Err(Errno::NFILE);
        }
        if self.used >= self.buckets.len() {
            self.grow();
        }
        let bucket = self.bucket(hash);
        let mut node = Node {
            share,
            identity,
            parent: Some(parent),
            name: NodeName::new(name),
            lookups: 1,
            children: 0,
            generation: 0,
            hash,
            next: self.buckets[bucket],
            used: true,
        };
        let at = if let Some(free) = self.slots.get_mut(self.free as usize) {
            let at = self.free;
            self.free = free.next;
            node.generation = free.generation;
            *free = node;
            at
        } else {
            let at = u32::try_from(self.slots.len()).map_err(|_| Errno::NFILE)?;
            self.slots.push(node);
            at
        };
        self.buckets[bucket] = at;
        self.slots[parent.slot()].children += 1;
        self.used += 1;
        Ok(NodeIndex(at))
    }

    fn grow(&mut self) {
        self.buckets = vec![NONE; self.buckets.len() * 2];
        self.fill_buckets();
    }

    /// Adds all nodes to the buckets, which are empty.
    fn fill_buckets(&mut self) {
        for slot in self.pinned..self.slots.len() {
            if self.slots[slot].used {
                let bucket = self.bucket(self.slots[slot].hash);
                self.slots[slot].next = self.buckets[bucket];
                // Slots are counted by a u32.
                self.buckets[bucket] = u32::try_from(slot).unwrap_or(NONE);
            }
        }
    }

    /// Records that `index`, which something refers to, is `name` in `parent`.
    fn place(&mut self, index: NodeIndex, parent: NodeIndex, name: &[u8]) {
        let node = &self.slots[index.slot()];
        let same = node.parent == Some(parent);
        if !same {
            self.cut_circle(index, parent);
            let former = self.slots[index.slot()].parent.replace(parent);
            self.slots[parent.slot()].children += 1;
            if let Some(former) = former {
                self.leave(former);
            }
        }
        let node = &mut self.slots[index.slot()];
        if node.name().to_bytes() != name {
            node.name = NodeName::new(name);
        }
    }

    /// Removes the outdated link because of which `parent` counts as a descendant of
    /// `index`, if there is one.
    fn cut_circle(&mut self, index: NodeIndex, parent: NodeIndex) {
        let mut at = parent;
        // Parents form a tree, so the walk ends.
        while let Some(above) = self.slots[at.slot()].parent {
            if above == index {
                self.slots[at.slot()].parent = None;
                self.leave(above);
                return;
            }
            at = above;
        }
    }

    /// Counts one child less, and removes nodes that nothing refers to.
    fn leave(&mut self, parent: NodeIndex) {
        let node = &mut self.slots[parent.slot()];
        node.children = node.children.saturating_sub(1);
        self.remove_unused(parent);
    }

    /// Removes `count` references of the guest; returns true if the node is gone.
    pub(crate) fn forget(&mut self, index: NodeIndex, count: u64) -> bool {
        if self.is_pinned(index) {
            return false;
        }
        let Some(node) = self.slots.get_mut(index.slot()).filter(|node| node.used) else {
            return false;
        };
        node.lookups = node.lookups.saturating_sub(count);
        self.remove_unused(index);
        !self.slots[index.slot()].used
    }

    /// Removes `index` if nothing refers to it, and then its parents likewise.
    fn remove_unused(&mut self, index: NodeIndex) {
        let mut at = index;
        while !self.is_pinned(at) {
            let node = &self.slots[at.slot()];
            if !node.used || node.lookups > 0 || node.children > 0 {
                return;
            }
            self.unlink(at);
            let free = self.free;
            let node = &mut self.slots[at.slot()];
            let parent = node.parent.take();
            node.used = false;
            node.name = NodeName::default();
            node.generation = node.generation.wrapping_add(1);
            node.next = free;
            self.free = at.0;
            self.used -= 1;
            let Some(parent) = parent else { return };
            let above = &mut self.slots[parent.slot()];
            above.children = above.children.saturating_sub(1);
            at = parent;
        }
    }

    /// Removes a node from its bucket.
    fn unlink(&mut self, index: NodeIndex) {
        let node = &self.slots[index.slot()];
        let (next, bucket) = (node.next, self.bucket(node.hash));
        let mut at = self.buckets[bucket];
        if at == index.0 {
            self.buckets[bucket] = next;
            return;
        }
        while let Some(node) = self.slots.get_mut(at as usize) {
            if node.next == index.0 {
                node.next = next;
                return;
            }
            at = node.next;
        }
    }

    /// Sets the identity of the root of a share.
    pub(crate) fn replace_share(&mut self, share: u16, identity: Identity) {
        if let Some(node) = self.slots.get_mut(NodeIndex::of_share(share).slot()) {
            node.identity = identity;
        }
    }

    /// Removes everything that a guest has referred to.
    pub(crate) fn clear(&mut self) {
        for slot in self.pinned..self.slots.len() {
            let node = &mut self.slots[slot];
            if node.used {
                node.used = false;
                node.name = NodeName::default();
                node.parent = None;
                node.generation = node.generation.wrapping_add(1);
                node.next = self.free;
                self.free = u32::try_from(slot).unwrap_or(NONE);
            }
        }
        for node in &mut self.slots[..self.pinned] {
            node.children = 0;
        }
        self.buckets = vec![NONE; 16];
        self.used = 0;
    }

    /// Returns the nodes from the one below a share's root down to `index`; none for the
    /// root of a share.
    ///
    /// # Errors
    /// `ESTALE` if the place of one of them is not known.
    pub(crate) fn path(&self, index: NodeIndex) -> Result<Vec<NodeIndex>, Errno> {
        let mut path = Vec::new();
        let mut at = index;
        while !self.is_pinned(at) {
            path.push(at);
            at = self.get(at)?.parent.ok_or(Errno::STALE)?;
        }
        path.reverse();
        Ok(path)
    }
}

#[cfg(test)]
mod tests;
