//! The device event loop: one thread that waits for file descriptors and calls
//! handlers.
//!
//! A handler registers descriptors under tokens of its own and is called when
//! one is ready. Registrations carry a generation, so an event that was fetched
//! before its registration was removed is never delivered, even if the
//! descriptor number or the slot has been reused in between; that is why this is
//! a layer over epoll (through `rustix`) rather than over `event-manager`, which
//! finds handlers by descriptor number. A host without epoll gets another
//! implementation of the same few calls.
//!
//! Architecture invariants: nothing is allocated for an event; a handler that is
//! gone is never called, and never keeps the loop awake.

#![expect(
    unsafe_code,
    reason = "descriptors of a handler that goes away are known by number only"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

/// Events taken from the kernel at once.
const BATCH: usize = 256;
/// Epoll data of the loop's own wake-up descriptor.
const WAKE: u64 = u64::MAX;

/// What a file descriptor is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Reading will not block.
    pub readable: bool,
    /// Writing will not block.
    pub writable: bool,
    /// The peer closed its side, or both.
    pub hangup: bool,
    /// The descriptor is in an error state.
    pub error: bool,
}

/// What a handler wants to know of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Tell when reading will not block, or the peer shut down its writing side.
    pub readable: bool,
    /// Tell when writing will not block.
    pub writable: bool,
    /// Tell only of changes (edge-triggered), not as long as it is so.
    pub edge: bool,
}

impl Interest {
    /// Level-triggered reading.
    pub const READ: Self = Self {
        readable: true,
        writable: false,
        edge: false,
    };
    /// Level-triggered writing.
    pub const WRITE: Self = Self {
        readable: false,
        writable: true,
        edge: false,
    };
    /// Nothing but errors and full hang-up, which are always told.
    pub const NONE: Self = Self {
        readable: false,
        writable: false,
        edge: false,
    };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        if self.readable {
            flags |= epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        }
        if self.writable {
            flags |= epoll::EventFlags::OUT;
        }
        if self.edge {
            flags |= epoll::EventFlags::ET;
        }
        flags
    }
}

/// Something that file descriptors wake up. Runs on the loop's thread only.
pub trait EventHandler: Send {
    /// Called once, when the handler is added: registers its first descriptors.
    ///
    /// # Errors
    /// The handler is then not added.
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()>;

    /// The descriptor registered under `token` is ready. Must not block.
    /// `readiness` is empty for a token given to [`Registry::again`].
    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut Registry<'_>);
}

/// Names a handler of a loop; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandlerId {
    index: u32,
    generation: u32,
}

/// Names a registered descriptor; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Registration {
    slot: u32,
    generation: u32,
}

impl Registration {
    fn data(self) -> epoll::EventData {
        epoll::EventData::new_u64(u64::from(self.generation) << 32 | u64::from(self.slot))
    }
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
struct Table {
    epoll: OwnedFd,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Calls asked for with [`Registry::again`].
    again: Vec<(HandlerId, u64)>,
}

/// A handler's view of the loop's descriptors.
#[derive(Debug)]
pub struct Registry<'a> {
    table: &'a mut Table,
    handler: HandlerId,
}

impl Registry<'_> {
    /// Registers a descriptor. It must stay open until it is removed (or its
    /// handler is): the loop would otherwise let go of whatever has its number by
    /// then.
    ///
    /// # Errors
    /// A descriptor that cannot be waited for, or no memory.
    pub fn add(
        &mut self,
        fd: impl AsFd,
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
        let registration = Registration {
            slot,
            generation: entry.generation,
        };
        let fd = fd.as_fd();
        let added = epoll::add(&self.table.epoll, fd, registration.data(), interest.flags());
        match added {
            Ok(()) => {
                entry.target = Some((self.handler, token));
                entry.fd = fd.as_raw_fd();
                Ok(registration)
            }
            Err(error) => {
                self.table.free.push(slot);
                Err(error.into())
            }
        }
    }

    /// Changes what is told of a registered descriptor. Also arms an
    /// edge-triggered one again: a condition that holds is told once more.
    ///
    /// # Errors
    /// `fd` is not the registered descriptor.
    pub fn modify(
        &mut self,
        registration: Registration,
        fd: impl AsFd,
        interest: Interest,
    ) -> io::Result<()> {
        epoll::modify(&self.table.epoll, fd, registration.data(), interest.flags())?;
        Ok(())
    }

    /// Removes a registration; events already fetched for it are dropped.
    pub fn remove(&mut self, registration: Registration, fd: impl AsFd) {
        // Fails for a descriptor that is gone from the set already.
        let _ = epoll::delete(&self.table.epoll, fd);
        self.table.release(registration);
    }

    /// Has [`EventHandler::ready`] called with `token` and an empty readiness
    /// once the other handlers have had their turn: for work cut into slices.
    pub fn again(&mut self, token: u64) {
        let call = (self.handler, token);
        if !self.table.again.contains(&call) {
            self.table.again.push(call);
        }
    }
}

