//! The owners of descriptors and timers.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::reactor::Reactor;
use crate::registration::{Ready, Registration};
use crate::registry::{Reclaimer, Registry, RegistryFd};
use crate::slab::Key;
use crate::{Interest, Timer};

/// Events taken from the kernel at once.
const BATCH: usize = 256;

/// Names a handler of a loop; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandlerId(pub(super) Key);

/// The receiver of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The loop itself, which has tasks to run.
    Tasks,
    /// A handler, and its token.
    Handler(HandlerId, u64),
}

/// A descriptor or timer that the loop waits for.
#[derive(Clone, Copy, Debug)]
struct Entry {
    target: Target,
    /// The registration's index among those of its handler.
    position: usize,
}

/// Descriptors and timers of all handlers.
#[derive(Debug)]
pub(super) struct Table {
    reactor: Reactor<Entry>,
    /// The registrations of each handler, by the handler's slot.
    owned: Vec<Vec<Registration>>,
    /// Calls that [`Registry::call_again`] asked for.
    pub(super) pending_calls: Vec<(HandlerId, u64)>,
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
        fd: RegistryFd<'_>,
        token: u64,
        interest: Interest,
    ) -> io::Result<Registration> {
        let target = Target::Handler(self.handler, token);
        self.table.register(fd.as_fd(), target, interest)
    }

    fn reregister(
        &mut self,
        registration: Registration,
        fd: RegistryFd<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        let fd = fd.as_fd();
        self.table.reactor.modify(registration, fd, interest)
    }

    fn deregister(&mut self, registration: Registration, fd: RegistryFd<'_>) {
        if self.table.reactor.has(registration, fd.as_fd()) {
            self.table.release(registration);
        } else {
            tracing::error!(?fd, "a descriptor of another event loop cannot be removed");
        }
    }

    fn reclaimer(&self) -> Arc<Reclaimer> {
        Arc::clone(self.reclaimer)
    }

    fn call_again(&mut self, token: u64) {
        let call = (self.handler, token);
        if !self.table.pending_calls.contains(&call) {
            self.table.pending_calls.push(call);
        }
    }

    fn set_timer(&mut self, at: Instant, token: u64) -> Timer {
        self.table.set_timer(at, self.handler, token)
    }

    fn cancel_timer(&mut self, timer: Timer) {
        self.table.reactor.cancel_timer(timer);
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
    /// No descriptors are available.
    pub(super) fn new(tasks: BorrowedFd<'_>) -> io::Result<Self> {
        let mut table = Self {
            reactor: Reactor::new(BATCH)?,
            owned: Vec::new(),
            pending_calls: Vec::new(),
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
        let mut entry = Entry {
            target,
            position: 0,
        };
        let Target::Handler(HandlerId(handler), _) = target else {
            return self.reactor.add(fd, interest, entry);
        };
        let index = handler.slot() as usize;
        if self.owned.len() <= index {
            self.owned.resize_with(index + 1, Vec::new);
        }
        let owned = &mut self.owned[index];
        entry.position = owned.len();
        let registration = self.reactor.add(fd, interest, entry)?;
        owned.push(registration);
        Ok(registration)
    }

    fn release(&mut self, registration: Registration) {
        let Some(&Entry { target, position }) = self.reactor.get(registration) else {
            return;
        };
        if let Err(error) = self.reactor.remove(registration) {
            tracing::error!(%error, "a descriptor was closed before it was removed");
        }
        if let Target::Handler(HandlerId(handler), _) = target {
            let owned = &mut self.owned[handler.slot() as usize];
            owned.swap_remove(position);
            if let Some(&moved) = owned.get(position)
                && let Some(entry) = self.reactor.get_mut(moved)
            {
                entry.position = position;
            }
        }
    }

    /// Removes all that a handler has registered, and its timers.
    pub(super) fn release_all(&mut self, handler: HandlerId) {
        let index = handler.0.slot() as usize;
        while let Some(&registration) = self.owned.get(index).and_then(|it| it.last()) {
            self.release(registration);
        }
        self.reactor.retain_timers(
            |entry| !matches!(entry.target, Target::Handler(id, _) if id == handler),
        );
    }

    fn set_timer(&mut self, at: Instant, handler: HandlerId, token: u64) -> Timer {
        let entry = Entry {
            target: Target::Handler(handler, token),
            position: 0,
        };
        self.reactor.set_timer(at, entry)
    }

    /// The number of timers.
    pub(super) fn timers(&self) -> usize {
        self.reactor.timers()
    }

    /// Removes the first timer that is due by `now`, and returns its receiver.
    pub(super) fn pop_timer(&mut self, now: Instant) -> Option<Target> {
        self.reactor.pop_timer(now).map(|entry| entry.target)
    }

    /// Waits for events until the next timer is due. Does not wait when a handler is to
    /// be called again.
    pub(super) fn wait(&mut self, ready: &mut Vec<Ready>) -> io::Result<()> {
        let limit = (!self.pending_calls.is_empty()).then_some(Duration::ZERO);
        self.reactor.wait(limit, ready)
    }

    /// The receiver of an event; `None` if its registration has been removed.
    pub(super) fn target(&self, ready: &Ready) -> Option<Target> {
        self.reactor.target(ready).map(|entry| entry.target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    fn handler(slot: u32) -> HandlerId {
        HandlerId(Key::new(slot, 0))
    }

    /// The tokens of what is ready.
    fn tokens(table: &mut Table) -> Vec<u64> {
        let mut ready = Vec::new();
        table.reactor.wait(NOW, &mut ready).unwrap();
        let targets = ready.iter().filter_map(|it| table.target(it));
        targets
            .map(|target| match target {
                Target::Handler(_, token) => token,
                Target::Tasks => u64::MAX,
            })
            .collect()
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
            table.set_timer(Instant::now(), owner, token);
        }
        table.release(registrations[2]);
        table.release(registrations[2]);
        table.release(registrations[1]);
        table.release_all(handler(0));
        let mut left = tokens(&mut table);
        left.sort_unstable();
        assert_eq!(left, [3, 5, 7]);
        assert_eq!(table.timers(), 4);
        table.release_all(handler(1));
        assert_eq!(tokens(&mut table), []);
        assert_eq!(table.timers(), 0);
        crate::signal(tasks.as_fd());
        assert_eq!(tokens(&mut table), [u64::MAX]);
    }
}
