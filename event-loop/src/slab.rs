//! A table of slots whose keys are never reused.

/// The key of a value in a [`Slab`]: a slot, and the generation of its occupant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    slot: u32,
    generation: u32,
}

impl Key {
    /// The key of the occupant `generation` of `slot`.
    #[must_use]
    pub const fn new(slot: u32, generation: u32) -> Self {
        Self { slot, generation }
    }

    /// The slot's number.
    #[must_use]
    pub const fn slot(self) -> u32 {
        self.slot
    }

    /// The generation of the slot; occupants that follow each other have different ones.
    #[must_use]
    pub const fn generation(self) -> u32 {
        self.generation
    }
}

#[derive(Clone, Debug)]
struct Slot<T> {
    /// The next occupant's, while the slot is free.
    generation: u32,
    value: Option<T>,
}

/// A table with stable keys. The key of a removed value never finds a later one (the
/// generation of a slot wraps around after 2^32 occupants).
///
/// Adding, finding and removing a value cost the same however many there are. A slot is
/// used again, so the table is as large as the largest number of values that it had at
/// one time.
///
/// ```
/// use sm_event_loop::Slab;
///
/// let mut slab = Slab::new();
/// let first = slab.insert('a');
/// assert_eq!(slab.remove(first), Some('a'));
/// let second = slab.insert('b');
/// assert_eq!(first.slot(), second.slot());
/// assert_eq!(slab.get(first), None);
/// assert_eq!(slab.get(second), Some(&'b'));
/// ```
#[derive(Clone, Debug)]
pub struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Slab<T> {
    /// An empty table.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Adds a value and returns its key.
    ///
    /// # Panics
    /// There is no memory, or there are 2^32 values.
    pub fn insert(&mut self, value: T) -> Key {
        self.insert_with(|_| value)
    }

    /// Adds the value that `create` returns for its key, and returns the key.
    ///
    /// # Panics
    /// There is no memory, or there are 2^32 values.
    pub fn insert_with(&mut self, create: impl FnOnce(Key) -> T) -> Key {
        if let Some(slot) = self.free.pop()
            && let Some(entry) = self.slots.get_mut(slot as usize)
        {
            let key = Key::new(slot, entry.generation);
            entry.value = Some(create(key));
            return key;
        }
        let slot = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        assert!(slot < u32::MAX, "a table has less than 2^32 values");
        let key = Key::new(slot, 0);
        self.slots.push(Slot {
            generation: 0,
            value: Some(create(key)),
        });
        key
    }

    /// Returns the value of a key, if it has not been removed.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&T> {
        let slot = self.slots.get(key.slot as usize)?;
        slot.value
            .as_ref()
            .filter(|_| slot.generation == key.generation)
    }

    /// Returns the value of a key, if it has not been removed.
    #[must_use]
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        slot.value
            .as_mut()
            .filter(|_| slot.generation == key.generation)
    }

    /// Removes the value of a key and returns it. The key finds nothing from then on.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(key.slot);
        Some(value)
    }

    /// Iterates over all values with their keys.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        let slots = self.slots.iter().zip(0..);
        slots.filter_map(|(entry, slot)| {
            let key = Key::new(slot, entry.generation);
            entry.value.as_ref().map(|value| (key, value))
        })
    }

    /// Iterates over all values with their keys.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Key, &mut T)> {
        let slots = self.slots.iter_mut().zip(0..);
        slots.filter_map(|(entry, slot)| {
            let key = Key::new(slot, entry.generation);
            entry.value.as_mut().map(|value| (key, value))
        })
    }

    /// The number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Returns true if there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of slots, in use or free: every slot number is below.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_key_finds_nothing() {
        let mut slab = Slab::default();
        let a = slab.insert('a');
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b');
        assert_eq!(a.slot(), b.slot());
        assert_eq!(slab.get(a), None);
        assert_eq!(slab.get_mut(a), None);
        assert_eq!(slab.remove(a), None);
        assert_eq!(slab.get_mut(b), Some(&mut 'b'));
        assert_eq!(slab.len(), 1);
    }

    #[test]
    fn the_key_of_a_free_slot_finds_nothing() {
        let mut slab = Slab::default();
        let a = slab.insert('a');
        slab.remove(a);
        let next = Key::new(a.slot(), a.generation().wrapping_add(1));
        assert_eq!(slab.get(next), None);
        assert_eq!(slab.remove(next), None);
        assert_eq!(slab.insert('b'), next);
        assert_eq!(slab.remove(Key::new(1, 0)), None);
    }

    #[test]
    fn the_table_is_as_large_as_it_was_full() {
        let mut slab = Slab::default();
        for round in 0..1000_u32 {
            let keys: Vec<_> = (0..10).map(|n| slab.insert_with(|key| (key, n))).collect();
            assert_eq!(slab.len(), 10);
            assert!(slab.iter().all(|(key, (own, _))| key == *own));
            let round = usize::try_from(round).unwrap();
            let first = slab.remove(keys[round % 10]);
            assert!(first.is_some());
            for key in keys {
                slab.remove(key);
            }
            assert!(slab.is_empty());
        }
        assert_eq!(slab.slots(), 10);
    }
}
