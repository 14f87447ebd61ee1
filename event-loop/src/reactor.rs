//! One thread's wait for descriptors and timers, without handlers.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use crate::queue::Queue;
use crate::registration::{Ready, Registration};
use crate::slab::Slab;
use crate::{Deadlines, Interest, Timer};

/// Descriptors and timers that one thread waits for, each with a target: a value that
/// says what it is for.
///
/// [`wait`](Self::wait) fetches events, and calls nothing. The caller processes them one
/// by one, and may add and remove descriptors and timers in between.
///
/// ```
/// use std::io::Write as _;
/// use std::os::fd::AsFd as _;
/// use std::os::unix::net::UnixStream;
/// use std::time::{Duration, Instant};
///
/// use sm_event_loop::{Interest, Reactor};
///
/// # fn main() -> std::io::Result<()> {
/// let mut reactor = Reactor::new(64)?;
/// let (ours, mut theirs) = UnixStream::pair()?;
/// let registration = reactor.add(ours.as_fd(), Interest::READ, "socket")?;
/// reactor.set_timer(Instant::now() + Duration::from_secs(3600), "timeout");
/// theirs.write_all(b"x")?;
///
/// let mut batch = Vec::new();
/// reactor.wait(None, &mut batch)?;
/// for ready in batch.drain(..) {
///     assert_eq!(reactor.target(&ready), Some(&"socket"));
///     assert!(ready.readiness.readable);
/// }
/// assert_eq!(reactor.pop_timer(Instant::now()), None);
/// reactor.remove(registration)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Reactor<T> {
    queue: Queue,
    sources: Slab<Source<T>>,
    timers: Deadlines<T>,
}

/// A registered descriptor, which is open.
#[derive(Debug)]
struct Source<T> {
    fd: RawFd,
    target: T,
}

impl<T> Reactor<T> {
    /// A reactor that fetches at most `batch` events at once.
    ///
    /// # Errors
    /// No descriptors are available.
    pub fn new(batch: usize) -> io::Result<Self> {
        Ok(Self {
            queue: Queue::new(batch)?,
            sources: Slab::new(),
            timers: Deadlines::new(),
        })
    }

    /// Waits for `fd` from now on. It must be removed before it is closed: the kernel
    /// keeps a registration as long as the open file exists, while the number may already
    /// name another file. The reactor refuses that number from then on.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for or is registered already, or no memory.
    pub fn add(
        &mut self,
        fd: BorrowedFd<'_>,
        interest: Interest,
        target: T,
    ) -> io::Result<Registration> {
        let raw = fd.as_raw_fd();
        let key = self.sources.insert(Source { fd: raw, target });
        while self.queue.slots() < self.sources.slots() {
            self.queue.add_slot();
        }
        if let Err(error) = self.queue.add(key, fd, interest) {
            self.sources.remove(key);
            return Err(error);
        }
        Ok(Registration(key))
    }

    /// Replaces the interest in a registered descriptor, and reports a condition that
    /// holds once more.
    ///
    /// # Errors
    /// `fd` is not the registered descriptor, or no memory.
    pub fn modify(
        &mut self,
        registration: Registration,
        fd: BorrowedFd<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        if !self.has(registration, fd) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.queue.modify(registration.0, fd, interest)
    }

    /// Removes a registration, and returns its target; `None` when it was removed before.
    /// An event that was fetched before has no target any more.
    ///
    /// # Errors
    /// The descriptor was closed before, against the rule. It is removed nevertheless.
    pub fn remove(&mut self, registration: Registration) -> io::Result<Option<T>> {
        let Some(source) = self.sources.remove(registration.0) else {
            return Ok(None);
        };
        self.queue.remove(registration.0, source.fd)?;
        Ok(Some(source.target))
    }

    /// Returns true if `fd` is the registered descriptor.
    #[must_use]
    pub fn has(&self, registration: Registration, fd: BorrowedFd<'_>) -> bool {
        let source = self.sources.get(registration.0);
        source.is_some_and(|source| source.fd == fd.as_raw_fd())
    }

    /// Adds a timer that is due at `at`.
    pub fn set_timer(&mut self, at: Instant, target: T) -> Timer {
        self.timers.set(at, target)
    }

