//! The event handler of the TLS frontend: its listener and its connections.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sm_devices_vsock::{Permit, Stage};
use sm_event_loop::{EventHandler, Interest, Readiness, Registry, Timer};

use super::identity::Identity;
use super::session::{Pumped, Session};
use crate::gate::{CLOSING_ROUNDS, Gate, LISTENER};
use crate::handle::Frontend;
use crate::service::{Bell, Service};
use crate::shortage::RETRY;
use crate::{Target, token};

/// Descriptors per connection: its socket, and a socket pair to the guest.
const COST: usize = 3;
/// Concurrent handshakes; more connections wait in the backlog.
const MAX_HANDSHAKES: usize = 256;

/// First token of connections: an even token is that of the client's socket, the next odd
/// one that of its plain side.
const FIRST: u64 = 2;

const BOTH_EDGES: Interest = Interest {
    readable: true,
    writable: true,
    edge: true,
};

/// A connection and its registrations with the event loop.
struct Place {
    session: Session,
    /// End of the time limit of the handshake or of closing.
    deadline: Option<Timer>,
    /// Time of the next attempt after a memory shortage.
    retry: Option<Timer>,
}

/// Targets of connections.
pub(super) struct Targets {
    pub(super) any: Target,
    /// Targets by requested server name, in lower case.
    pub(super) names: HashMap<String, Target>,
}

impl Targets {
    fn of(&self, name: Option<&str>) -> Target {
        let named = name.and_then(|name| self.names.get(&name.to_ascii_lowercase()));
        named.copied().unwrap_or(self.any)
    }
}

pub(super) struct Listening {
    gate: Gate<TcpListener>,
    identity: Identity,
    targets: Targets,
    patience: Duration,
    service: Service,
    bell: Option<Bell>,
    sessions: HashMap<u64, Place>,
    next: u64,
    handshakes: usize,
    /// True if a client may be in the backlog while the handshake limit is reached.
    somebody_waits: bool,
    /// True after the handle was dropped.
    retired: bool,
}

impl Listening {
    pub(super) fn new(
        listener: TcpListener,
        identity: Identity,
        targets: Targets,
        patience: Duration,
        service: Service,
    ) -> Self {
        Self {
            gate: Gate::new(listener, COST, service.limit.clone()),
            identity,
            targets,
            patience,
            service,
            bell: None,
            sessions: HashMap::new(),
            next: FIRST,
            handshakes: 0,
            somebody_waits: false,
            retired: false,
        }
    }

    /// Accepts some connections. Returns true if there may be more.
    fn accept(&mut self, registry: &mut dyn Registry) -> bool {
        let Some(bell) = self.bell.clone() else {
            return false;
        };
        let mut begun = self.service.muxer.profiler().begin();
        let room = MAX_HANDSHAKES.saturating_sub(self.handshakes);
        self.somebody_waits = room == 0;
        let accepted = self.gate.accept(room, &bell, &self.service, registry);
        for (socket, permit) in accepted {
            if let Err(error) = self.add(socket, permit, registry) {
                self.service.counters.refuse(error);
            }
            let profiler = self.service.muxer.profiler();
            profiler.end(Stage::Accept, begun);
            begun = profiler.begin();
        }
        self.gate.has_more()
    }

    fn add(
        &mut self,
        socket: TcpStream,
        permit: Permit,
        registry: &mut dyn Registry,
    ) -> io::Result<()> {
        let member = self.service.group.join(Some(permit));
        let token = self.next;
        let socket = registry.add(socket, token, BOTH_EDGES)?;
        let session = Session::new(socket, self.identity.current(), member)?;
        self.next += 2;
        self.handshakes += 1;
        let place = Place {
            session,
            deadline: None,
            retry: None,
        };
        self.sessions.insert(token, place);
        self.limit(token, registry);
        Ok(())
    }

    /// Starts the time limit of a connection.
    fn limit(&mut self, token: u64, registry: &mut dyn Registry) {
        if let Some(place) = self.sessions.get_mut(&token) {
            place.deadline = registry.set_timer_after(self.patience, token | token::DEADLINE);
        }
    }

