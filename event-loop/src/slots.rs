//! Order of service: a queue of slots that contains each slot at most once.

/// Number that stands for no slot.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
    queued: bool,
}

/// A first-in-first-out queue of slot numbers, such as those of the keys of a
/// [`Slab`](crate::Slab), that contains each slot at most once.
///
/// Adding and removing a slot cost the same however many there are. The links are a table
/// with one entry for each slot number up to the largest that was ever added, so memory
/// follows the largest number and not the length of the queue: numbers from outside must be
/// checked before.
///
/// ```
/// use sm_event_loop::SlotQueue;
///
/// let mut ready = SlotQueue::new();
/// ready.push_back(4);
/// ready.push_back(2);
/// // It is queued already.
/// ready.push_back(4);
/// ready.push_front(7);
/// ready.remove(2);
/// assert_eq!(ready.pop_front(), Some(7));
/// assert_eq!(ready.pop_front(), Some(4));
/// assert!(ready.is_empty());
/// ```
#[derive(Clone, Debug)]
pub struct SlotQueue {
    links: Vec<Link>,
    first: u32,
    last: u32,
}

impl Default for SlotQueue {
    fn default() -> Self {
        Self::new()
    }
}

impl SlotQueue {
    /// Creates an empty queue.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            links: Vec::new(),
            first: NONE,
            last: NONE,
        }
    }

    /// Returns the first slot.
    #[must_use]
    pub fn first(&self) -> Option<u32> {
        (self.first != NONE).then_some(self.first)
    }

    /// Returns true if no slot is queued.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first == NONE
    }

    fn link(&mut self, slot: u32) -> Option<&mut Link> {
        self.links.get_mut(slot as usize)
    }

    /// Makes room for a slot and marks it; returns false if it is queued already.
    fn enter(&mut self, slot: u32) -> bool {
        if slot == NONE {
            return false;
        }
        let needed = slot as usize + 1;
        if self.links.len() < needed {
            let link = Link {
                previous: NONE,
                next: NONE,
                queued: false,
            };
            self.links.resize(needed, link);
        }
        let queued = self.link(slot).map(|link| &mut link.queued);
        queued.is_some_and(|queued| !std::mem::replace(queued, true))
    }

    /// Adds a slot at the end, unless it is queued. The number `u32::MAX` is never queued.
    pub fn push_back(&mut self, slot: u32) {
        if !self.enter(slot) {
            return;
        }
        let last = std::mem::replace(&mut self.last, slot);
        if let Some(link) = self.link(slot) {
            (link.previous, link.next) = (last, NONE);
        }
        match self.link(last) {
            Some(link) => link.next = slot,
            None => self.first = slot,
        }
    }

    /// Adds a slot at the front, unless it is queued. The number `u32::MAX` is never queued.
    pub fn push_front(&mut self, slot: u32) {
        if !self.enter(slot) {
            return;
        }
        let first = std::mem::replace(&mut self.first, slot);
        if let Some(link) = self.link(slot) {
            (link.previous, link.next) = (NONE, first);
        }
        match self.link(first) {
            Some(link) => link.previous = slot,
            None => self.last = slot,
        }
    }

    /// Moves a slot to the end, or adds it there.
    pub fn move_back(&mut self, slot: u32) {
        self.remove(slot);
        self.push_back(slot);
    }

    /// Removes and returns the first slot.
    pub fn pop_front(&mut self) -> Option<u32> {
        let first = self.first()?;
        self.remove(first);
        Some(first)
    }

    /// Removes a slot, if it is queued.
    pub fn remove(&mut self, slot: u32) {
        let Some(link) = self.link(slot).filter(|link| link.queued) else {
            return;
        };
        link.queued = false;
        let Link { previous, next, .. } = *link;
        match self.link(previous) {
            Some(link) => link.next = next,
            None => self.first = next,
        }
        match self.link(next) {
            Some(link) => link.previous = previous,
            None => self.last = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_queue_without_duplicates(
            steps in prop::collection::vec((0u8..5, 0u32..6), 0..200),
        ) {
            let mut queue = SlotQueue::default();
            let mut model = VecDeque::new();
            for (step, slot) in steps {
                match step {
                    0 => {
                        queue.push_back(slot);
                        if !model.contains(&slot) {
                            model.push_back(slot);
                        }
                    }
                    1 => {
                        queue.push_front(slot);
                        if !model.contains(&slot) {
                            model.push_front(slot);
                        }
                    }
                    2 => {
                        queue.move_back(slot);
                        model.retain(|&other| other != slot);
                        model.push_back(slot);
                    }
                    3 => prop_assert_eq!(queue.pop_front(), model.pop_front()),
                    _ => {
                        queue.remove(slot);
                        model.retain(|&other| other != slot);
                    }
                }
                prop_assert_eq!(queue.first(), model.front().copied());
                prop_assert_eq!(queue.is_empty(), model.is_empty());
            }
            while let Some(slot) = model.pop_front() {
                prop_assert_eq!(queue.pop_front(), Some(slot));
            }
            prop_assert_eq!(queue.pop_front(), None);
        }
    }

    #[test]
    fn the_number_of_no_slot_is_never_queued() {
        let mut queue = SlotQueue::new();
        queue.push_back(NONE);
        queue.push_front(NONE);
        queue.move_back(NONE);
        queue.remove(NONE);
        assert!(queue.is_empty());
        assert_eq!(queue.pop_front(), None);
    }
}
