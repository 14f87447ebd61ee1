//! A handler's view of the loop that calls it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::registered::{Reclaimer, Source};
use crate::{Interest, Timer};

/// Names a registered descriptor; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Registration {
    slot: u32,
    generation: u32,
}

impl Registration {
    /// The registration that a loop keeps in `slot`. `generation` differs from those of
    /// earlier occupants of the slot.
    #[must_use]
    pub const fn new(slot: u32, generation: u32) -> Self {
        Self { slot, generation }
    }

    /// The slot's number.
    #[must_use]
    pub const fn slot(self) -> u32 {
        self.slot
    }

    /// The generation of the slot.
    #[must_use]
    pub const fn generation(self) -> u32 {
        self.generation
    }
}

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
        fd: Source<'_>,
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
        fd: Source<'_>,
        interest: Interest,
    ) -> io::Result<()>;

    /// Removes a registration. An event that was fetched before is not delivered.
    fn deregister(&mut self, registration: Registration, fd: Source<'_>);

    /// Takes the descriptors of this handler that are dropped while they are registered.
    /// The loop removes their registrations soon after.
    fn reclaimer(&self) -> Arc<Reclaimer>;

    /// Calls [`EventHandler::ready`](crate::EventHandler::ready) with `token` and an empty readiness
    /// once the other handlers have had their turn: for work cut into slices.
    fn again(&mut self, token: u64);

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
