//! Saving and restoring the table of nodes.

use std::ffi::CString;

use super::name::NodeName;
use super::{Identity, NONE, Node, NodeIndex, Nodes};
use crate::abi::ROOT_ID;
use crate::names::Name;
use crate::saved::{FsStateError, NodeStateV1};

/// Node of a free slot while the table is restored.
fn unused(generation: u32) -> Node {
    Node {
        share: 0,
        identity: Identity {
            device: 0,
            inode: 0,
            born: 0,
            kind: 0,
        },
        parent: None,
        name: NodeName::default(),
        lookups: 0,
        children: 0,
        generation,
        hash: 0,
        next: NONE,
        used: false,
    }
}

impl Nodes {
    /// Returns the nodes beside root and shares.
    pub(crate) fn save(&self) -> Vec<NodeStateV1> {
        let slots = (0..).zip(&self.slots).skip(self.pinned);
        slots
            .filter(|(_, node)| node.used)
            .map(|(index, node)| NodeStateV1 {
                id: self.id(NodeIndex(index)),
                share: node.share,
                parent: node.parent.map_or(0, |parent| self.id(parent)),
                name: node.name().to_bytes().to_vec(),
                device: node.identity.device,
                inode: node.identity.inode,
                born: node.identity.born,
                kind: node.identity.kind,
                lookups: node.lookups,
            })
            .collect()
    }

    /// Replaces the nodes beside root and shares by saved ones.
    ///
    /// # Errors
    /// Nodes that contradict each other; the table is then empty.
    pub(crate) fn restore(&mut self, nodes: &[NodeStateV1]) -> Result<(), FsStateError> {
        self.clear();
        self.slots.truncate(self.pinned);
        self.free = NONE;
        let restored = self.try_restore(nodes);
        if restored.is_err() {
            self.slots.truncate(self.pinned);
            self.free = NONE;
            self.clear();
        }
        restored
    }

    fn try_restore(&mut self, nodes: &[NodeStateV1]) -> Result<(), FsStateError> {
        let most = self.max;
        if nodes.len() > most {
            return Err(FsStateError::TooMany {
                objects: "nodes",
                count: nodes.len(),
                most,
            });
        }
        // Numbers of nodes that the guest has forgotten are not used again.
        let generations = nodes.iter().map(|node| node.id >> 32);
        let newest = generations.max().unwrap_or(0);
        let unused_generation = u32::try_from(newest + 1).unwrap_or(0);
        for node in nodes {
            self.put(node, most, unused_generation)
                .ok_or_else(|| malformed(node))?;
        }
        for node in nodes {
            self.attach(node).ok_or_else(|| malformed(node))?;
        }
        self.check_tree(nodes)?;
        let slots = self.slots.len();
        for slot in self.pinned..slots {
            if !self.slots[slot].used {
                self.slots[slot].next = self.free;
                self.free = u32::try_from(slot).unwrap_or(NONE);
            }
        }
        while self.used > self.buckets.len() {
            self.buckets = vec![NONE; self.buckets.len() * 2];
        }
        self.fill_buckets();
        Ok(())
    }

    /// Puts a node in its slot.
    fn put(&mut self, saved: &NodeStateV1, most: usize, unused_generation: u32) -> Option<()> {
        let slot = usize::try_from((saved.id & 0xffff_ffff).checked_sub(ROOT_ID)?).ok()?;
        let is_share = usize::from(saved.share) + 1 < self.pinned;
        if slot < self.pinned || slot - self.pinned >= most || !is_share {
            return None;
        }
        let name = CString::new(saved.name.as_slice()).ok()?;
        Name::new(&name).ok()?;
        if self.slots.len() <= slot {
            self.slots
                .resize_with(slot + 1, || unused(unused_generation));
        }
        let identity = Identity {
            device: saved.device,
            inode: saved.inode,
            born: saved.born,
            kind: saved.kind,
        };
        let hash = self.secrets.hash(saved.share, &identity);
        let node = self.slots.get_mut(slot).filter(|node| !node.used)?;
        *node = Node {
            share: saved.share,
            identity,
            parent: None,
            name: NodeName::new(name.to_bytes()),
            lookups: saved.lookups,
            children: 0,
            generation: u32::try_from(saved.id >> 32).ok()?,
            hash,
            next: NONE,
            used: true,
        };
        self.used += 1;
        Some(())
    }

