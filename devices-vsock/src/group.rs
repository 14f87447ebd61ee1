//! Connections that belong together: limited, counted, waited for and ended
//! together.
//!
//! Whoever opens connections for others (a frontend) makes each of them a member
//! of its [`Group`]. Groups can share a [`Limit`], such as the descriptors that a
//! process may have.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Called once when what was waited for has come, on whatever thread brought it:
/// short.
pub type Waker = Box<dyn FnOnce() + Send>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of things, such as file descriptors, that several groups share.
/// Clones are the same limit.
#[derive(Clone)]
pub struct Limit(Arc<Mutex<Pool>>);

struct Pool {
    free: usize,
    waiting: Vec<Waker>,
}

impl Limit {
    /// So many, all of them free.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self(Arc::new(Mutex::new(Pool {
            free: total,
            waiting: Vec::new(),
        })))
    }

    /// As many as anybody wants.
    #[must_use]
    pub fn none() -> Self {
        Self::new(usize::MAX)
    }

    /// How many are free now.
    #[must_use]
    pub fn free(&self) -> usize {
        lock(&self.0).free
    }

    /// Takes `count` of them, all or none.
    #[must_use]
    pub fn take(&self, count: usize) -> Option<Permit> {
        let mut pool = lock(&self.0);
        pool.free = pool.free.checked_sub(count)?;
        Some(Permit {
            limit: self.clone(),
            count,
        })
    }

    /// Takes `count` of them, or has `wake` called when some are given back: then
    /// is the time to try again.
    ///
    /// # Errors
    /// There are not as many.
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

/// A share of a [`Limit`], given back when this is dropped.
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
        // Not in the lock: they may take what has become free.
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
    /// Signalled when there is no member left.
    idle: Condvar,
    to_guest: AtomicU64,
    from_guest: AtomicU64,
}

/// Connections that belong together. Clones are the same group.
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
    /// A group without members.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A new member, which holds `permit` for as long as it is one.
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

    /// Members now.
    #[must_use]
    pub fn active(&self) -> usize {
        lock(&self.0.counts).active
    }

    /// Members to whose host side the guest may still have something to say.
    #[must_use]
    pub fn undelivered(&self) -> usize {
        lock(&self.0.counts).undelivered
    }

    /// Bytes that members, past ones too, have sent to the guest.
    #[must_use]
    pub fn to_guest(&self) -> u64 {
        self.0.to_guest.load(Ordering::Relaxed)
    }

    /// Bytes that members, past ones too, have got from the guest.
    #[must_use]
    pub fn from_guest(&self) -> u64 {
        self.0.from_guest.load(Ordering::Relaxed)
    }

    /// Waits until there are no members. `false` when there still are at the
    /// deadline.
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

    /// Has `wake` called as soon as nothing that the guest has to say is left
    /// undelivered: at once if that is so.
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

/// A connection's membership in a [`Group`]; it ends when this is dropped.
#[derive(Debug)]
pub struct Member {
    group: Group,
    /// The guest was asked for the connection.
    has_begun: bool,
    delivered: bool,
    _permit: Option<Permit>,
}

impl Member {
    /// What it is a member of.
    #[must_use]
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Counts bytes sent to the guest.
    pub fn count_to_guest(&self, bytes: u64) {
        self.group.0.to_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that came from the guest.
    pub fn count_from_guest(&self, bytes: u64) {
        self.group.0.from_guest.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The guest is asked for the connection, and may have something to say from
    /// now on.
    pub fn begin(&mut self) {
        if !std::mem::replace(&mut self.has_begun, true) {
            lock(&self.group.0.counts).undelivered += 1;
        }
    }

    /// All that the guest had to say has reached the host's socket.
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
    fn a_share_is_given_back_and_whoever_waits_is_told() {
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
        let all = limit.take_or_wait(3, || panic!("there is no need to wait"));
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
