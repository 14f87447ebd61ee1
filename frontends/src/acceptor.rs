//! A listener on the event loop that accepts no more connections than the descriptor
//! limit allows.
//!
//! Other connections wait in the kernel's backlog and are accepted when descriptors are
//! released; none of them is closed for lack of descriptors.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use rustix::io::Errno;
use sm_devices_vsock::{Limit, Permit};
use sm_event_loop::{Interest, Registered, Registry, Timer};

use crate::peer::is_trusted_peer;
use crate::service::{FrontendService, HandlerWaker};

/// Token of the listener in every frontend.
pub(crate) const LISTENER: u64 = 0;
/// Connections accepted before other handlers get their turn.
const BATCH: usize = 64;
/// Connections that may wait to be accepted, as far as the system allows.
pub(crate) const BACKLOG: i32 = 4096;

/// Rounds of [`ListenerAcceptor::accept`] before a listener is closed: enough for a full
/// backlog. Without a bound, clients that connect as fast as they are accepted would keep it open.
pub(crate) const CLOSING_ROUNDS: usize = BACKLOG as usize / BATCH + 1;

/// Delay before `accept` is retried after it failed. No event reports that the system has
/// descriptors or memory again.
const PAUSE: Duration = Duration::from_millis(100);

/// Edge-triggered: each handler reads until `WouldBlock` or asks to be called again.
const NEW_CONNECTIONS: Interest = Interest::READ.edge_triggered();

/// A non-blocking listening socket.
pub(crate) trait Listener: AsFd + Send + 'static {
    /// The type of an accepted connection.
    type Stream: Into<OwnedFd>;

    /// Accepts a connection.
    fn accept(&self) -> io::Result<Self::Stream>;

    /// Returns true if the peer is allowed to connect.
    fn admits(&self, _stream: &Self::Stream) -> io::Result<bool> {
        Ok(true)
    }
}

impl Listener for UnixListener {
    type Stream = std::os::unix::net::UnixStream;

    fn accept(&self) -> io::Result<Self::Stream> {
        let (stream, _) = Self::accept(self)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    fn admits(&self, stream: &Self::Stream) -> io::Result<bool> {
        is_trusted_peer(stream)
    }
}

impl Listener for TcpListener {
    type Stream = std::net::TcpStream;

    fn accept(&self) -> io::Result<Self::Stream> {
        let (stream, _) = Self::accept(self)?;
        stream.set_nonblocking(true)?;
        // TCP_NODELAY: small writes of the guest are sent immediately. A failure is no
        // reason to refuse the connection.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }
}

/// Result of one attempt to accept a connection.
enum AcceptResult<T> {
    Connection(T, Permit),
    /// The connection was refused, or the peer has already closed it.
    Gone,
    /// No connection is pending or can be accepted; a later event repeats the attempt.
    WouldBlock,
}

/// The states of a listener.
enum ListenerState<L: Listener> {
    /// Not registered with the event loop yet.
    New(L),
    Open(Registered<L>),
    Closed,
}

/// A listener of a frontend.
pub(crate) struct ListenerAcceptor<L: Listener> {
    state: ListenerState<L>,
    limit: Limit,
    /// Descriptors that a connection needs.
    cost: usize,
    spare: Spare,
    /// Calls the handler under [`LISTENER`] when a pause is over.
    pause: Option<Timer>,
    /// True if the last call of [`Self::accept`] may have left connections in the
    /// backlog.
    more: bool,
}

impl<L: Listener> ListenerAcceptor<L> {
    /// Creates an acceptor whose connections need `cost` descriptors each.
    pub(crate) fn new(listener: L, cost: usize, limit: Limit) -> Self {
        Self {
            state: ListenerState::New(listener),
            limit,
            cost,
            spare: Spare::new(),
            pause: None,
            more: false,
        }
    }

    /// Returns true if more connections may be waiting in the backlog.
    pub(crate) fn has_more(&self) -> bool {
        self.more
    }

    /// Registers the listener with the event loop, under [`LISTENER`].
    pub(crate) fn register(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        self.state = match std::mem::replace(&mut self.state, ListenerState::Closed) {
            ListenerState::New(listener) => {
                ListenerState::Open(registry.add(listener, LISTENER, NEW_CONNECTIONS)?)
            }
            other => other,
        };
        Ok(())
    }

