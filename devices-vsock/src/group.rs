//! Groups of connections: limited, counted, awaited and ended together.
//!
//! A component that opens connections for others (a frontend) makes each of them a member
//! of its [`Group`]. Groups can share a [`Limit`], such as the number of descriptors of a
//! process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Called once when the awaited event occurs, on the thread that causes it; must return
/// quickly.
pub type Waker = Box<dyn FnOnce() + Send>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics with one of these locks held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of resources, such as file descriptors, that several groups share. Clones refer
/// to the same limit.
#[derive(Clone)]
pub struct Limit(Arc<Mutex<LimitState>>);

struct LimitState {
    free: usize,
    waiting: Vec<Waker>,
}

impl Limit {
    /// Creates a limit of `total` resources, all of them free.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self(Arc::new(Mutex::new(LimitState {
            free: total,
            waiting: Vec::new(),
        })))
    }

    /// Creates a limit that is never reached.
    #[must_use]
    pub fn none() -> Self {
        Self::new(usize::MAX)
    }

    /// Returns the number of free resources.
    #[must_use]
    pub fn free(&self) -> usize {
        lock(&self.0).free
    }

    /// Takes `count` resources, all or none.
    #[must_use]
    pub fn take(&self, count: usize) -> Option<Permit> {
        let mut pool = lock(&self.0);
        pool.free = pool.free.checked_sub(count)?;
        Some(Permit {
            limit: self.clone(),
            count,
        })
    }

    /// Takes `count` resources, or arranges a call of `wake` when some become free; the
    /// caller then tries again.
    ///
    /// # Errors
    /// Fewer are free.
    pub fn take_or_wait(
        &self,
        count: usize,
        wake: impl FnOnce() + Send + 'static,
    ) -> Result<Permit, Full> {
        let mut pool = lock(&self.0);
        match pool.free.checked_sub(count) {
            Some(rest) => {
                pool.free = rest;
                Ok(Permit {
                    limit: self.clone(),
                    count,
                })
            }
            None => {
                pool.waiting.push(Box::new(wake));
                Err(Full)
            }
        }
    }
}

impl std::fmt::Debug for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limit").field("free", &self.free()).finish()
    }
}

/// A [`Limit`] is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the limit is reached")]
pub struct Full;

/// A share of a [`Limit`], which dropping returns.
#[derive(Debug)]
pub struct Permit {
    limit: Limit,
    count: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let woken = {
            let mut pool = lock(&self.limit.0);
            pool.free += self.count;
            std::mem::take(&mut pool.waiting)
        };
        // Without the lock: the callbacks may take the free resources.
        for wake in woken {
            wake();
        }
    }
}

#[derive(Default)]
struct Counts {
    active: usize,
    undelivered: usize,
    when_delivered: Vec<Waker>,
}

#[derive(Default)]
struct Shared {
    counts: Mutex<Counts>,
    /// Signalled when no member is left.
    idle: Condvar,
    to_guest: AtomicU64,
    from_guest: AtomicU64,
}

/// Connections that belong together. Clones refer to the same group.
#[derive(Clone, Default)]
pub struct Group(Arc<Shared>);

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("active", &self.active())
            .field("undelivered", &self.undelivered())
            .finish()
    }
}

impl PartialEq for Group {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Group {}

impl Group {
    /// Creates a group without members.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a member, which holds `permit` while it exists.
    #[must_use]
    pub fn join(&self, permit: Option<Permit>) -> Member {
        lock(&self.0.counts).active += 1;
        Member {
            group: self.clone(),
            has_begun: false,
            delivered: false,
            _permit: permit,
        }
    }

    /// Returns the number of members.
    #[must_use]
    pub fn active(&self) -> usize {
        lock(&self.0.counts).active
    }

    /// Returns the number of members whose host side may still receive data of the guest.
    #[must_use]
    pub fn undelivered(&self) -> usize {
        lock(&self.0.counts).undelivered
    }

    /// Returns the bytes that members, including past ones, have sent to the guest.
    #[must_use]
    pub fn to_guest(&self) -> u64 {
        self.0.to_guest.load(Ordering::Relaxed)
    }

