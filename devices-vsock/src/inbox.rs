//! Queue of items from many threads to one that waits for a wake-up.
//!
//! A thread that adds an item sends a wake-up unless one is pending; the receiver clears
//! the pending flag before it takes items, so that the next item sends a new one. Taking
//! from an empty inbox costs one access to the flag. `tests/model.rs` checks all
//! interleavings of threads.

use crate::sync::{AtomicBool, Mutex, Ordering};

/// Items that have not been taken.
pub(crate) struct Inbox<T> {
    /// `None` once the receiver is gone.
    items: Mutex<Option<Vec<T>>>,
    /// A wake-up is pending.
    woken: AtomicBool,
}

/// Reason why an item was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too many items wait.
    Full,
    /// The receiver is gone.
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
        // Nothing panics with the lock held.
        let mut items = match self.items.lock() {
            Ok(items) => items,
            Err(poisoned) => poisoned.into_inner(),
        };
        work(&mut items)
    }

    /// Adds an item, unless `most` wait already; `Ok(true)` means that the caller must wake
    /// the receiver.
    ///
    /// # Errors
    /// The item, and the reason of its refusal.
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

    /// Takes all items, into an empty list whose memory is reused for the next.
    pub(crate) fn take(&self, into: &mut Vec<T>) {
        // Before the items: a later item finds the flag cleared.
        if self.woken.swap(false, Ordering::AcqRel) {
            self.with(|items| {
                if let Some(items) = items {
                    std::mem::swap(items, into);
                }
            });
        }
    }

    /// Removes the waiting items that are `unwanted`.
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

    /// Takes all items, and refuses others from now on.
    pub(crate) fn close(&self) -> Vec<T> {
        self.with(Option::take).unwrap_or_default()
    }
}