impl Table {
    fn release(&mut self, registration: Registration) {
        if let Some(slot) = self.slots.get_mut(registration.slot as usize)
            && slot.generation == registration.generation
            && slot.target.take().is_some()
        {
            slot.generation = slot.generation.wrapping_add(1) & (u32::MAX >> 1);
            self.free.push(registration.slot);
        }
    }

    /// Frees the slots of a handler that goes away. Its descriptors leave the set
    /// too, as someone else may keep them open, and ready, for ever.
    fn release_all(&mut self, handler: HandlerId) {
        let slots = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        for slot in 0..slots {
            let entry = self.slots[slot as usize];
            if entry.target.is_some_and(|(owner, _)| owner == handler) {
                // SAFETY: the handler keeps what it registered open until it is
                // removed. Should it not, then the call fails, or ends the events
                // of another descriptor of this set: wrong, but not unsound.
                let fd = unsafe { BorrowedFd::borrow_raw(entry.fd) };
                let _ = epoll::delete(&self.epoll, fd);
                self.release(Registration {
                    slot,
                    generation: entry.generation,
                });
            }
        }
    }

    fn target(&self, data: u64) -> Option<(HandlerId, u64)> {
        let slot = self.slots.get(usize::try_from(data & 0xffff_ffff).ok()?)?;
        (u64::from(slot.generation) == data >> 32)
            .then_some(slot.target)
            .flatten()
    }
}

type Handler = Arc<Mutex<dyn EventHandler>>;
type Task = Box<dyn FnOnce(&mut Inner) + Send>;

/// A place for a handler.
struct Place {
    generation: u32,
    handler: Option<Handler>,
}

/// The loop's own thread's data.
struct Inner {
    table: Table,
    handlers: Vec<Place>,
    stop: bool,
}

/// What other threads can reach.
struct Shared {
    /// `None` once the loop has stopped.
    tasks: Mutex<Option<Vec<Task>>>,
    wake: OwnedFd,
    thread: Mutex<Option<ThreadId>>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A handler that panicked has been reported; the others go on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Hands a task to the loop; dropped when that has stopped.
    fn push(&self, task: Task) {
        match &mut *lock(&self.tasks) {
            Some(tasks) => tasks.push(task),
            None => return,
        }
        signal(self.wake.as_fd());
    }

    fn is_current(&self) -> bool {
        *lock(&self.thread) == Some(std::thread::current().id())
    }
}

/// Reaches a loop from any thread.
#[derive(Clone)]
pub struct EventLoopHandle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for EventLoopHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoopHandle").finish_non_exhaustive()
    }
}

/// The loop has stopped.
fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the event loop has stopped")
}

impl EventLoopHandle {
    /// Runs `task` on the loop and waits for its result.
    fn run<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Inner) -> R + Send + 'static,
    ) -> io::Result<R> {
        if self.shared.is_current() {
            return Err(io::Error::new(
                io::ErrorKind::Deadlock,
                "the event loop cannot wait for itself",
            ));
        }
        let (send, receive): (SyncSender<R>, _) = sync_channel(1);
        self.shared.push(Box::new(move |inner| {
            // The caller may have gone away with its thread.
            let _ = send.send(task(inner));
        }));
        receive.recv().map_err(|_| stopped())
    }

    /// Adds a handler; returns when it has started.
    ///
    /// # Errors
    /// What [`EventHandler::start`] returned, or the loop has stopped.
    pub fn add_handler(&self, handler: Arc<Mutex<dyn EventHandler>>) -> io::Result<HandlerId> {
        self.run(move |inner| inner.add(handler))?
    }

    /// Removes a handler; when this returns it is not called any more. On the
    /// loop's own thread that is so soon after.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn remove_handler(&self, id: HandlerId) -> io::Result<()> {
        if self.shared.is_current() {
            self.shared.push(Box::new(move |inner| inner.remove(id)));
            return Ok(());
        }
        self.run(move |inner| inner.remove(id))
    }

    /// Runs `task` on the loop with the registry of handler `id`, and waits.
    ///
    /// # Errors
    /// The handler is gone, the loop has stopped, or this is its own thread.
    pub fn call<R: Send + 'static>(
        &self,
        id: HandlerId,
        task: impl FnOnce(&mut Registry<'_>) -> R + Send + 'static,
    ) -> io::Result<R> {
        self.run(move |inner| inner.with_registry(id, task))?
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the handler is gone"))
    }

    /// Runs `task` on the loop with the registry of handler `id`, some time soon,
    /// unless the handler is gone by then.
    pub fn post(&self, id: HandlerId, task: impl FnOnce(&mut Registry<'_>) + Send + 'static) {
        self.shared.push(Box::new(move |inner| {
            inner.with_registry(id, task);
        }));
    }
}

