//! Flows in numbered slots, found by their key.

use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;

use super::flow::FlowKey;

/// A flow, which knows its key.
pub(crate) trait Keyed {
    fn key(&self) -> &FlowKey;
}

/// A table of flows. A slot keeps its number while its flow exists; slots are reused.
pub(crate) struct FlowTable<F> {
    slots: Vec<Option<F>>,
    free: Vec<u32>,
    index: HashTable<u32>,
    /// Keyed by random numbers, as the guest chooses the keys.
    hasher: RandomState,
}

impl<F: Keyed> FlowTable<F> {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            hasher: RandomState::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// Returns the slot of the flow with this key.
    pub(crate) fn find(&self, key: &FlowKey) -> Option<u32> {
        let same = |slot: &u32| self.get(*slot).is_some_and(|flow| flow.key() == key);
        self.index.find(self.hasher.hash_one(key), same).copied()
    }

    pub(crate) fn get(&self, slot: u32) -> Option<&F> {
        self.slots.get(slot as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: u32) -> Option<&mut F> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// Returns the slot that the next flow will have.
    pub(crate) fn next_slot(&self) -> u32 {
        let end = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        self.free.last().copied().unwrap_or(end)
    }

    /// Adds a flow, whose key is not in the table, in [`Self::next_slot`].
    pub(crate) fn insert(&mut self, flow: F) -> u32 {
        let slot = self.next_slot();
        let hash = self.hasher.hash_one(flow.key());
        match self.free.pop() {
            Some(free) => {
                if let Some(place) = self.slots.get_mut(free as usize) {
                    *place = Some(flow);
                }
            }
            None => self.slots.push(Some(flow)),
        }
        let Self {
            slots,
            index,
            hasher,
            ..
        } = self;
        index.insert_unique(hash, slot, |slot| {
            let flow = slots.get(*slot as usize).and_then(Option::as_ref);
            // Every slot in the index has a flow.
            flow.map_or(0, |flow| hasher.hash_one(flow.key()))
        });
        slot
    }

    pub(crate) fn remove(&mut self, slot: u32) -> Option<F> {
        let flow = self.slots.get_mut(slot as usize)?.take()?;
        let hash = self.hasher.hash_one(flow.key());
        if let Ok(entry) = self.index.find_entry(hash, |other| *other == slot) {
            entry.remove();
        }
        self.free.push(slot);
        Some(flow)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &F> {
        self.slots.iter().flatten()
    }

    /// Returns all slots that have ever had a flow.
    pub(crate) fn slots(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    struct Named(FlowKey, u32);

    impl Keyed for Named {
        fn key(&self) -> &FlowKey {
            &self.0
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((any::<bool>(), 0u16..20), 0..200)) {
            let key = |port| {
                let end = (Ipv4Addr::LOCALHOST.into(), port);
                FlowKey::new(end, end)
            };
            let mut table = FlowTable::new();
            let mut model = HashMap::new();
            for (number, (add, port)) in (0u32..).zip(steps) {
                let found = table.find(&key(port));
                let value = found.and_then(|slot| table.get(slot)).map(|flow: &Named| flow.1);
                prop_assert_eq!(value, model.get(&port).copied());
                match found {
                    None if add => {
                        let next = table.next_slot();
                        prop_assert_eq!(table.insert(Named(key(port), number)), next);
                        model.insert(port, number);
                    }
                    Some(slot) if !add => {
                        let removed = table.remove(slot).map(|flow| flow.1);
                        prop_assert_eq!(removed, model.remove(&port));
                        prop_assert!(table.remove(slot).is_none());
                    }
                    _ => {}
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.iter().count(), model.len());
            }
        }
    }
}
