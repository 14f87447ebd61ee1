//! Which descriptor is whose.

#![expect(
    unsafe_code,
    reason = "descriptors of a handler that goes away are known by number only"
)]

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll;

use crate::registered::{Reclaimer, Source};
use crate::registry::{Registration, Registry};
use crate::{Deadlines, Interest, Timer, flags};

/// Names a handler of a loop; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandlerId {
    pub(super) index: u32,
    pub(super) generation: u32,
}

fn data(registration: Registration) -> epoll::EventData {
    let (slot, generation) = (registration.slot(), registration.generation());
    epoll::EventData::new_u64(u64::from(generation) << 32 | u64::from(slot))
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    generation: u32,
    /// `None` when the slot is free.
    target: Option<(HandlerId, u64)>,
    /// What was registered; open as long as `target` is set.
    fd: RawFd,
}

/// Descriptors of all handlers.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) epoll: OwnedFd,
    slots: Vec<Slot>,
    free: Vec<u32>,
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
        let slot = match self.table.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.table.slots.len())
                    .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
                self.table.slots.push(Slot {
                    generation: 0,
                    target: None,
                    fd: -1,
                });
                slot
            }
        };
        let entry = &mut self.table.slots[slot as usize];
        let registration = Registration::new(slot, entry.generation);
        let added = epoll::add(&self.table.epoll, fd, data(registration), flags(interest));
        match added {
            Ok(()) => {
                entry.target = Some((self.handler, token));
                entry.fd = fd.as_fd().as_raw_fd();
                Ok(registration)
            }
            Err(error) => {
                self.table.free.push(slot);
                Err(error.into())
            }
        }
    }

    fn reregister(
        &mut self,
        registration: Registration,
        fd: Source<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        epoll::modify(&self.table.epoll, fd, data(registration), flags(interest))?;
        Ok(())
    }

    fn deregister(&mut self, registration: Registration, fd: Source<'_>) {
        // Fails for a descriptor that is gone from the set already.
        let _ = epoll::delete(&self.table.epoll, fd);
        self.table.release(registration);
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
    pub(super) fn new(epoll: OwnedFd) -> Self {
        Self {
            epoll,
            slots: Vec::new(),
            free: Vec::new(),
            again: Vec::new(),
            timers: Deadlines::new(),
        }
    }

    fn release(&mut self, registration: Registration) {
        if let Some(slot) = self.slots.get_mut(registration.slot() as usize)
            && slot.generation == registration.generation()
            && slot.target.take().is_some()
        {
            slot.generation = slot.generation.wrapping_add(1) & (u32::MAX >> 1);
            self.free.push(registration.slot());
        }
    }

    /// Frees the slots of a handler that goes away. Its descriptors leave the set
    /// too, as someone else may keep them open, and ready, for ever.
    pub(super) fn release_all(&mut self, handler: HandlerId) {
        self.timers.retain(|&(owner, _)| owner != handler);
        let slots = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        for slot in 0..slots {
            let entry = self.slots[slot as usize];
            if entry.target.is_some_and(|(owner, _)| owner == handler) {
                // SAFETY: the handler keeps what it registered open until it is
                // removed. Should it not, then the call fails, or ends the events
                // of another descriptor of this set: wrong, but not unsound.
                let fd = unsafe { BorrowedFd::borrow_raw(entry.fd) };
                let _ = epoll::delete(&self.epoll, fd);
                self.release(Registration::new(slot, entry.generation));
            }
        }
    }

    pub(super) fn target(&self, data: u64) -> Option<(HandlerId, u64)> {
        let slot = self.slots.get(usize::try_from(data & 0xffff_ffff).ok()?)?;
        (u64::from(slot.generation) == data >> 32)
            .then_some(slot.target)
            .flatten()
    }
}
