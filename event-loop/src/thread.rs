//! The loop's thread, and how other threads reach it.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::Instant;

use crate::registration::Ready;
use crate::registry::{Reclaimer, Registry};
use crate::slab::Slab;
use crate::table::{HandlerId, Table, Target, View};
use crate::{EventHandler, Readiness, drain, new_eventfd, signal};

type Handler = Arc<Mutex<dyn EventHandler>>;
type Task = Box<dyn FnOnce(&mut Inner) + Send>;

/// A handler, and the descriptors that it dropped.
struct Occupant {
    handler: Handler,
    reclaimer: Arc<Reclaimer>,
}

/// The loop's own thread's data.
struct Inner {
    table: Table,
    handlers: Slab<Occupant>,
    stop: bool,
    shared: Arc<Shared>,
}

/// The part of a loop that other threads can reach.
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
    /// The error of [`EventHandler::start`], or the loop has stopped.
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
        task: impl FnOnce(&mut dyn Registry) -> R + Send + 'static,
    ) -> io::Result<R> {
        self.run(move |inner| inner.with_registry(id, task))?
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the handler is gone"))
    }

    /// Runs `task` on the loop with the registry of handler `id`, some time soon,
    /// unless the handler is removed before.
    pub fn post(&self, id: HandlerId, task: impl FnOnce(&mut dyn Registry) + Send + 'static) {
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
    /// No descriptors or threads are available.
    pub fn spawn(name: &str) -> io::Result<Self> {
        let wake = new_eventfd()?;
        let shared = Arc::new(Shared {
            tasks: Mutex::new(Some(Vec::new())),
            wake,
            thread: Mutex::new(None),
        });
        // Created here, so that nobody waits for the new thread.
        let mut inner = Inner::new(Arc::clone(&shared))?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Dropped before `inner`: callers that wait get their error before handlers
                // are dropped, which may wait for these callers.
                let closing = Closing(Arc::clone(&inner.shared));
                *lock(&closing.0.thread) = Some(std::thread::current().id());
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

impl Drop for Inner {
    fn drop(&mut self) {
        // Descriptors that outlive the loop are closed when they are dropped.
        for (_, occupant) in self.handlers.iter() {
            occupant.reclaimer.close();
        }
    }
}

/// Drops the tasks that will not run, so that their callers get an error, also after a
/// handler panicked.
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
    fn new(shared: Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            table: Table::new(shared.wake.as_fd())?,
            handlers: Slab::new(),
            stop: false,
            shared,
        })
    }

    fn run(&mut self, shared: &Shared) {
        let mut batch = Vec::new();
        let mut calls = Vec::new();
        while !self.stop {
            self.run_timers();
            if let Err(error) = self.table.wait(&mut batch) {
                tracing::error!(%error, "the event loop cannot wait and stops");
                return;
            }
            for ready in batch.drain(..) {
                self.dispatch(&ready, shared);
            }
            std::mem::swap(&mut calls, &mut self.table.pending_calls);
            for (id, token) in calls.drain(..) {
                self.notify(id, token, Readiness::default());
            }
        }
    }

    /// Calls handlers whose timers have passed.
    fn run_timers(&mut self) {
        if self.table.timers() == 0 {
            return;
        }
        let now = Instant::now();
        // A handler may set another one that has passed already: the number of calls is
        // limited, so that descriptors have their turn.
        for _ in 0..self.table.timers() {
            match self.table.pop_timer(now) {
                Some(Target::Handler(id, token)) => self.notify(id, token, Readiness::default()),
                // The loop sets none for itself.
                Some(Target::Tasks) => {}
                None => return,
            }
        }
    }

    fn run_tasks(&mut self, shared: &Shared) {
        let _ = drain(shared.wake.as_fd());
        let tasks = lock(&shared.tasks).as_mut().map(std::mem::take);
        for task in tasks.unwrap_or_default() {
            task(self);
        }
    }

    fn dispatch(&mut self, ready: &Ready, shared: &Shared) {
        match self.table.target(ready) {
            Some(Target::Tasks) => self.run_tasks(shared),
            Some(Target::Handler(id, token)) => self.notify(id, token, ready.readiness),
            // Removed since the event was fetched.
            None => {}
        }
    }

    fn notify(&mut self, id: HandlerId, token: u64, readiness: Readiness) {
        let Some(occupant) = self.handlers.get(id.0) else {
            return;
        };
        let mut registry = View {
            table: &mut self.table,
            handler: id,
            reclaimer: &occupant.reclaimer,
        };
        lock(&occupant.handler).ready(token, readiness, &mut registry);
    }

    fn with_registry<R>(
        &mut self,
        id: HandlerId,
        task: impl FnOnce(&mut dyn Registry) -> R,
    ) -> Option<R> {
        let occupant = self.handlers.get(id.0)?;
        Some(task(&mut View {
            table: &mut self.table,
            handler: id,
            reclaimer: &occupant.reclaimer,
        }))
    }

    fn add(&mut self, handler: Handler) -> io::Result<HandlerId> {
        let shared = Arc::clone(&self.shared);
        let itself = Arc::clone(&handler);
        // Added in any case: removing it again ends the use of the identifier.
        let key = self.handlers.insert_with(|key| {
            let reclaimer = Arc::new(Reclaimer::new(move || {
                shared.push(Box::new(move |inner| inner.reclaim(HandlerId(key))));
            }));
            Occupant { handler, reclaimer }
        });
        let id = HandlerId(key);
        let started = self.with_registry(id, |registry| lock(&itself).start(registry));
        if let Some(Err(error)) = started {
            self.remove(id);
            return Err(error);
        }
        Ok(id)
    }

    fn remove(&mut self, id: HandlerId) {
        if self.handlers.get(id.0).is_none() {
            return;
        }
        // Before the handler closes its descriptors.
        self.table.release_all(id);
        let occupant = self.handlers.remove(id.0);
        if let Some(occupant) = occupant {
            occupant.reclaimer.close();
        }
    }

    /// Removes the descriptors that a handler dropped while they were registered.
    fn reclaim(&mut self, id: HandlerId) {
        let reclaimed = self
            .handlers
            .get(id.0)
            .map(|occupant| occupant.reclaimer.take());
        self.with_registry(id, |registry| {
            for one in reclaimed.into_iter().flatten() {
                one.remove_from(registry);
            }
        });
    }
}