    /// Returns the bytes that members, including past ones, have received from the guest.
    #[must_use]
    pub fn from_guest(&self) -> u64 {
        self.0.from_guest.load(Ordering::Relaxed)
    }

    /// Waits until there are no members. Returns false if there are some at the deadline.
    #[must_use]
    pub fn wait_idle(&self, deadline: Instant) -> bool {
        let mut counts = lock(&self.0.counts);
        while counts.active > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.0.idle.wait_timeout(counts, left);
            counts = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Calls `wake` once no data of the guest are left undelivered: immediately if none
    /// are.
    pub fn when_delivered(&self, wake: impl FnOnce() + Send + 'static) {
        let mut counts = lock(&self.0.counts);
        if counts.undelivered > 0 {
            counts.when_delivered.push(Box::new(wake));
            return;
        }
        drop(counts);
        wake();
    }

    fn delivered(&self) {
        let mut woken = Vec::new();
        let mut counts = lock(&self.0.counts);
        counts.undelivered -= 1;
        if counts.undelivered == 0 {
            woken = std::mem::take(&mut counts.when_delivered);
        }
        drop(counts);
        for wake in woken {
            wake();
        }
    }

    fn leave(&self) {
        let mut counts = lock(&self.0.counts);
        counts.active -= 1;
        if counts.active == 0 {
            self.0.idle.notify_all();
        }
    }
}

/// A connection's membership in a [`Group`], which dropping ends.
#[derive(Debug)]
pub struct Member {
    group: Group,
    /// The guest was asked for the connection.
    has_begun: bool,
    delivered: bool,
    _permit: Option<Permit>,
}

impl Member {
    /// Returns the group.
    #[must_use]
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Counts bytes sent to the guest.
    pub fn count_to_guest(&self, bytes: u64) {
        self.group.0.to_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes received from the guest.
    pub fn count_from_guest(&self, bytes: u64) {
        self.group.0.from_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Marks the connection as requested: the guest may have data for the host from now on.
    pub fn begin(&mut self) {
        if !std::mem::replace(&mut self.has_begun, true) {
            lock(&self.group.0.counts).undelivered += 1;
        }
    }

    /// Marks the connection as delivered: all data of the guest have reached the host's
    /// socket.
    pub fn delivered(&mut self) {
        if self.has_begun && !std::mem::replace(&mut self.delivered, true) {
            self.group.delivered();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.delivered();
        self.group.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_dropped_permit_is_free_again_and_waiters_are_notified() {
        let limit = Limit::new(3);
        let first = limit.take(2).unwrap();
        assert!(limit.take(2).is_none());
        let (send, told) = channel();
        let refused = limit.take_or_wait(2, move || send.send(()).unwrap());
        assert!(refused.is_err());
        assert!(told.try_recv().is_err());
        drop(first);
        told.try_recv().unwrap();
        assert_eq!(limit.free(), 3);
        let all = limit.take_or_wait(3, || panic!("it need not wait"));
        assert_eq!(limit.free(), 0);
        drop(all);
    }

    #[test]
    fn members_are_counted_until_they_are_gone() {
        let group = Group::new();
        let limit = Limit::new(2);
        let mut one = group.join(limit.take(1));
        let mut other = group.join(limit.take(1));
        other.delivered();
        assert_eq!((group.active(), group.undelivered()), (2, 0));
        one.begin();
        other.begin();
        other.begin();
        assert_eq!((group.active(), group.undelivered()), (2, 2));
        one.count_to_guest(5);
        other.count_from_guest(7);
        let (send, told) = channel();
        group.when_delivered(move || send.send(()).unwrap());
        other.delivered();
        other.delivered();
        assert_eq!((group.active(), group.undelivered()), (2, 1));
        assert!(told.try_recv().is_err());
        drop(one);
        told.try_recv().unwrap();
        assert_eq!((group.active(), limit.free()), (1, 1));
        assert!(!group.wait_idle(Instant::now()));
        let waiting = group.clone();
        let wait = move || waiting.wait_idle(Instant::now() + Duration::from_secs(60));
        let waiter = std::thread::spawn(wait);
        drop(other);
        assert!(waiter.join().unwrap());
        assert_eq!((group.to_guest(), group.from_guest()), (5, 7));
    }
}