/// Owns the loop's thread; dropping it stops the loop and waits for its end.
#[derive(Debug)]
pub struct EventLoop {
    handle: EventLoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a loop on a new thread called `name`.
    ///
    /// # Errors
    /// No descriptors or threads to be had.
    pub fn spawn(name: &str) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(WAKE),
            epoll::EventFlags::IN,
        )?;
        let shared = Arc::new(Shared {
            tasks: Mutex::new(Some(Vec::new())),
            wake,
            thread: Mutex::new(None),
        });
        let mut inner = Inner {
            table: Table {
                epoll,
                slots: Vec::new(),
                free: Vec::new(),
                again: Vec::new(),
            },
            handlers: Vec::new(),
            stop: false,
        };
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                *lock(&for_thread.thread) = Some(std::thread::current().id());
                let closing = Closing(for_thread);
                inner.run(&closing.0);
            })?;
        Ok(Self {
            handle: EventLoopHandle { shared },
            thread: Some(thread),
        })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> EventLoopHandle {
        self.handle.clone()
    }
}

/// Whoever waits for a task that will not run gets an error, also when a handler
/// panicked.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        // Not in the lock: a task may own things that reach for the loop.
        let tasks = lock(&self.0.tasks).take();
        drop(tasks);
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.handle.shared.push(Box::new(|inner| inner.stop = true));
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn run(&mut self, shared: &Shared) {
        let mut events = Vec::with_capacity(BATCH);
        let mut again = Vec::new();
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        while !self.stop {
            events.clear();
            let timeout = (!self.table.again.is_empty()).then_some(&at_once);
            match epoll::wait(
                &self.table.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout,
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the event loop cannot wait and stops");
                    return;
                }
            }
            for event in &events {
                let data = event.data.u64();
                if data == WAKE {
                    self.run_tasks(shared);
                } else {
                    self.dispatch(data, event.flags);
                }
            }
            std::mem::swap(&mut again, &mut self.table.again);
            for (id, token) in again.drain(..) {
                self.tell(id, token, Readiness::default());
            }
        }
    }

    fn run_tasks(&mut self, shared: &Shared) {
        let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
        let tasks = lock(&shared.tasks).as_mut().map(std::mem::take);
        for task in tasks.unwrap_or_default() {
            task(self);
        }
    }

    fn dispatch(&mut self, data: u64, flags: epoll::EventFlags) {
        let Some((id, token)) = self.table.target(data) else {
            return; // removed since the event was fetched
        };
        let readiness = Readiness {
            readable: flags.contains(epoll::EventFlags::IN),
            writable: flags.contains(epoll::EventFlags::OUT),
            hangup: flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::RDHUP),
            error: flags.contains(epoll::EventFlags::ERR),
        };
        self.tell(id, token, readiness);
    }

    fn tell(&mut self, id: HandlerId, token: u64, readiness: Readiness) {
        let Some(handler) = self.handler(id).cloned() else {
            return;
        };
        let mut registry = Registry {
            table: &mut self.table,
            handler: id,
        };
        lock(&handler).ready(token, readiness, &mut registry);
    }

    fn handler(&self, id: HandlerId) -> Option<&Handler> {
        self.handlers
            .get(id.index as usize)
            .filter(|place| place.generation == id.generation)?
            .handler
            .as_ref()
    }

    fn with_registry<R>(
        &mut self,
        id: HandlerId,
        task: impl FnOnce(&mut Registry<'_>) -> R,
    ) -> Option<R> {
        self.handler(id)?;
        Some(task(&mut Registry {
            table: &mut self.table,
            handler: id,
        }))
    }

    fn add(&mut self, handler: Handler) -> io::Result<HandlerId> {
        let free = self.handlers.iter().position(|p| p.handler.is_none());
        let index = free.unwrap_or(self.handlers.len());
        if free.is_none() {
            self.handlers.push(Place {
                generation: 0,
                handler: None,
            });
        }
        let id = HandlerId {
            index: u32::try_from(index).map_err(io::Error::other)?,
            generation: self.handlers[index].generation,
        };
        let mut registry = Registry {
            table: &mut self.table,
            handler: id,
        };
        let started = lock(&handler).start(&mut registry);
        // Set in any case: removing it again ends the use of the identifier.
        self.handlers[index].handler = Some(handler);
        if let Err(error) = started {
            self.remove(id);
            return Err(error);
        }
        Ok(id)
    }

    fn remove(&mut self, id: HandlerId) {
        if self.handler(id).is_none() {
            return;
        }
        // Before the handler closes its descriptors.
        self.table.release_all(id);
        let place = &mut self.handlers[id.index as usize];
        place.generation = place.generation.wrapping_add(1);
        place.handler = None;
    }
}

