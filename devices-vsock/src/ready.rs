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
pub(crate) struct Ready {
    links: Vec<Link>,
    first: u32,
    last: u32,
}

impl Default for Ready {
    fn default() -> Self {
        Self {
            links: Vec::new(),
            first: NONE,
            last: NONE,
        }
    }
}

impl Ready {
    pub(crate) fn is_empty(&self) -> bool {
        self.first == NONE
    }

    fn link(&mut self, slot: u32) -> Option<&mut Link> {
        self.links.get_mut(slot as usize)
    }

    /// Makes room for a slot and marks it; returns false if it is queued already.
    fn enter(&mut self, slot: u32) -> bool {
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

    /// Adds a slot at the end, unless it is queued.
    pub(crate) fn push_back(&mut self, slot: u32) {
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

    /// Adds a slot at the front, unless it is queued.
    pub(crate) fn push_front(&mut self, slot: u32) {
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

    /// Removes and returns the first slot.
    pub(crate) fn pop_front(&mut self) -> Option<u32> {
        let first = self.first;
        (first != NONE).then(|| {
            self.remove(first);
            first
        })
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
        fn it_is_a_queue_without_duplicates(steps in prop::collection::vec((0u8..4, 0u32..6), 0..200)) {
            let mut ready = Ready::default();
            let mut model = VecDeque::new();
            for (step, slot) in steps {
                match step {
                    0 => {
                        ready.push_back(slot);
                        if !model.contains(&slot) {
                            model.push_back(slot);
                        }
                    }
                    1 => {
                        ready.push_front(slot);
                        if !model.contains(&slot) {
                            model.push_front(slot);
                        }
                    }
                    2 => prop_assert_eq!(ready.pop_front(), model.pop_front()),
                    _ => {
                        ready.remove(slot);
                        model.retain(|&other| other != slot);
                    }
                }
                prop_assert_eq!(ready.is_empty(), model.is_empty());
            }
            while let Some(slot) = model.pop_front() {
                prop_assert_eq!(ready.pop_front(), Some(slot));
            }
            prop_assert_eq!(ready.pop_front(), None);
        }
    }
}