    /// Connects a node with its parent.
    fn attach(&mut self, saved: &NodeStateV1) -> Option<()> {
        if saved.parent == 0 {
            return Some(());
        }
        let index = self.find(saved.id).ok()?;
        let parent = self.find(saved.parent).ok()?;
        if self.get(parent).ok()?.share != saved.share {
            return None;
        }
        self.slots[index.slot()].parent = Some(parent);
        self.slots[parent.slot()].children += 1;
        Some(())
    }

    /// Checks that parents form a tree, and that something refers to each node.
    fn check_tree(&self, nodes: &[NodeStateV1]) -> Result<(), FsStateError> {
        let mut sound = vec![false; self.slots.len()];
        for saved in nodes {
            let mut at = self.find(saved.id).map_err(|_| malformed(saved))?;
            let node = &self.slots[at.slot()];
            if node.lookups == 0 && node.children == 0 {
                return Err(malformed(saved));
            }
            let mut walked = Vec::new();
            while !self.is_pinned(at) && !sound[at.slot()] {
                walked.push(at);
                if walked.len() > nodes.len() {
                    return Err(malformed(saved));
                }
                match self.slots[at.slot()].parent {
                    Some(parent) => at = parent,
                    None => break,
                }
            }
            for index in walked {
                sound[index.slot()] = true;
            }
        }
        Ok(())
    }
}

fn malformed(node: &NodeStateV1) -> FsStateError {
    FsStateError::Malformed {
        object: "node",
        number: node.id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u64, parent: u64, inode: u64) -> NodeStateV1 {
        NodeStateV1 {
            id,
            parent,
            name: b"name".to_vec(),
            inode,
            lookups: 1,
            ..NodeStateV1::default()
        }
    }

    fn table() -> Nodes {
        let root = Identity {
            device: 1,
            inode: 1,
            born: 0,
            kind: 0,
        };
        Nodes::new(&[root], 8)
    }

    #[test]
    fn a_table_is_restored_with_its_numbers() {
        let saved = [node(7, 2, 1), node(9 << 32 | 4, 7, 2), node(3, 0, 3)];
        let mut nodes = table();
        nodes.restore(&saved).unwrap();
        let mut again = nodes.save();
        again.sort_by_key(|node| node.inode);
        assert_eq!(again, saved);
        let index = nodes.find(9 << 32 | 4).unwrap();
        assert_eq!(nodes.path(index).unwrap().len(), 2);
        // New nodes have new numbers, in slots that were free.
        let identity = |inode| Identity {
            device: 1,
            inode,
            born: 0,
            kind: 0,
        };
        for inode in 10..15 {
            let parent = nodes.find(2).unwrap();
            let new = nodes.seen(parent, b"new", identity(inode)).unwrap();
            assert!(saved.iter().all(|node| node.id != nodes.id(new)));
        }
        assert!(nodes.forget(index, 1));
        for id in [7, 3] {
            let index = nodes.find(id).unwrap();
            assert!(nodes.forget(index, 1));
        }
        assert_eq!(nodes.len(), 5);
    }

    #[test]
    fn malformed_tables_are_refused() {
        let mut unnamed = node(3, 2, 1);
        unnamed.name = b"..".to_vec();
        let mut unused = node(3, 2, 1);
        unused.lookups = 0;
        let mut elsewhere = node(3, 2, 1);
        elsewhere.share = 1;
        let cases = [
            vec![node(0, 2, 1)],
            vec![node(2, 2, 1)],
            vec![node(3, 2, 1), node(3, 2, 2)],
            vec![node(3, 2, 1), node(1 << 32 | 3, 2, 2)],
            vec![node(3, 99, 1)],
            vec![node(3, 3, 1)],
            vec![node(3, 4, 1), node(4, 5, 2), node(5, 3, 3)],
            vec![node(u64::from(u32::MAX), 2, 1)],
            (3..13).map(|id| node(id, 2, id)).collect(),
            vec![unnamed],
            vec![unused],
            vec![elsewhere],
        ];
        for (index, case) in cases.iter().enumerate() {
            let mut nodes = table();
            assert!(nodes.restore(case).is_err(), "case {index}");
            assert_eq!((nodes.len(), nodes.slots.len()), (0, 2), "case {index}");
        }
    }
}
