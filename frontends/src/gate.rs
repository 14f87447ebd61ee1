//! How connections come in: a listener on the event loop that takes no more than
//! there is room for.
//!
//! What there is no room for waits in the kernel's backlog and is taken as soon as
//! something else ends; nobody is hung up on for it.

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
use sm_event_loop::{Interest, Registration, Registry};

use crate::deadlines::Deadlines;
use crate::peer::is_trusted_peer;
use crate::service::{Bell, Service};

/// Token of the listener in every frontend.
pub(crate) const LISTENER: u64 = 0;
/// Connections accepted before other handlers get their turn.
const BATCH: usize = 64;
/// Connections that may wait to be accepted, as far as the system allows.
pub(crate) const BACKLOG: i32 = 4096;

/// Rounds of [`Gate::accept`] before a listener is closed: as many connections as can
/// have waited then. Others come as fast as they are taken, perhaps without end.
pub(crate) const CLOSING_ROUNDS: usize = BACKLOG as usize / BATCH + 1;

/// Time until a listener is looked at again that could not be accepted from. No event
/// says when the system has descriptors or memory again.
const PAUSE: Duration = Duration::from_millis(100);

/// Told once per change: whatever is left is asked for again.
const NEW_CONNECTIONS: Interest = Interest {
    readable: true,
    writable: false,
    edge: true,
};

/// A socket that listens and does not block.
pub(crate) trait Listener: AsFd + Send + 'static {
    /// What it takes.
    type Stream: Into<OwnedFd>;

    /// Takes a connection.
    fn accept(&self) -> io::Result<Self::Stream>;

    /// Whether whoever connected may.
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
        // What the guest sent together is sent at once. Not a reason to refuse.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }
}

/// What came of looking for a connection.
enum Found<T> {
    Connection(T, Permit),
    /// One that is not wanted, or has gone again.
    Nobody,
    /// None now; there will be an event when it is time to look again.
    NothingNow,
}

/// A listener of a frontend.
pub(crate) struct Gate<L> {
    /// `None` once it is closed.
    open: Option<(L, Option<Registration>)>,
    limit: Limit,
    /// Descriptors that a connection needs.
    cost: usize,
    spare: Spare,
    /// Calls under [`LISTENER`] when a pause is over; made when it begins to listen.
    timer: Option<(Deadlines, Registration)>,
    /// The timer is set.
    paused: bool,
    /// The last look did not come to the end of what waits.
    more: bool,
}

impl<L: Listener> Gate<L> {
    /// Takes connections that need `cost` descriptors each.
    pub(crate) fn new(listener: L, cost: usize, limit: Limit) -> Self {
        Self {
            open: Some((listener, None)),
            limit,
            cost,
            spare: Spare::new(),
            timer: None,
            paused: false,
            more: false,
        }
    }

    /// Whether there may be more to accept right away.
    pub(crate) fn has_more(&self) -> bool {
        self.more
    }

    /// Begins to listen, under [`LISTENER`].
    pub(crate) fn begin(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        if let Some((listener, registration)) = &mut self.open {
            // Told once: a frontend that has no place for connections does not read it.
            let timer = Deadlines::new()?;
            let registered = registry.add(&timer, LISTENER, NEW_CONNECTIONS)?;
            self.timer = Some((timer, registered));
            *registration = Some(registry.add(&*listener, LISTENER, NEW_CONNECTIONS)?);
        }
        Ok(())
    }

    /// Closes the listener. Connections in its backlog are reset: accept them
    /// before.
    pub(crate) fn close(&mut self, registry: &mut Registry<'_>) {
        if let Some((listener, Some(registration))) = self.open.take() {
            registry.remove(registration, &listener);
        }
        if let Some((timer, registration)) = self.timer.take() {
            registry.remove(registration, &timer);
        }
    }

    /// The next connections, some at a time; the rest follow by another event.
    pub(crate) fn accept(
        &mut self,
        most: usize,
        bell: &Bell,
        service: &Service,
        registry: &mut Registry<'_>,
    ) -> Vec<(L::Stream, Permit)> {
        let mut connections = Vec::new();
        self.more = false;
        self.end_pause();
        for _ in 0..BATCH.min(most) {
            match self.next(bell, service) {
                Found::Connection(stream, permit) => connections.push((stream, permit)),
                Found::Nobody => {}
                Found::NothingNow => return connections,
            }
        }
        if most > 0 {
            self.more = true;
            registry.again(LISTENER);
        }
        connections
    }

    /// Has the listener looked at again after a while.
    fn pause(&mut self) {
        if let Some((timer, _)) = &mut self.timer
            && !self.paused
        {
            timer.add(LISTENER, PAUSE);
            self.paused = true;
        }
    }

    /// Stops the timer calling, if a pause is over.
    fn end_pause(&mut self) {
        if let Some((timer, _)) = &mut self.timer
            && self.paused
        {
            while timer.next_due().is_some() {
                self.paused = false;
            }
        }
    }

    fn next(&mut self, bell: &Bell, service: &Service) -> Found<L::Stream> {
        let Some((listener, _)) = &self.open else {
            return Found::NothingNow;
        };
        let bell = bell.clone();
        let wake = move || bell.ring(LISTENER);
        let Ok(permit) = self.limit.take_or_wait(self.cost, wake) else {
            service.counters.say(
                "connections wait in the backlog",
                "the limit of descriptors is reached",
            );
            return Found::NothingNow;
        };
        match self.spare.accept(|| listener.accept()) {
            Ok(Some(stream)) => match listener.admits(&stream) {
                Ok(true) => Found::Connection(stream, permit),
                Ok(false) => {
                    service.counters.refuse("it is of another user");
                    Found::Nobody
                }
                Err(error) => {
                    service.counters.refuse(error);
                    Found::Nobody
                }
            },
            Ok(None) => {
                service.counters.refuse("there are no descriptors left");
                Found::Nobody
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Found::NothingNow,
            Err(error) if is_of_one_connection(&error) => Found::Nobody,
            Err(error) => {
                // The connection is still there, and so is the reason.
                service
                    .counters
                    .say("connections wait in the backlog", error);
                self.pause();
                Found::NothingNow
            }
        }
    }
}

/// Whether only the connection that was to be accepted is concerned: accept(2)
/// passes on what happened to it already.
fn is_of_one_connection(error: &io::Error) -> bool {
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

/// A descriptor to give up when there are no more.
#[derive(Debug)]
struct Spare(Option<File>);

impl Spare {
    fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }

    /// Accepts a connection. When the process has no more descriptors, against all
    /// planning, it is taken with this one and hung up on, which `None` says: whoever
    /// connected need not wait for what may take long.
    ///
    /// # Errors
    /// Nothing was accepted. That this one was given up may have been of use to
    /// others only; then there is none until a connection can be accepted again.
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
