//! A queue of deadlines.

use std::collections::BTreeMap;
use std::time::Instant;

/// Names an entry of [`Deadlines`]; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timer {
    at: Instant,
    sequence: u64,
}

impl Timer {
    /// When it is due.
    #[must_use]
    pub const fn at(self) -> Instant {
        self.at
    }
}

/// Values that are due at some time, in the order of their times; those of one time in
/// the order in which they were set.
///
/// ```
/// use std::time::{Duration, Instant};
///
/// use sm_event_loop::Deadlines;
///
/// let now = Instant::now();
/// let mut deadlines = Deadlines::new();
/// deadlines.set(now + Duration::from_secs(2), "later");
/// let cancelled = deadlines.set(now, "never");
/// deadlines.set(now, "now");
/// deadlines.cancel(cancelled);
/// assert_eq!(deadlines.pop(now), Some("now"));
/// assert_eq!(deadlines.pop(now), None);
/// assert_eq!(deadlines.earliest(), Some(now + Duration::from_secs(2)));
/// ```
#[derive(Debug)]
pub struct Deadlines<T> {
    entries: BTreeMap<Timer, T>,
    /// The number of the next entry.
    sequence: u64,
}

impl<T> Default for Deadlines<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Deadlines<T> {
    /// Nothing is due.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            sequence: 0,
        }
    }

    /// Adds a value that is due at `at`.
    pub fn set(&mut self, at: Instant, value: T) -> Timer {
        let sequence = self.sequence;
        self.sequence += 1;
        let timer = Timer { at, sequence };
        self.entries.insert(timer, value);
        timer
    }

    /// Removes a value; `None` when it was taken before.
    pub fn cancel(&mut self, timer: Timer) -> Option<T> {
        self.entries.remove(&timer)
    }

    /// Returns true until the value of `timer` is taken or cancelled, also while it is due.
    #[must_use]
    pub fn contains(&self, timer: Timer) -> bool {
        self.entries.contains_key(&timer)
    }

    /// The earliest time at which something is due.
    #[must_use]
    pub fn earliest(&self) -> Option<Instant> {
        self.entries.keys().next().map(|timer| timer.at)
    }

    /// Takes the first value that is due by `now`.
    pub fn pop(&mut self, now: Instant) -> Option<T> {
        let first = self.entries.first_entry()?;
        (first.key().at <= now).then(|| first.remove())
    }

    /// Removes the values for which `keep` is false.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.entries.retain(|_, value| keep(value));
    }

    /// The number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns true if nothing is due at any time.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_first_comes_first_and_those_cancelled_do_not() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut deadlines = Deadlines::new();
        deadlines.set(after(3000), 1);
        let cancelled = deadlines.set(start, 2);
        assert!(deadlines.contains(cancelled));
        deadlines.set(after(2), 3);
        let taken = deadlines.set(after(1), 4);
        deadlines.set(after(2), 5);
        assert_eq!(deadlines.cancel(cancelled), Some(2));
        assert_eq!(deadlines.cancel(cancelled), None);
        assert!(!deadlines.contains(cancelled));
        assert_eq!(deadlines.earliest(), Some(after(1)));
        assert_eq!(deadlines.pop(start), None);
        assert!(deadlines.contains(taken));
        let due: Vec<_> = std::iter::from_fn(|| deadlines.pop(after(2))).collect();
        assert_eq!(due, [4, 3, 5]);
        assert!(!deadlines.contains(taken));
        assert_eq!(deadlines.earliest(), Some(after(3000)));
        assert_eq!(deadlines.len(), 1);
        deadlines.retain(|&value| value != 1);
        assert!(deadlines.is_empty());
    }
}
