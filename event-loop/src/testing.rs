//! A loop for tests that is driven by hand.
//!
//! It has no thread: [`ManualLoop::turn`] delivers the events that there are and
//! returns, so a test decides when a handler runs, and in which order things happen. Its
//! clock stands still until [`ManualLoop::advance`] is called. It passes the same tests
//! as [`EventLoop`](crate::EventLoop), with another table of its own.
#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a test that cannot go on is a failed test"
)]

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};

use crate::slab::Key;
use crate::{
    Deadlines, EventHandler, HandlerId, Interest, Readiness, Reclaimer, Registration, Registry,
    RegistryFd, Timer,
};

/// Events taken from the kernel at once.
const BATCH: usize = 16;

/// A descriptor that somebody waits for.
struct Awaited {
    handler: HandlerId,
    token: u64,
    /// A duplicate of what was registered, which epoll has.
    fd: OwnedFd,
}

/// The part of the loop that handlers can reach.
struct State {
    epoll: OwnedFd,
    sources: HashMap<u32, Awaited>,
    next_source: u32,
    calls: VecDeque<(HandlerId, u64)>,
    timers: Deadlines<(HandlerId, u64)>,
    now: Instant,
}

#[derive(Clone)]
struct Handler {
    itself: Arc<Mutex<dyn EventHandler>>,
    reclaimer: Arc<Reclaimer>,
}

/// See the module's documentation.
pub struct ManualLoop {
    state: State,
    handlers: HashMap<HandlerId, Handler>,
    next_handler: u32,
}

impl std::fmt::Debug for ManualLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManualLoop").finish_non_exhaustive()
    }
}

impl Default for ManualLoop {
    fn default() -> Self {
        Self::new()
    }
}

impl ManualLoop {
    /// A loop without handlers.
    #[must_use]
    pub fn new() -> Self {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("there are descriptors");
        Self {
            state: State {
                epoll,
                sources: HashMap::new(),
                next_source: 0,
                calls: VecDeque::new(),
                timers: Deadlines::new(),
                now: Instant::now(),
            },
            handlers: HashMap::new(),
            next_handler: 0,
        }
    }

    /// Adds a handler and starts it.
    ///
    /// # Errors
    /// The error of [`EventHandler::start`].
    pub fn add_handler(&mut self, handler: Arc<Mutex<dyn EventHandler>>) -> io::Result<HandlerId> {
        let id = HandlerId(Key::new(self.next_handler, 0));
        self.next_handler += 1;
        // Each turn takes what there is.
        let reclaimer = Arc::new(Reclaimer::new(|| {}));
        let itself = handler.clone();
        self.handlers.insert(id, Handler { itself, reclaimer });
        let started = self.with(id, |registry| {
            let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
            handler.start(registry)
        });
        if let Some(Err(error)) = started {
            self.remove_handler(id);
            return Err(error);
        }
        Ok(id)
    }

    /// Removes a handler with all that it registered.
    pub fn remove_handler(&mut self, id: HandlerId) {
        let State { epoll, sources, .. } = &mut self.state;
        for (_, source) in sources.extract_if(|_, source| source.handler == id) {
            let _ = epoll::delete(&*epoll, &source.fd);
        }
        self.state.calls.retain(|&(handler, _)| handler != id);
        self.state.timers.retain(|&(handler, _)| handler != id);
        if let Some(handler) = self.handlers.remove(&id) {
            handler.reclaimer.close();
        }
    }

    /// Runs `task` with the registry of a handler; `None` when that is gone.
    pub fn with<R>(
        &mut self,
        id: HandlerId,
        task: impl FnOnce(&mut dyn Registry) -> R,
    ) -> Option<R> {
        let handler = self.handlers.get(&id)?;
        Some(task(&mut ManualRegistry {
            state: &mut self.state,
            handler: id,
            reclaimer: &handler.reclaimer,
        }))
    }

    /// Sets the clock forward. The timers that pass by that are called in the next turn.
    pub fn advance(&mut self, by: Duration) {
        self.state.now += by;
    }

    /// Returns the time until the next timer expires; `None` without a timer.
    #[must_use]
    pub fn until_timer(&self) -> Option<Duration> {
        let next = self.state.timers.earliest()?;
        Some(next.saturating_duration_since(self.state.now))
    }

