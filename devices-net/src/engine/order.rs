//! Order of service: a queue of slots that contains each slot at most once, with removal in
//! constant time.

/// Number that stands for no slot.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
    queued: bool,
}

/// A first-in-first-out queue of slot numbers, linked through a table of slots.
#[derive(Debug)]
pub(crate) struct SlotQueue {
    links: Vec<Link>,
    first: u32,
    last: u32,
}

impl Default for SlotQueue {
    fn default() -> Self {
        Self {
            links: Vec::new(),
            first: NONE,
            last: NONE,
        }
    }
}

impl SlotQueue {
    /// Returns the first slot.
    pub(crate) fn first(&self) -> Option<u32> {
        (self.first != NONE).then_some(self.first)
    }

    fn link(&mut self, slot: u32) -> Option<&mut Link> {
        self.links.get_mut(slot as usize)
    }

    /// Adds a slot at the end, unless it is queued.
    pub(crate) fn push_back(&mut self, slot: u32) {
        let needed = slot as usize + 1;
        if self.links.len() < needed {
            let link = Link {
                previous: NONE,
                next: NONE,
                queued: false,
            };
            self.links.resize(needed, link);
        }
        let last = self.last;
        match self.link(slot) {
            Some(link) if !link.queued => {
                *link = Link {
                    previous: last,
                    next: NONE,
                    queued: true,
                };
            }
            _ => return,
        }
        self.last = slot;
        match self.link(last) {
            Some(link) => link.next = slot,
            None => self.first = slot,
        }
    }

    /// Moves a slot to the end, or adds it there.
    pub(crate) fn move_back(&mut self, slot: u32) {
        self.remove(slot);
        self.push_back(slot);
    }

    /// Removes and returns the first slot.
    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let first = self.first()?;
        self.remove(first);
        Some(first)
    }

    /// Removes a slot, if it is queued.
    pub(crate) fn remove(&mut self, slot: u32) {
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
            steps in prop::collection::vec((0u8..4, 0u32..6), 0..200),
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
                        queue.move_back(slot);
                        model.retain(|&other| other != slot);
                        model.push_back(slot);
                    }
                    2 => prop_assert_eq!(queue.pop_front(), model.pop_front()),
                    _ => {
                        queue.remove(slot);
                        model.retain(|&other| other != slot);
                    }
                }
                prop_assert_eq!(queue.first(), model.front().copied());
            }
        }
    }
}
