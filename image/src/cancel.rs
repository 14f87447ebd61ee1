//! Cancellation: when one layer of a pull fails, the others are cancelled, including
//! waits for a registry's backoff.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
#[cfg(any(feature = "registry", test))]
use std::time::{Duration, Instant};

/// An action to run on cancellation.
type Action = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    cancelled: bool,
    actions: Vec<Action>,
    /// Handles that are cancelled with this one.
    children: Vec<Weak<Shared>>,
}

type Shared = (Mutex<State>, Condvar);

/// A cancellation handle. Clones share their state.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Shared>);

impl Cancel {
    /// Creates a handle that is not cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a handle that is cancelled with this one. It can also be cancelled
    /// separately, which does not affect this one.
    #[must_use]
    pub fn child(&self) -> Self {
        let child = Self::new();
        let mut state = self.lock();
        if state.cancelled {
            drop(state);
            child.cancel();
            return child;
        }
        state.children.retain(|child| child.strong_count() > 0);
        state.children.push(Arc::downgrade(&child.0));
        drop(state);
        child
    }

    /// Cancels all waits and requests to registries. This cannot be undone.
    pub fn cancel(&self) {
        let mut state = self.lock();
        state.cancelled = true;
        let actions = std::mem::take(&mut state.actions);
        let children = std::mem::take(&mut state.children);
        drop(state);
        self.0.1.notify_all();
        for action in actions {
            action();
        }
        for child in children.iter().filter_map(Weak::upgrade) {
            Self(child).cancel();
        }
    }

    /// Returns true if the handle has been cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// Waits for `time`. Returns `false` if the handle was cancelled before it elapsed.
    #[cfg(any(feature = "registry", test))]
    pub(crate) fn wait(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.cancelled || left.is_zero() {
                return !state.cancelled;
            }
            let woken = self.0.1.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs `action` on cancellation, or immediately if that has already occurred.
    #[cfg(any(feature = "engine", feature = "registry", test))]
    pub(crate) fn on_cancel(&self, action: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.cancelled {
            drop(state);
            action();
        } else {
            state.actions.push(Box::new(action));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cancel").field(&self.is_cancelled()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn waits_end_when_it_is_cancelled() {
        let cancel = Cancel::new();
        assert!(cancel.wait(Duration::from_millis(1)));
        let other = cancel.clone();
        // Far longer than any test runs.
        let waiting = std::thread::spawn(move || other.wait(Duration::from_secs(100_000)));
        cancel.cancel();
        assert!(!waiting.join().unwrap());
        assert!(cancel.is_cancelled());
        assert!(!cancel.wait(Duration::from_secs(100_000)));
    }

    #[test]
    fn cancelling_a_parent_cancels_its_children_only() {
        let parent = Cancel::new();
        let (one, two) = (parent.child(), parent.child());
        let grandchild = two.child();
        one.cancel();
        assert!(one.is_cancelled());
        assert!(!parent.is_cancelled() && !two.is_cancelled());
        // Dropped children are removed from the list.
        for _ in 0..100 {
            drop(parent.child());
        }
        assert!(parent.lock().children.len() <= 3);
        parent.cancel();
        assert!(two.is_cancelled() && grandchild.is_cancelled());
        assert!(parent.child().is_cancelled());
    }

    #[test]
    fn actions_are_done_once() {
        let count = Arc::new(AtomicU32::new(0));
        let cancel = Cancel::new();
        let add = |amount| {
            let count = Arc::clone(&count);
            move || {
                count.fetch_add(amount, Ordering::Relaxed);
            }
        };
        cancel.on_cancel(add(1));
        assert_eq!(count.load(Ordering::Relaxed), 0);
        cancel.cancel();
        cancel.cancel();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        cancel.on_cancel(add(10));
        assert_eq!(count.load(Ordering::Relaxed), 11);
    }
}
