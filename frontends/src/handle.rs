//! Handle of a running frontend.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sm_devices_vsock::Group;
use sm_event_loop::{EventHandler, EventLoopHandle, HandlerId, Registry};

use crate::service::{FrontendService, HandlerWaker};
use crate::socket_path::SocketPath;
use crate::{FrontendStats, LocalAddress};

/// Operations that a handle runs on a frontend, on the event loop's thread.
pub(crate) trait Frontend: EventHandler {
    /// Registers its descriptors. Called once, after the handler was added to the loop.
    fn register(&mut self, waker: HandlerWaker, registry: &mut dyn Registry) -> io::Result<()>;

    /// Accepts the connections in the backlog and closes the listener. May be called
    /// again.
    fn close(&mut self, registry: &mut dyn Registry);

    /// Closes the connections that are not yet passed to the muxer.
    fn cut(&mut self, _registry: &mut dyn Registry) {}

    /// Called after [`Self::close`], when the handle was dropped. Returns true if the
    /// frontend still serves connections of its own; it then removes itself after the
    /// last of them.
    fn outlives_handle(&mut self) -> bool {
        false
    }
}

type SharedFrontend = Arc<Mutex<dyn Frontend>>;

fn lock(frontend: &Mutex<dyn Frontend>) -> MutexGuard<'_, dyn Frontend + 'static> {
    // A panic of the frontend was reported where it occurred.
    frontend.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A frontend that listens.
///
/// Dropping it closes the listener and unlinks its socket; accepted connections continue.
/// [`Self::stop`] waits for them and cuts those that exceed its timeout.
#[derive(Debug)]
pub struct FrontendHandle {
    address: LocalAddress,
    certificate: Option<String>,
    socket_path: Mutex<Option<SocketPath>>,
    service: FrontendService,
    frontend: Opaque,
    event_loop: EventLoopHandle,
    id: HandlerId,
}

struct Opaque(SharedFrontend);

impl std::fmt::Debug for Opaque {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

impl FrontendHandle {
    /// Adds a frontend to the event loop and starts it.
    pub(crate) fn start(
        frontend: impl Frontend + 'static,
        address: LocalAddress,
        socket_path: Option<SocketPath>,
        service: FrontendService,
        event_loop: &EventLoopHandle,
    ) -> io::Result<Self> {
        let frontend = Arc::new(Mutex::new(frontend));
        let id = event_loop.add_handler(frontend.clone())?;
        let handle = Self {
            address,
            certificate: None,
            socket_path: Mutex::new(socket_path),
            service,
            frontend: Opaque(frontend),
            event_loop: event_loop.clone(),
            id,
        };
        let waker = HandlerWaker::new(event_loop.clone(), id);
        handle.with(move |frontend, registry| frontend.register(waker, registry))??;
        Ok(handle)
    }

    pub(crate) fn with_certificate(mut self, certificate: Option<String>) -> Self {
        self.certificate = certificate;
        self
    }

    /// Runs `task` with the frontend, on the loop's thread.
    fn with<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut dyn Frontend, &mut dyn Registry) -> R + Send + 'static,
    ) -> io::Result<R> {
        let frontend = Arc::clone(&self.frontend.0);
        self.event_loop.call(self.id, move |registry| {
            task(&mut *lock(&frontend), registry)
        })
    }

    /// Returns the address on which it listens, or listened before it was closed.
    #[must_use]
    pub fn local_address(&self) -> &LocalAddress {
        &self.address
    }

    /// Returns the self-signed certificate of a TLS frontend, in PEM, for clients to
    /// trust.
    #[must_use]
    pub fn self_signed_certificate(&self) -> Option<&str> {
        self.certificate.as_deref()
    }

    /// Returns its counters.
    #[must_use]
    pub fn stats(&self) -> FrontendStats {
        FrontendStats {
            active: self.service.group.active(),
            to_guest: self.service.group.to_guest(),
            from_guest: self.service.group.from_guest(),
            ..self.service.counters.stats()
        }
    }

    /// Returns the group of its connections, which can be waited for.
    #[must_use]
    pub fn connections(&self) -> &Group {
        &self.service.group
    }

    /// Stops listening: accepts the connections in the backlog, closes the listener and
    /// unlinks its socket. Connections continue.
    pub fn close(&self) {
        let socket_path = &mut *self
            .socket_path
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        drop(socket_path.take());
        // An error means that the loop has stopped, and with it the frontend.
        let _ = self.with(|frontend, registry| frontend.close(registry));
    }

    /// Cuts all its connections without waiting for bytes in flight.
    pub fn cut(&self) {
        self.service.muxer.cut(&self.service.group);
        // As in `close`: an error means that the loop has stopped.
        let _ = self.with(|frontend, registry| frontend.cut(registry));
    }

    /// Stops listening, waits at most `timeout` for the connections to end, and cuts the
    /// rest. Returns the number of connections that were cut.
    ///
    /// This blocks, and must not be called on the event loop's own thread.
    pub fn stop(self, timeout: Duration) -> usize {
        self.close();
        let deadline = Instant::now().checked_add(timeout);
        let far = || Instant::now() + Duration::from_secs(1 << 31);
        if self.service.group.wait_idle(deadline.unwrap_or_else(far)) {
            return 0;
        }
        let left = self.service.group.active();
        self.cut();
        left
    }
}

impl Drop for FrontendHandle {
    fn drop(&mut self) {
        self.close();
        let waker = HandlerWaker::new(self.event_loop.clone(), self.id);
        let retire = move |frontend: &mut dyn Frontend, registry: &mut dyn Registry| {
            // Repeated here for a handle that is dropped on the loop's own thread.
            frontend.close(registry);
            if !frontend.outlives_handle() {
                waker.remove();
            }
        };
        let frontend = Arc::clone(&self.frontend.0);
        self.event_loop.post(self.id, move |registry| {
            retire(&mut *lock(&frontend), registry);
        });
    }
}
