//! A handler's view of the loop that calls it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Interest, Registration, Timer};

/// A loop, as one of its handlers sees it.
///
/// [`EventLoop`](crate::EventLoop) has an implementation. Another loop calls the same
/// handlers when it has one too: it calls [`EventHandler::start`](crate::EventHandler::start) once and
/// [`EventHandler::ready`](crate::EventHandler::ready) for events, always on the same thread.
/// Handlers register descriptors by the methods of `dyn Registry`, which make a
/// [`Registered`](crate::Registered) of each.
pub trait Registry {
    /// Waits for `fd` until it is deregistered; the handler is called with `token`.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for, or no memory.
    fn register(
        &mut self,
        fd: RegistryFd<'_>,
        token: u64,
        interest: Interest,
    ) -> io::Result<Registration>;

    /// Replaces the interest in a registered descriptor, and reports a condition that
    /// holds once more.
    ///
    /// # Errors
    /// `fd` is not the registered descriptor.
    fn reregister(
        &mut self,
        registration: Registration,
        fd: RegistryFd<'_>,
        interest: Interest,
    ) -> io::Result<()>;

    /// Removes a registration. An event that was fetched before is not delivered.
    fn deregister(&mut self, registration: Registration, fd: RegistryFd<'_>);

    /// Takes the descriptors of this handler that are dropped while they are registered.
    /// The loop removes their registrations soon after.
    fn reclaimer(&self) -> Arc<Reclaimer>;

    /// Calls [`EventHandler::ready`](crate::EventHandler::ready) with `token` and an empty readiness
    /// once the other handlers have had their turn: for work cut into slices.
    fn call_again(&mut self, token: u64);

    /// Calls [`EventHandler::ready`](crate::EventHandler::ready) with `token` and an empty readiness
    /// once, as soon as `at` has passed.
    fn set_timer(&mut self, at: Instant, token: u64) -> Timer;

    /// Removes a timer. Nothing happens for one that was removed before, or has passed.
    fn cancel_timer(&mut self, timer: Timer);

    /// The time by the loop's clock, which is [`Instant::now`] outside tests.
    fn now(&self) -> Instant;
}

impl dyn Registry + '_ {
    /// Sets a timer that passes `after` from now; `None` when the clock cannot express
    /// that time.
    pub fn set_timer_after(&mut self, after: Duration, token: u64) -> Option<Timer> {
        let at = self.now().checked_add(after)?;
        Some(self.set_timer(at, token))
    }
}

/// An owner of a descriptor that a loop can wait for: a socket, an [`OwnedFd`], or an
/// [`Arc`] of one.
///
/// Its descriptor is always the same, and open as long as it lives.
///
/// [`OwnedFd`]: std::os::fd::OwnedFd
pub trait Descriptor: AsFd + Send + 'static {}

impl<F: AsFd + Send + 'static> Descriptor for F {}

/// A descriptor whose owner is, or is about to be, in a [`Registered`](crate::Registered). Only this crate
/// makes one, so an implementation of [`Registry`] can rely on it.
#[derive(Clone, Copy, Debug)]
pub struct RegistryFd<'a>(pub(crate) BorrowedFd<'a>);

impl AsFd for RegistryFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0
    }
}

/// Takes descriptors of a handler that were dropped while they were registered: a loop
/// has one for each handler.
pub struct Reclaimer {
    /// `None` when the handler has no registrations any more.
    reclaimed: Mutex<Option<Vec<Reclaimed>>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// A registration to be removed, with the owner of its descriptor.
pub struct Reclaimed {
    registration: Registration,
    owner: Box<dyn Descriptor>,
}

impl Reclaimed {
    /// Removes the registration and closes the descriptor, unless somebody else has it.
    pub fn remove_from(self, registry: &mut dyn Registry) {
        registry.deregister(self.registration, RegistryFd((*self.owner).as_fd()));
    }
}

impl Reclaimer {
    /// Calls `wake`, on any thread, when there is something to [`take`](Self::take).
    #[must_use]
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            reclaimed: Mutex::new(Some(Vec::new())),
            wake: Box::new(wake),
        }
    }

    /// Takes what was dropped.
    #[must_use]
    pub fn take(&self) -> Vec<Reclaimed> {
        let mut reclaimed = self.lock();
        reclaimed.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Has descriptors closed at once from now on, as all registrations are removed.
    pub fn close(&self) {
        // Dropped after the lock: an owner may do anything.
        let reclaimed = self.lock().take();
        drop(reclaimed);
    }

    pub(crate) fn reclaim(&self, registration: Registration, fd: impl Descriptor) {
        let mut reclaimed = self.lock();
        let Some(list) = &mut *reclaimed else {
            drop(reclaimed);
            return drop(fd);
        };
        list.push(Reclaimed {
            registration,
            owner: Box::new(fd),
        });
        let first = list.len() == 1;
        drop(reclaimed);
        if first {
            (self.wake)();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Reclaimed>>> {
        // Nothing panics while it holds the lock.
        self.reclaimed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Reclaimer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reclaimer").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Reclaimed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reclaimed").finish_non_exhaustive()
    }
}