/// A non-blocking eventfd.
///
/// # Errors
/// No descriptors to be had.
pub fn new_eventfd() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes an eventfd readable.
pub fn signal(fd: BorrowedFd<'_>) {
    // Refused only when the counter is full: then it is readable already.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Makes an eventfd unreadable again; says whether it was readable.
#[must_use]
pub fn drain(fd: BorrowedFd<'_>) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{Sender, channel};

    /// Reports what it is told; drops its registration when told to.
    struct Probe {
        streams: Vec<UnixStream>,
        registrations: Vec<Registration>,
        /// Removes registration `.1` when token `.0` is ready.
        removes: Option<(u64, usize)>,
        seen: Sender<(u64, Readiness)>,
    }

    impl EventHandler for Probe {
        fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
            for (token, stream) in (0..).zip(&self.streams) {
                let interest = Interest {
                    edge: true,
                    ..Interest::READ
                };
                self.registrations
                    .push(registry.add(stream, token, interest)?);
            }
            Ok(())
        }

        fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut Registry<'_>) {
            self.seen.send((token, readiness)).unwrap();
            if let Some((when, which)) = self.removes
                && when == token
            {
                registry.remove(self.registrations[which], &self.streams[which]);
            }
        }
    }

    #[test]
    fn handlers_are_called_with_their_token() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (seen, events) = channel();
        let probe = Probe {
            streams: vec![theirs],
            registrations: Vec::new(),
            removes: None,
            seen,
        };
        let handle = event_loop.handle();
        let id = handle.add_handler(Arc::new(Mutex::new(probe))).unwrap();
        (&ours).write_all(b"x").unwrap();
        let (token, readiness) = events.recv().unwrap();
        assert_eq!(token, 0);
        assert!(readiness.readable && !readiness.hangup);
        drop(ours);
        assert!(events.recv().unwrap().1.hangup);
        handle.remove_handler(id).unwrap();
        assert!(events.recv().is_err(), "the handler was dropped");
    }

    #[test]
    fn an_event_fetched_before_its_removal_is_not_delivered() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let pairs: Vec<_> = (0..2).map(|_| UnixStream::pair().unwrap()).collect();
        let (seen, events) = channel();
        let (mut ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        // Both are ready when they are registered, so they come in one batch;
        // whichever is first removes the other.
        for stream in &mut ours {
            stream.write_all(b"x").unwrap();
        }
        struct Exclusive(Probe);
        impl EventHandler for Exclusive {
            fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
                self.0.start(registry)
            }
            fn ready(&mut self, token: u64, r: Readiness, registry: &mut Registry<'_>) {
                self.0.removes = Some((token, if token == 0 { 1 } else { 0 }));
                self.0.ready(token, r, registry);
            }
        }
        let probe = Exclusive(Probe {
            streams: theirs,
            registrations: Vec::new(),
            removes: None,
            seen,
        });
        let handle = event_loop.handle();
        let id = handle.add_handler(Arc::new(Mutex::new(probe))).unwrap();
        let first = events.recv().unwrap().0;
        handle.remove_handler(id).unwrap();
        let rest: Vec<_> = events.iter().map(|(token, _)| token).collect();
        assert!(rest.iter().all(|&token| token == first), "{rest:?}");
    }

    /// Does nothing; keeps a descriptor open that others hold too.
    struct Silent(Option<Arc<UnixStream>>);

    impl EventHandler for Silent {
        fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
            if let Some(stream) = &self.0 {
                registry.add(&**stream, 0, Interest::READ)?;
            }
            Ok(())
        }
        fn ready(&mut self, _: u64, _: Readiness, _: &mut Registry<'_>) {}
    }

    fn silent(stream: Option<Arc<UnixStream>>) -> Arc<Mutex<Silent>> {
        Arc::new(Mutex::new(Silent(stream)))
    }

    #[test]
    fn calls_return_values_and_never_wait_for_themselves() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let handle = event_loop.handle();
        let id = handle.add_handler(silent(None)).unwrap();
        assert_eq!(handle.call(id, |_| 42).unwrap(), 42);
        let inner = handle.clone();
        let nested = handle
            .call(id, move |_| inner.call(id, |_| ()).unwrap_err().kind())
            .unwrap();
        assert_eq!(nested, io::ErrorKind::Deadlock);
        drop(event_loop);
        assert!(handle.call(id, |_| ()).is_err());
    }

    #[test]
    fn a_handler_that_is_gone_is_not_mistaken_for_its_successor() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let handle = event_loop.handle();
        let first = handle.add_handler(silent(None)).unwrap();
        handle.remove_handler(first).unwrap();
        let second = handle.add_handler(silent(None)).unwrap();
        assert_ne!(first, second);
        let error = handle.call(first, |_| ()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        // A late removal of the first leaves the second alone.
        handle.remove_handler(first).unwrap();
        handle.call(second, |_| ()).unwrap();
    }

    #[test]
    fn descriptors_of_a_removed_handler_leave_the_set() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let handle = event_loop.handle();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = Arc::new(theirs);
        let first = handle.add_handler(silent(Some(theirs.clone()))).unwrap();
        handle.remove_handler(first).unwrap();
        // Still open here, and ready: it would keep the loop spinning, and could
        // not be registered a second time.
        (&ours).write_all(b"x").unwrap();
        handle.add_handler(silent(Some(theirs))).unwrap();
    }

    #[test]
    fn work_in_slices_lets_others_have_their_turn() {
        struct Slices {
            left: u32,
            done: Sender<u64>,
        }
        impl EventHandler for Slices {
            fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
                registry.again(7);
                registry.again(7);
                Ok(())
            }
            fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut Registry<'_>) {
                assert_eq!(readiness, Readiness::default());
                self.done.send(token).unwrap();
                if self.left > 0 {
                    self.left -= 1;
                    registry.again(token);
                }
            }
        }
        let event_loop = EventLoop::spawn("test").unwrap();
        let handle = event_loop.handle();
        let (done, calls) = channel();
        let slices = Slices { left: 3, done };
        let id = handle.add_handler(Arc::new(Mutex::new(slices))).unwrap();
        for _ in 0..4 {
            assert_eq!(calls.recv().unwrap(), 7);
        }
        handle.remove_handler(id).unwrap();
        assert!(calls.recv().is_err());
    }

    #[test]
    fn handlers_are_removed_from_the_loop_itself() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let handle = event_loop.handle();
        let id = handle.add_handler(silent(None)).unwrap();
        let inner = handle.clone();
        handle
            .call(id, move |_| inner.remove_handler(id).unwrap())
            .unwrap();
        // Tasks run in the order they came in, and this one comes after.
        assert!(handle.call(id, |_| ()).is_err());
    }

    #[test]
    fn hundreds_of_descriptors_come_and_go() {
        struct Many {
            pairs: Vec<Option<(UnixStream, UnixStream, Registration)>>,
            seen: Sender<u64>,
        }
        impl EventHandler for Many {
            fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
                for token in 0..200 {
                    let (ours, theirs) = UnixStream::pair()?;
                    (&ours).write_all(b"x")?;
                    let registration = registry.add(&theirs, token, Interest::READ)?;
                    self.pairs.push(Some((ours, theirs, registration)));
                }
                Ok(())
            }
            fn ready(&mut self, token: u64, _: Readiness, registry: &mut Registry<'_>) {
                let own = self.pairs[usize::try_from(token).unwrap()].take();
                let (_, theirs, registration) = own.expect("told once");
                registry.remove(registration, &theirs);
                self.seen.send(token).unwrap();
            }
        }
        let event_loop = EventLoop::spawn("test").unwrap();
        let handle = event_loop.handle();
        let (seen, tokens) = channel();
        let pairs = Vec::new();
        let many = Arc::new(Mutex::new(Many { pairs, seen }));
        handle.add_handler(many).unwrap();
        let mut all: Vec<u64> = (0..200).map(|_| tokens.recv().unwrap()).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..200));
    }
}
