//! The owners of descriptors and timers.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::queue::{Queue, Ready};
use crate::registry::{Reclaimer, Registration, Registry, Source};
use crate::{Deadlines, Interest, Timer};

/// Names a handler of a loop; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandlerId {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// The receiver of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The loop itself, which has tasks to run.
    Tasks,
    /// A handler, and its token.
    Handler(HandlerId, u64),
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// That of the next registration while the slot is free.
    generation: u32,
    /// `None` when the slot is free.
    target: Option<Target>,
    /// The registered descriptor; open as long as `target` is set.
    fd: RawFd,
    /// The slot's index among those of its handler.
    position: usize,
}

/// Descriptors and timers of all handlers.
#[derive(Debug)]
pub(super) struct Table {
    queue: Queue,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// The slots of each handler, by the handler's index.
    owned: Vec<Vec<u32>>,
    /// Calls that [`Registry::again`] asked for.
    pub(super) again: Vec<(HandlerId, u64)>,
    pub(super) timers: Deadlines<(HandlerId, u64)>,
}

/// A handler's view of the loop.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) table: &'a mut Table,
    pub(super) handler: HandlerId,
    pub(super) reclaimer: &'a Arc<Reclaimer>,
}

impl Registry for View<'_> {
    fn register(
        &mut self,
        fd: Source<'_>,
        token: u64,
        interest: Interest,
    ) -> io::Result<Registration> {
        let target = Target::Handler(self.handler, token);
        self.table.register(fd.as_fd(), target, interest)
    }

    fn reregister(
        &mut self,
        registration: Registration,
        fd: Source<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        if !self.table.has(registration, fd) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let (slot, generation) = (registration.slot(), registration.generation());
        self.table
            .queue
            .modify(slot, generation, fd.as_fd(), interest)
    }

    fn deregister(&mut self, registration: Registration, fd: Source<'_>) {
        if self.table.has(registration, fd) {
            self.table.release(registration);
        } else {
            tracing::error!(?fd, "a descriptor of another event loop cannot be removed");
        }
    }

    fn reclaimer(&self) -> Arc<Reclaimer> {
        Arc::clone(self.reclaimer)
    }

    fn again(&mut self, token: u64) {
        let call = (self.handler, token);
        if !self.table.again.contains(&call) {
            self.table.again.push(call);
        }
    }

    fn set_timer(&mut self, at: Instant, token: u64) -> Timer {
        self.table.timers.set(at, (self.handler, token))
    }

    fn cancel_timer(&mut self, timer: Timer) {
        self.table.timers.cancel(timer);
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

impl Table {
    /// A table that has a descriptor, open as long as the table lives, for
    /// [`Target::Tasks`].
    ///
    /// # Errors
    /// No descriptors to be had.
    pub(super) fn new(tasks: BorrowedFd<'_>) -> io::Result<Self> {
        let mut table = Self {
            queue: Queue::new()?,
            slots: Vec::new(),
            free: Vec::new(),
            owned: Vec::new(),
            again: Vec::new(),
            timers: Deadlines::new(),
        };
        table.register(tasks, Target::Tasks, Interest::READ)?;
        Ok(table)
    }

    fn register(
        &mut self,
        fd: BorrowedFd<'_>,
        target: Target,
        interest: Interest,
    ) -> io::Result<Registration> {
        let slot = self.free_slot()?;
        let entry = &mut self.slots[slot as usize];
        if let Err(error) = self.queue.add(slot, entry.generation, fd, interest) {
            self.free.push(slot);
            return Err(error);
        }
        entry.target = Some(target);
        entry.fd = fd.as_raw_fd();
        if let Target::Handler(handler, _) = target {
            let index = handler.index as usize;
            if self.owned.len() <= index {
                self.owned.resize_with(index + 1, Vec::new);
            }
            entry.position = self.owned[index].len();
            self.owned[index].push(slot);
        }
        Ok(Registration::new(slot, entry.generation))
    }

    fn free_slot(&mut self) -> io::Result<u32> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        let slot = u32::try_from(self.slots.len())
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.slots.push(Slot {
            generation: 0,
            target: None,
            fd: -1,
            position: 0,
        });
        self.queue.add_slot(slot);
        Ok(slot)
    }

    /// Returns true if a descriptor is registered here.
    fn has(&self, registration: Registration, fd: Source<'_>) -> bool {
        let slot = self.slots.get(registration.slot() as usize);
        slot.is_some_and(|slot| {
            slot.target.is_some()
                && slot.generation == registration.generation()
                && slot.fd == fd.as_fd().as_raw_fd()
        })
    }

    fn release(&mut self, registration: Registration) {
        let slot = registration.slot();
        let Some(entry) = self.slots.get_mut(slot as usize) else {
            return;
        };
        if entry.generation != registration.generation() {
            return;
        }
        let Some(target) = entry.target.take() else {
            return;
        };
        // Events that were fetched before are of another generation now.
        entry.generation = entry.generation.wrapping_add(1);
        let (fd, position) = (entry.fd, entry.position);
        if let Err(error) = self.queue.remove(slot, fd) {
            tracing::error!(%error, fd, "a descriptor was closed before it was removed");
        }
        self.free.push(slot);
        if let Target::Handler(handler, _) = target {
            let owned = &mut self.owned[handler.index as usize];
            owned.swap_remove(position);
            if let Some(&moved) = owned.get(position) {
                self.slots[moved as usize].position = position;
            }
        }
    }

    /// Removes all that a handler has registered, and its timers.
    pub(super) fn release_all(&mut self, handler: HandlerId) {
        while let Some(&slot) = self
            .owned
            .get(handler.index as usize)
            .and_then(|it| it.last())
        {
            let generation = self.slots[slot as usize].generation;
            self.release(Registration::new(slot, generation));
        }
        self.timers.retain(|&(owner, _)| owner != handler);
    }

    /// Waits for events, `timeout` at most.
    pub(super) fn wait(
        &mut self,
        timeout: Option<Duration>,
        ready: &mut Vec<Ready>,
    ) -> io::Result<()> {
        self.queue.wait(timeout, ready)
    }

    /// The receiver of an event; `None` if its registration has been removed.
    pub(super) fn target(&self, ready: &Ready) -> Option<Target> {
        let slot = self.slots.get(ready.slot as usize)?;
        (slot.generation == ready.generation)
            .then_some(slot.target)
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    fn handler(index: u32) -> HandlerId {
        HandlerId {
            index,
            generation: 0,
        }
    }

    /// The tokens of what is ready.
    fn tokens(table: &mut Table) -> Vec<u64> {
        let mut ready = Vec::new();
        table.wait(NOW, &mut ready).unwrap();
        let targets = ready.iter().filter_map(|it| table.target(it));
        targets
            .map(|target| match target {
                Target::Handler(_, token) => token,
                Target::Tasks => u64::MAX,
            })
            .collect()
    }

    #[test]
    fn a_descriptor_that_is_closed_too_early_ends_nothing() {
        let tasks = crate::new_eventfd().unwrap();
        let mut table = Table::new(tasks.as_fd()).unwrap();
        let (orphan_peer, orphan) = UnixStream::pair().unwrap();
        let duplicate = orphan.try_clone().unwrap();
        let target = |token| Target::Handler(handler(0), token);
        let registration = table
            .register(orphan.as_fd(), target(1), Interest::READ)
            .unwrap();
        // The kernel still has it, as there is a duplicate. `Registered` makes this
        // impossible.
        drop(orphan);
        table.release(registration);
        rustix::io::write(&orphan_peer, b"x").unwrap();
        assert_eq!(tokens(&mut table), []);
        // The slot is used again, the event of its former occupant is not.
        let (peer, other) = UnixStream::pair().unwrap();
        // Not under the number of the orphan, which the manager refuses from now on.
        let other = rustix::io::fcntl_dupfd_cloexec(&other, 100).unwrap();
        table
            .register(other.as_fd(), target(2), Interest::READ)
            .unwrap();
        assert_eq!(tokens(&mut table), []);
        rustix::io::write(&peer, b"x").unwrap();
        assert_eq!(tokens(&mut table), [2]);
        drop(duplicate);
    }

    #[test]
    fn handlers_own_what_they_registered() {
        let tasks = crate::new_eventfd().unwrap();
        let mut table = Table::new(tasks.as_fd()).unwrap();
        let fds: Vec<_> = (0..8).map(|_| crate::new_eventfd().unwrap()).collect();
        let mut registrations = Vec::new();
        for (token, fd) in (0u64..).zip(&fds) {
            crate::signal(fd.as_fd());
            let owner = handler(u32::from(token % 2 == 1));
            let target = Target::Handler(owner, token);
            registrations.push(table.register(fd.as_fd(), target, Interest::READ).unwrap());
            table.timers.set(Instant::now(), (owner, token));
        }
        table.release(registrations[2]);
        table.release(registrations[2]);
        table.release(registrations[1]);
        table.release_all(handler(0));
        let mut left = tokens(&mut table);
        left.sort_unstable();
        assert_eq!(left, [3, 5, 7]);
        assert_eq!(table.timers.len(), 4);
        table.release_all(handler(1));
        assert_eq!(tokens(&mut table), []);
        assert!(table.timers.is_empty());
        crate::signal(tasks.as_fd());
        assert_eq!(tokens(&mut table), [u64::MAX]);
    }
}