    /// Closes a connection that exceeded its time limit.
    fn evict(&mut self, token: u64, registry: &mut dyn Registry) {
        let place = self.sessions.get(&token);
        let why = match place.is_some_and(|place| place.session.guest.is_none()) {
            true => "its handshake was not complete in time",
            false => "it did not close the connection in time",
        };
        self.service.counters.evict(why);
        self.remove(token, registry);
    }

    fn remove(&mut self, token: u64, registry: &mut dyn Registry) {
        let Some(place) = self.sessions.remove(&token) else {
            return;
        };
        for timer in [place.deadline, place.retry].into_iter().flatten() {
            registry.cancel_timer(timer);
        }
        registry.remove(place.session.socket);
        match place.session.guest {
            Some(guest) => drop(registry.remove(guest)),
            None => self.handshake_is_over(registry),
        }
        if let Some(bell) = &self.bell
            && self.retired
            && self.sessions.is_empty()
        {
            bell.remove();
        }
    }

    fn handshake_is_over(&mut self, registry: &mut dyn Registry) {
        self.handshakes -= 1;
        if std::mem::take(&mut self.somebody_waits) {
            registry.again(LISTENER);
        }
    }

    fn serve(&mut self, token: u64, registry: &mut dyn Registry) {
        let Some(place) = self.sessions.get_mut(&token) else {
            return;
        };
        match place.session.pump() {
            Ok(Pumped::Idle) => {
                if place.session.is_short_of_memory() && place.retry.is_none() {
                    place.retry = registry.set_timer_after(RETRY, token | token::RETRY);
                }
                if place.session.is_closing() && place.deadline.is_none() {
                    self.limit(token, registry);
                }
            }
            Ok(Pumped::More) => registry.again(token),
            Ok(Pumped::Established) => match self.establish(token, registry) {
                Ok(()) => registry.again(token),
                Err(error) => {
                    self.service.counters.refuse(error);
                    self.remove(token, registry);
                }
            },
            Ok(Pumped::Ended) => self.remove(token, registry),
            Err(error) => {
                if place.session.guest.is_none() {
                    self.service.counters.refuse(error);
                } else {
                    tracing::debug!(%error, "a TLS connection broke off");
                }
                self.remove(token, registry);
            }
        }
    }

    /// Connects a client with a complete handshake to the guest.
    fn establish(&mut self, token: u64, registry: &mut dyn Registry) -> io::Result<()> {
        let Some(place) = self.sessions.get_mut(&token) else {
            return Ok(());
        };
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = registry.add(ours, token + 1, BOTH_EDGES)?;
        let target = self.targets.of(place.session.server_name());
        place.session.begin(ours);
        if let Some(timer) = place.deadline.take() {
            registry.cancel_timer(timer);
        }
        // The session, not the stream, is the member of the group: it ends when the
        // client has received all bytes.
        self.service
            .connect(target.open(), OwnedFd::from(theirs), None);
        self.handshake_is_over(registry);
        Ok(())
    }
}

impl EventHandler for Listening {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
        match token {
            LISTENER => {
                self.accept(registry);
            }
            late if late & token::DEADLINE != 0 => {
                self.evict(late & !token::DEADLINE, registry);
            }
            token => {
                let begun = self.service.muxer.profiler().begin();
                let session = token & !(token::RETRY | 1);
                if token & token::RETRY != 0
                    && let Some(place) = self.sessions.get_mut(&session)
                {
                    place.retry = None;
                }
                self.serve(session, registry);
                self.service.muxer.profiler().end(Stage::Tls, begun);
            }
        }
    }
}

impl Frontend for Listening {
    fn begin(&mut self, bell: Bell, registry: &mut dyn Registry) -> io::Result<()> {
        self.bell = Some(bell);
        self.gate.begin(registry)
    }

    fn close(&mut self, registry: &mut dyn Registry) {
        let mut rounds = 0..CLOSING_ROUNDS;
        while rounds.next().is_some() && self.accept(registry) {}
        self.gate.close(registry);
    }

    fn cut(&mut self, registry: &mut dyn Registry) {
        let tokens: Vec<u64> = self.sessions.keys().copied().collect();
        for token in tokens {
            self.remove(token, registry);
        }
    }

    fn stays(&mut self) -> bool {
        self.retired = true;
        !self.sessions.is_empty()
    }
}