    /// Closes the listener. Connections in its backlog are reset unless they were
    /// accepted before.
    pub(crate) fn close(&mut self, registry: &mut dyn Registry) {
        if let ListenerState::Open(listener) =
            std::mem::replace(&mut self.state, ListenerState::Closed)
        {
            registry.remove(listener);
        }
        if let Some(timer) = self.pause.take() {
            registry.cancel_timer(timer);
        }
    }

    /// Accepts at most `most` connections and at most one batch; another event follows
    /// for the rest.
    pub(crate) fn accept(
        &mut self,
        most: usize,
        waker: &HandlerWaker,
        service: &FrontendService,
        registry: &mut dyn Registry,
    ) -> Vec<(L::Stream, Permit)> {
        let mut connections = Vec::new();
        self.more = false;
        // The timer calls under the listener's token, so its call may not have come here.
        if self.pause.is_some_and(|timer| timer.at() <= registry.now()) {
            self.pause = None;
        }
        for _ in 0..BATCH.min(most) {
            match self.next(waker, service, registry) {
                AcceptResult::Connection(stream, permit) => connections.push((stream, permit)),
                AcceptResult::Gone => {}
                AcceptResult::WouldBlock => return connections,
            }
        }
        if most > 0 {
            self.more = true;
            registry.call_again(LISTENER);
        }
        connections
    }

    /// Sets the timer that retries the listener after [`PAUSE`].
    fn pause(&mut self, registry: &mut dyn Registry) {
        if self.pause.is_none() {
            self.pause = registry.set_timer_after(PAUSE, LISTENER);
        }
    }

    fn next(
        &mut self,
        waker: &HandlerWaker,
        service: &FrontendService,
        registry: &mut dyn Registry,
    ) -> AcceptResult<L::Stream> {
        let ListenerState::Open(listener) = &self.state else {
            return AcceptResult::WouldBlock;
        };
        let waker = waker.clone();
        let wake = move || waker.wake(LISTENER);
        let Ok(permit) = self.limit.take_or_wait(self.cost, wake) else {
            service.counters.warn(
                "connections wait in the backlog",
                "the limit of descriptors is reached",
            );
            return AcceptResult::WouldBlock;
        };
        match self.spare.accept(|| listener.accept()) {
            Ok(Some(stream)) => match listener.admits(&stream) {
                Ok(true) => AcceptResult::Connection(stream, permit),
                Ok(false) => {
                    service.counters.refuse("the peer is another user");
                    AcceptResult::Gone
                }
                Err(error) => {
                    service.counters.refuse(error);
                    AcceptResult::Gone
                }
            },
            Ok(None) => {
                service.counters.refuse("there are no descriptors left");
                AcceptResult::Gone
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => AcceptResult::WouldBlock,
            Err(error) if is_connection_error(&error) => AcceptResult::Gone,
            Err(error) => {
                // The connection is still in the backlog, and the cause persists.
                service
                    .counters
                    .warn("connections wait in the backlog", error);
                self.pause(registry);
                AcceptResult::WouldBlock
            }
        }
    }
}

/// Returns true if the error concerns only the connection that was to be accepted:
/// accept(2) also reports pending network errors of the new connection.
fn is_connection_error(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::INTR
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::NONET
                | Errno::NOPROTOOPT
                | Errno::PROTO
                | Errno::TIMEDOUT
        )
    )
}

/// A reserve descriptor that is closed when the process has no others.
#[derive(Debug)]
struct Spare(Option<File>);

impl Spare {
    fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }

    /// Accepts a connection. If the process is out of descriptors despite the limit, the
    /// reserve is closed, and the connection is accepted and closed at once, so that its
    /// client does not wait for long; the result is then `None`.
    ///
    /// # Errors
    /// Nothing was accepted. Another thread may have taken the reserve's descriptor; the
    /// reserve is then reopened after the next connection that can be accepted.
    fn accept<T>(&mut self, accept: impl Fn() -> io::Result<T>) -> io::Result<Option<T>> {
        let accepted = accept().map(Some);
        if accepted.is_ok() && self.0.is_none() {
            *self = Self::new();
        }
        if self.0.is_none() || !accepted.as_ref().is_err_and(out_of_descriptors) {
            return accepted;
        }
        self.0 = None;
        let accepted = accept().map(drop);
        *self = Self::new();
        accepted.map(|()| None)
    }
}

fn out_of_descriptors(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE)
    )
}