    /// Removes a timer, and returns its target; `None` when it was removed before.
    pub fn cancel_timer(&mut self, timer: Timer) -> Option<T> {
        self.timers.cancel(timer)
    }

    /// Returns true until [`cancel_timer`](Self::cancel_timer) or
    /// [`pop_timer`](Self::pop_timer) removes the timer, also while it is due.
    #[must_use]
    pub fn has_timer(&self, timer: Timer) -> bool {
        self.timers.contains(timer)
    }

    /// Removes the first timer that is due by `now`, and returns its target.
    pub fn pop_timer(&mut self, now: Instant) -> Option<T> {
        self.timers.pop(now)
    }

    /// Waits until a descriptor is ready, a timer is due or `limit` has passed, and
    /// appends the events of descriptors to `batch`. A signal may end it earlier.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&mut self, limit: Option<Duration>, batch: &mut Vec<Ready>) -> io::Result<()> {
        let mut timeout = limit;
        if limit != Some(Duration::ZERO)
            && let Some(at) = self.timers.earliest()
        {
            let left = at.saturating_duration_since(Instant::now());
            timeout = Some(limit.map_or(left, |limit| limit.min(left)));
        }
        self.queue.wait(timeout, batch)
    }

    /// The target of an event; `None` if its registration has been removed.
    #[must_use]
    pub fn target(&self, ready: &Ready) -> Option<&T> {
        self.get(ready.registration)
    }

    /// The target of a registration; `None` if it has been removed.
    #[must_use]
    pub fn get(&self, registration: Registration) -> Option<&T> {
        self.sources.get(registration.0).map(|it| &it.target)
    }

    /// The target of a registration; `None` if it has been removed.
    #[must_use]
    pub fn get_mut(&mut self, registration: Registration) -> Option<&mut T> {
        self.sources
            .get_mut(registration.0)
            .map(|it| &mut it.target)
    }

    /// The number of registered descriptors.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.sources.len()
    }

    /// The number of timers.
    #[must_use]
    pub fn timers(&self) -> usize {
        self.timers.len()
    }

    /// Removes the timers for whose targets `keep` is false.
    pub fn retain_timers(&mut self, keep: impl FnMut(&T) -> bool) {
        self.timers.retain(keep);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    /// The targets of what is ready.
    fn ready(reactor: &mut Reactor<u32>) -> Vec<u32> {
        let mut batch = Vec::new();
        reactor.wait(NOW, &mut batch).unwrap();
        let targets = batch.iter().filter_map(|ready| reactor.target(ready));
        targets.copied().collect()
    }

    #[test]
    fn an_event_of_a_removed_registration_has_no_target() {
        let mut reactor = Reactor::new(16).unwrap();
        let fd = crate::new_eventfd().unwrap();
        crate::signal(fd.as_fd());
        let first = reactor.add(fd.as_fd(), Interest::READ, 1).unwrap();
        let mut batch = Vec::new();
        reactor.wait(None, &mut batch).unwrap();
        assert_eq!(reactor.target(&batch[0]), Some(&1));
        assert_eq!(reactor.remove(first).unwrap(), Some(1));
        // The same descriptor in the same slot.
        let second = reactor.add(fd.as_fd(), Interest::READ, 2).unwrap();
        assert_eq!(first.slot(), second.slot());
        assert_eq!(reactor.target(&batch[0]), None);
        assert_eq!(reactor.get(second), Some(&2));
        assert_eq!(reactor.remove(first).unwrap(), None);
        let stale = reactor.modify(first, fd.as_fd(), Interest::WRITE);
        assert_eq!(stale.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(ready(&mut reactor), [2]);
    }

    #[test]
    fn a_descriptor_that_is_closed_too_early_ends_nothing() {
        let mut reactor = Reactor::new(16).unwrap();
        let (orphan_peer, orphan) = UnixStream::pair().unwrap();
        let duplicate = orphan.try_clone().unwrap();
        let registration = reactor.add(orphan.as_fd(), Interest::READ, 1).unwrap();
        // The kernel still has it, as there is a duplicate.
        drop(orphan);
        reactor.remove(registration).unwrap_err();
        rustix::io::write(&orphan_peer, b"x").unwrap();
        assert_eq!(ready(&mut reactor), []);
        // The slot is used again, the event of its former occupant is not.
        let (peer, other) = UnixStream::pair().unwrap();
        // Not under the number of the orphan, which the manager refuses from now on.
        let other = rustix::io::fcntl_dupfd_cloexec(&other, 100).unwrap();
        reactor.add(other.as_fd(), Interest::READ, 2).unwrap();
        assert_eq!(ready(&mut reactor), []);
        rustix::io::write(&peer, b"x").unwrap();
        assert_eq!(ready(&mut reactor), [2]);
        drop(duplicate);
    }

    #[test]
    fn a_refused_descriptor_leaves_nothing_behind() {
        let mut reactor = Reactor::new(16).unwrap();
        // epoll refuses regular files and directories.
        let directory = std::fs::File::open("/").unwrap();
        for _ in 0..3 {
            reactor
                .add(directory.as_fd(), Interest::READ, 1)
                .unwrap_err();
        }
        let fd = crate::new_eventfd().unwrap();
        let first = reactor.add(fd.as_fd(), Interest::READ, 2).unwrap();
        let twice = reactor.add(fd.as_fd(), Interest::READ, 3);
        assert_eq!(twice.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!((reactor.descriptors(), first.slot()), (1, 0));
        crate::signal(fd.as_fd());
        assert_eq!(ready(&mut reactor), [2]);
    }

    #[test]
    fn ten_thousand_registrations_touch_a_slot_each() {
        const AT_ONCE: u32 = 500;
        const ROUNDS: u32 = 20;
        let mut reactor = Reactor::new(16).unwrap();
        let fds: Vec<_> = (0..AT_ONCE)
            .map(|_| crate::new_eventfd().unwrap())
            .collect();
        for round in 0..ROUNDS {
            let mut own: Vec<_> = (0..)
                .zip(&fds)
                .map(|(n, fd)| {
                    let target = round * AT_ONCE + n;
                    let registration = reactor.add(fd.as_fd(), Interest::READ, target);
                    (registration.unwrap(), target)
                })
                .collect();
            // The generation counts how often a slot was used: only by its own
            // descriptors, once a round.
            assert!(own.iter().all(|(it, _)| it.generation() == round));
            // The manager searches the list of a slot: each has one descriptor.
            assert_eq!(reactor.queue.slots(), fds.len());
            assert_eq!(reactor.descriptors(), fds.len());
            let last = fds.last().unwrap().as_fd();
            crate::signal(last);
            assert_eq!(ready(&mut reactor), [(round + 1) * AT_ONCE - 1]);
            assert!(crate::drain(last));
            // From the middle, the end and the start.
            own.rotate_left(fds.len() / 2);
            for (registration, target) in own {
                assert_eq!(reactor.remove(registration).unwrap(), Some(target));
            }
            assert_eq!(reactor.descriptors(), 0);
        }
        assert_eq!(reactor.sources.slots(), fds.len());
    }

    #[test]
    fn cancelled_timers_leave_nothing_behind() {
        let mut reactor: Reactor<u32> = Reactor::new(16).unwrap();
        let day = Instant::now() + Duration::from_secs(86_400);
        for round in 0..10_000 {
            let timer = reactor.set_timer(day, round);
            assert_eq!(timer.at(), day);
            assert_eq!(reactor.timers(), 1);
            assert!(reactor.has_timer(timer));
            assert_eq!(reactor.cancel_timer(timer), Some(round));
            assert_eq!(reactor.cancel_timer(timer), None);
            assert!(!reactor.has_timer(timer));
        }
        assert_eq!(reactor.timers(), 0);
        assert_eq!(reactor.pop_timer(day), None);
    }

    #[test]
    fn the_first_timer_ends_the_wait() {
        let mut reactor = Reactor::new(16).unwrap();
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        reactor.set_timer(after(3_600_000), 1);
        reactor.set_timer(after(5), 2);
        let mut batch = Vec::new();
        // Otherwise it would wait for an hour.
        reactor.wait(None, &mut batch).unwrap();
        let limit = Some(Duration::from_secs(3600));
        reactor.wait(limit, &mut batch).unwrap();
        assert!(batch.is_empty());
        assert_eq!(reactor.pop_timer(Instant::now()), Some(2));
        assert_eq!(reactor.pop_timer(Instant::now()), None);
    }
}
