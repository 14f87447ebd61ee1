//! The kernel's event queue: `event-manager`, used so that handlers may add and remove
//! descriptors at any time.
//!
//! Its subscribers only note what is ready. The loop calls handlers when the whole batch
//! is collected, so none of them runs while the manager is borrowed, and drops what a
//! handler of the same batch has removed, by the generation that each event carries.
//!
//! Each slot has a subscriber of its own, which lives as long as the queue. The manager
//! searches a subscriber's list of descriptors for the one that is removed; a list that
//! has one entry makes removing independent of what else is registered. It also keeps
//! the manager from an event without a subscriber, which it takes for unreachable: it
//! forgets the subscriber of a descriptor when the subscriber is removed, even if epoll
//! still has the descriptor, and ours are not.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps as _,
};

use crate::registration::{Ready, Registration};
use crate::slab::Key;
use crate::{Interest, Readiness};

/// Locked by the loop's thread only: a lock instead of a cell lets a queue be created by
/// one thread and used by another.
type Batch = Arc<Mutex<Vec<Ready>>>;

/// Notes the events of one slot.
struct Collector {
    slot: u32,
    batch: Batch,
}

impl MutEventSubscriber for Collector {
    fn init(&mut self, _: &mut EventOps<'_>) {}

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let mut batch = self.batch.lock().unwrap_or_else(PoisonError::into_inner);
        batch.push(Ready {
            registration: Registration::new(self.slot, events.data()),
            readiness: readiness(events.event_set()),
        });
    }
}

/// Descriptors by their slots.
pub(crate) struct Queue {
    manager: EventManager<Collector>,
    /// By slot.
    subscribers: Vec<SubscriberId>,
    batch: Batch,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl Queue {
    /// A queue that takes at most `batch` events from the kernel at once.
    ///
    /// # Errors
    /// No descriptors are available.
    pub(crate) fn new(batch: usize) -> io::Result<Self> {
        Ok(Self {
            manager: EventManager::new_with_capacity(batch).map_err(system_error)?,
            subscribers: Vec::new(),
            batch: Batch::default(),
        })
    }

    /// The number of slots.
    pub(crate) fn slots(&self) -> usize {
        self.subscribers.len()
    }

    /// Creates another slot; its number is that of slots before.
    pub(crate) fn add_slot(&mut self) {
        // As many as keys, which a u32 counts.
        let slot = u32::try_from(self.slots()).unwrap_or(u32::MAX);
        let batch = Arc::clone(&self.batch);
        let collector = Collector { slot, batch };
        self.subscribers
            .push(self.manager.add_subscriber(collector));
    }

    /// Waits for a descriptor, which must stay open until it is removed, in a slot that
    /// has none.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for or is registered already, or no memory.
    pub(crate) fn add(
        &mut self,
        key: Key,
        fd: BorrowedFd<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        let events = Events::with_data(&fd, key.generation(), flags(interest));
        self.ops(key)?.add(events).map_err(system_error)
    }

    /// Replaces the interest in a slot's descriptor.
    ///
    /// # Errors
    /// It is not the slot's descriptor, or no memory.
    pub(crate) fn modify(
        &mut self,
        key: Key,
        fd: BorrowedFd<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        let events = Events::with_data(&fd, key.generation(), flags(interest));
        self.ops(key)?.modify(events).map_err(system_error)
    }

    /// Removes a slot's descriptor, by its number.
    ///
    /// # Errors
    /// It was closed before, against the rule. The manager refuses the number from then
    /// on; events that the kernel still reports for it have an old generation.
    pub(crate) fn remove(&mut self, key: Key, fd: RawFd) -> io::Result<()> {
        let events = Events::empty_raw(fd);
        self.ops(key)?.remove(events).map_err(system_error)
    }

    /// Waits for events, `timeout` at most, and appends them to `ready`.
    ///
    /// # Errors
    /// The operating system's error.
    pub(crate) fn wait(
        &mut self,
        timeout: Option<Duration>,
        ready: &mut Vec<Ready>,
    ) -> io::Result<()> {
        let milliseconds = timeout.map_or(-1, milliseconds);
        let waited = self.manager.run_with_timeout(milliseconds);
        ready.append(&mut self.batch.lock().unwrap_or_else(PoisonError::into_inner));
        waited.map(drop).map_err(system_error)
    }

    fn ops(&mut self, key: Key) -> io::Result<EventOps<'_>> {
        let id = self.subscribers.get(key.slot() as usize);
        let id = *id.ok_or(io::ErrorKind::NotFound)?;
        self.manager.event_ops(id).map_err(system_error)
    }
}

/// A time in whole milliseconds, rounded up: a loop that woke earlier would find that
/// nothing is due. One that is too long for the system call ends early, once in 24 days.
fn milliseconds(timeout: Duration) -> i32 {
    let rounded = timeout.as_nanos().div_ceil(1_000_000);
    i32::try_from(rounded).unwrap_or(i32::MAX)
}

fn flags(interest: Interest) -> EventSet {
    let mut flags = EventSet::empty();
    if interest.readable {
        flags |= EventSet::IN;
    }
    if interest.readable || interest.hangup {
        flags |= EventSet::READ_HANG_UP;
    }
    if interest.priority {
        flags |= EventSet::PRIORITY;
    }
    if interest.writable {
        flags |= EventSet::OUT;
    }
    if interest.edge {
        flags |= EventSet::EDGE_TRIGGERED;
    }
    flags
}

fn readiness(events: EventSet) -> Readiness {
    Readiness {
        readable: events.contains(EventSet::IN),
        writable: events.contains(EventSet::OUT),
        priority: events.contains(EventSet::PRIORITY),
        hangup: events.intersects(EventSet::HANG_UP | EventSet::READ_HANG_UP),
        closed: events.contains(EventSet::HANG_UP),
        error: events.contains(EventSet::ERROR),
    }
}

/// The error of the system call, where there was one.
fn system_error(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(error) => io::Error::from_raw_os_error(error.errno()),
        event_manager::Error::FdAlreadyRegistered => io::ErrorKind::AlreadyExists.into(),
        other => io::Error::other(other),
    }
}
