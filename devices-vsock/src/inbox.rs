//! Hands items from many threads to one that waits for a wake-up.
//!
//! Whoever puts an item in and finds no wake-up on its way sends one; whoever
//! takes items first says that the next one needs a wake-up of its own. Taking
//! from an empty inbox costs one access to one flag. `tests/model.rs` looks at
//! all ways in which threads may meet here.

use crate::sync::{AtomicBool, Mutex, Ordering};

/// Items on their way.
pub(crate) struct Inbox<T> {
    /// `None` when nobody will take any more.
    items: Mutex<Option<Vec<T>>>,
    /// A wake-up is on its way.
    woken: AtomicBool,
}

/// Why an item was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too many wait.
    Full,
    /// Nobody will take it.
    Closed,
}

impl<T> Inbox<T> {
    pub(crate) fn new() -> Self {
        Self {
            items: Mutex::new(Some(Vec::new())),
            woken: AtomicBool::new(false),
        }
    }

    fn with<R>(&self, work: impl FnOnce(&mut Option<Vec<T>>) -> R) -> R {
        // Nothing panics while it holds the lock.
        let mut items = match self.items.lock() {
            Ok(items) => items,
            Err(poisoned) => poisoned.into_inner(),
        };
        work(&mut items)
    }

    /// Puts an item in, unless `most` wait already; `Ok(true)` asks the caller to
    /// wake whoever takes them.
    ///
    /// # Errors
    /// The item, and why it was not taken in.
    pub(crate) fn put(&self, item: T, most: usize) -> Result<bool, (T, Refused)> {
        self.with(|items| match items {
            None => Err((item, Refused::Closed)),
            Some(items) if items.len() >= most => Err((item, Refused::Full)),
            Some(items) => {
                items.push(item);
                Ok(())
            }
        })?;
        Ok(!self.woken.swap(true, Ordering::AcqRel))
    }

    /// Takes all items, into an empty list whose memory is used for the next.
    pub(crate) fn take(&self, into: &mut Vec<T>) {
        // Before the items: one that comes after them finds the flag down.
        if self.woken.swap(false, Ordering::AcqRel) {
            self.with(|items| {
                if let Some(items) = items {
                    std::mem::swap(items, into);
                }
            });
        }
    }

    /// Takes the items that wait and are `unwanted`.
    pub(crate) fn take_out(&self, unwanted: impl Fn(&T) -> bool) -> Vec<T> {
        self.with(|items| {
            let Some(items) = items else {
                return Vec::new();
            };
            let (out, rest) = std::mem::take(items).into_iter().partition(unwanted);
            *items = rest;
            out
        })
    }

    /// Takes all items, and no more from now on.
    pub(crate) fn close(&self) -> Vec<T> {
        self.with(Option::take).unwrap_or_default()
    }
}