    /// Delivers some of the events that there are now. Returns false when there were
    /// none.
    pub fn turn(&mut self) -> bool {
        let dropped: Vec<_> = self
            .handlers
            .iter()
            .map(|(&id, it)| (id, it.reclaimer.take()))
            .collect();
        for (id, reclaimed) in dropped {
            self.with(id, |registry| {
                for one in reclaimed {
                    one.remove_from(registry);
                }
            });
        }
        let mut events = Vec::with_capacity(BATCH);
        let at_once = Timespec::default();
        let room = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.state.epoll, room, Some(&at_once)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("waiting for events: {error}"),
        }
        let calls = std::mem::take(&mut self.state.calls);
        let mut busy = !events.is_empty() || !calls.is_empty();
        for event in events {
            let source = u32::try_from(event.data.u64()).ok();
            // Unless it was removed by a call before.
            let source = source.and_then(|source| self.state.sources.get(&source));
            if let Some(&Awaited { handler, token, .. }) = source {
                self.notify(handler, token, readiness(event.flags));
            }
        }
        for (handler, token) in calls {
            self.notify(handler, token, Readiness::default());
        }
        for _ in 0..self.state.timers.len() {
            let Some((handler, token)) = self.state.timers.pop(self.state.now) else {
                break;
            };
            self.notify(handler, token, Readiness::default());
            busy = true;
        }
        busy
    }

    /// Delivers events until there are none.
    pub fn settle(&mut self) {
        while self.turn() {}
    }

    fn notify(&mut self, id: HandlerId, token: u64, readiness: Readiness) {
        let Some(handler) = self.handlers.get(&id).cloned() else {
            return;
        };
        let mut registry = ManualRegistry {
            state: &mut self.state,
            handler: id,
            reclaimer: &handler.reclaimer,
        };
        let mut handler = handler
            .itself
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        handler.ready(token, readiness, &mut registry);
    }
}

struct ManualRegistry<'a> {
    state: &'a mut State,
    handler: HandlerId,
    reclaimer: &'a Arc<Reclaimer>,
}

impl Registry for ManualRegistry<'_> {
    fn register(
        &mut self,
        fd: RegistryFd<'_>,
        token: u64,
        interest: Interest,
    ) -> io::Result<Registration> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        let number = self.state.next_source;
        let data = epoll::EventData::new_u64(number.into());
        epoll::add(&self.state.epoll, &fd, data, flags(interest))?;
        self.state.next_source += 1;
        let handler = self.handler;
        let source = Awaited { handler, token, fd };
        self.state.sources.insert(number, source);
        Ok(Registration::new(number, 0))
    }

    fn reregister(
        &mut self,
        registration: Registration,
        _fd: RegistryFd<'_>,
        interest: Interest,
    ) -> io::Result<()> {
        let source = self.state.sources.get(&registration.slot());
        let source = source.ok_or(io::ErrorKind::NotFound)?;
        let data = epoll::EventData::new_u64(registration.slot().into());
        epoll::modify(&self.state.epoll, &source.fd, data, flags(interest))?;
        Ok(())
    }

    fn deregister(&mut self, registration: Registration, _fd: RegistryFd<'_>) {
        if let Some(source) = self.state.sources.remove(&registration.slot()) {
            let _ = epoll::delete(&self.state.epoll, &source.fd);
        }
    }

    fn reclaimer(&self) -> Arc<Reclaimer> {
        Arc::clone(self.reclaimer)
    }

    fn call_again(&mut self, token: u64) {
        let call = (self.handler, token);
        if !self.state.calls.contains(&call) {
            self.state.calls.push_back(call);
        }
    }

    fn set_timer(&mut self, at: Instant, token: u64) -> Timer {
        self.state.timers.set(at, (self.handler, token))
    }

    fn cancel_timer(&mut self, timer: Timer) {
        self.state.timers.cancel(timer);
    }

    fn now(&self) -> Instant {
        self.state.now
    }
}

/// Epoll's words for an interest.
fn flags(interest: Interest) -> EventFlags {
    let mut flags = EventFlags::empty();
    if interest.readable {
        flags |= EventFlags::IN;
    }
    if interest.readable || interest.hangup {
        flags |= EventFlags::RDHUP;
    }
    if interest.priority {
        flags |= EventFlags::PRI;
    }
    if interest.writable {
        flags |= EventFlags::OUT;
    }
    if interest.edge {
        flags |= EventFlags::ET;
    }
    flags
}

/// Epoll's words for what is ready.
fn readiness(flags: EventFlags) -> Readiness {
    Readiness {
        readable: flags.contains(EventFlags::IN),
        writable: flags.contains(EventFlags::OUT),
        priority: flags.contains(EventFlags::PRI),
        hangup: flags.intersects(EventFlags::HUP | EventFlags::RDHUP),
        closed: flags.contains(EventFlags::HUP),
        error: flags.contains(EventFlags::ERR),
    }
}
