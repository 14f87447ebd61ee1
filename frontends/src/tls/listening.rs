//! The event handler of the TLS frontend: its listener and its connections.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sm_devices_vsock::{Permit, ProfileStage};
use sm_event_loop::{EventHandler, Interest, Readiness, Registry, Timer};

use super::identity::CurrentIdentity;
use super::session::{Pumped, TlsSession};
use crate::acceptor::{CLOSING_ROUNDS, LISTENER, ListenerAcceptor};
use crate::handle::Frontend;
use crate::service::{FrontendService, HandlerWaker};
use crate::shortage::RETRY;
use crate::{ForwardTarget, token};

/// Descriptors per connection: its socket, and a socket pair to the guest.
const COST: usize = 3;
/// Concurrent handshakes; more connections wait in the backlog.
const MAX_HANDSHAKES: usize = 256;

/// First token of connections: an even token is that of the client's socket, the next odd
/// one that of its plain side.
const FIRST: u64 = 2;

const BOTH_EDGES: Interest = Interest::READ.and(Interest::WRITE).edge_triggered();

/// A connection and its registrations with the event loop.
struct TlsConnection {
    session: TlsSession,
    /// End of the time limit of the handshake or of closing.
    deadline: Option<Timer>,
    /// Time of the next attempt after a memory shortage.
    retry: Option<Timer>,
}

/// Targets of connections.
pub(super) struct Targets {
    pub(super) any: ForwardTarget,
    /// Targets by requested server name, in lower case.
    pub(super) names: HashMap<String, ForwardTarget>,
}

impl Targets {
    fn of(&self, name: Option<&str>) -> ForwardTarget {
        let named = name.and_then(|name| self.names.get(&name.to_ascii_lowercase()));
        named.copied().unwrap_or(self.any)
    }
}

pub(super) struct TlsListener {
    acceptor: ListenerAcceptor<TcpListener>,
    identity: CurrentIdentity,
    targets: Targets,
    handshake_timeout: Duration,
    service: FrontendService,
    waker: Option<HandlerWaker>,
    sessions: HashMap<u64, TlsConnection>,
    next: u64,
    handshakes: usize,
    /// True if a client may be in the backlog while the handshake limit is reached.
    backlog_waits: bool,
    /// True after the handle was dropped.
    retired: bool,
}

impl TlsListener {
    pub(super) fn new(
        listener: TcpListener,
        identity: CurrentIdentity,
        targets: Targets,
        handshake_timeout: Duration,
        service: FrontendService,
    ) -> Self {
        Self {
            acceptor: ListenerAcceptor::new(listener, COST, service.limit.clone()),
            identity,
            targets,
            handshake_timeout,
            service,
            waker: None,
            sessions: HashMap::new(),
            next: FIRST,
            handshakes: 0,
            backlog_waits: false,
            retired: false,
        }
    }

    /// Accepts some connections. Returns true if there may be more.
    fn accept(&mut self, registry: &mut dyn Registry) -> bool {
        let Some(waker) = self.waker.clone() else {
            return false;
        };
        let mut since = self.service.muxer.profiler().begin();
        let free = MAX_HANDSHAKES.saturating_sub(self.handshakes);
        self.backlog_waits = free == 0;
        let accepted = self.acceptor.accept(free, &waker, &self.service, registry);
        for (socket, permit) in accepted {
            if let Err(error) = self.add(socket, permit, registry) {
                self.service.counters.refuse(error);
            }
            let profiler = self.service.muxer.profiler();
            profiler.end(ProfileStage::Accept, since);
            since = profiler.begin();
        }
        self.acceptor.has_more()
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
        let session = TlsSession::new(socket, self.identity.current(), member)?;
        self.next += 2;
        self.handshakes += 1;
        let connection = TlsConnection {
            session,
            deadline: None,
            retry: None,
        };
        self.sessions.insert(token, connection);
        self.start_time_limit(token, registry);
        Ok(())
    }

    /// Starts the time limit of a connection.
    fn start_time_limit(&mut self, token: u64, registry: &mut dyn Registry) {
        if let Some(connection) = self.sessions.get_mut(&token) {
            connection.deadline =
                registry.set_timer_after(self.handshake_timeout, token | token::DEADLINE);
        }
    }

    /// Closes a connection that exceeded its time limit.
    fn evict(&mut self, token: u64, registry: &mut dyn Registry) {
        let connection = self.sessions.get(&token);
        let why = match connection.is_some_and(|connection| connection.session.guest.is_none()) {
            true => "its handshake was not complete in time",
            false => "it did not close the connection in time",
        };
        self.service.counters.evict(why);
        self.remove(token, registry);
    }

    fn remove(&mut self, token: u64, registry: &mut dyn Registry) {
        let Some(connection) = self.sessions.remove(&token) else {
            return;
        };
        for timer in [connection.deadline, connection.retry]
            .into_iter()
            .flatten()
        {
            registry.cancel_timer(timer);
        }
        registry.remove(connection.session.socket);
        match connection.session.guest {
            Some(guest) => drop(registry.remove(guest)),
            None => self.end_handshake(registry),
        }
        if let Some(waker) = &self.waker
            && self.retired
            && self.sessions.is_empty()
        {
            waker.remove();
        }
    }

    fn end_handshake(&mut self, registry: &mut dyn Registry) {
        self.handshakes -= 1;
        if std::mem::take(&mut self.backlog_waits) {
            registry.call_again(LISTENER);
        }
    }

    fn serve(&mut self, token: u64, registry: &mut dyn Registry) {
        let Some(connection) = self.sessions.get_mut(&token) else {
            return;
        };
        match connection.session.pump() {
            Ok(Pumped::Idle) => {
                if connection.session.is_short_of_memory() && connection.retry.is_none() {
                    connection.retry = registry.set_timer_after(RETRY, token | token::RETRY);
                }
                if connection.session.is_closing() && connection.deadline.is_none() {
                    self.start_time_limit(token, registry);
                }
            }
            Ok(Pumped::More) => registry.call_again(token),
            Ok(Pumped::Established) => match self.establish(token, registry) {
                Ok(()) => registry.call_again(token),
                Err(error) => {
                    self.service.counters.refuse(error);
                    self.remove(token, registry);
                }
            },
            Ok(Pumped::Ended) => self.remove(token, registry),
            Err(error) => {
                if connection.session.guest.is_none() {
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
        let Some(connection) = self.sessions.get_mut(&token) else {
            return Ok(());
        };
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = registry.add(ours, token + 1, BOTH_EDGES)?;
        let target = self.targets.of(connection.session.server_name());
        connection.session.set_guest(ours);
        if let Some(timer) = connection.deadline.take() {
            registry.cancel_timer(timer);
        }
        // The session, not the stream, is the member of the group: it ends when the
        // client has received all bytes.
        self.service
            .connect(target.connect_arguments(), OwnedFd::from(theirs), None);
        self.end_handshake(registry);
        Ok(())
    }
}

impl EventHandler for TlsListener {
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
                let since = self.service.muxer.profiler().begin();
                let session = token & !(token::RETRY | 1);
                if token & token::RETRY != 0
                    && let Some(connection) = self.sessions.get_mut(&session)
                {
                    connection.retry = None;
                }
                self.serve(session, registry);
                self.service.muxer.profiler().end(ProfileStage::Tls, since);
            }
        }
    }
}

impl Frontend for TlsListener {
    fn register(&mut self, waker: HandlerWaker, registry: &mut dyn Registry) -> io::Result<()> {
        self.waker = Some(waker);
        self.acceptor.register(registry)
    }

    fn close(&mut self, registry: &mut dyn Registry) {
        let mut rounds = 0..CLOSING_ROUNDS;
        while rounds.next().is_some() && self.accept(registry) {}
        self.acceptor.close(registry);
    }

    fn cut(&mut self, registry: &mut dyn Registry) {
        let tokens: Vec<u64> = self.sessions.keys().copied().collect();
        for token in tokens {
            self.remove(token, registry);
        }
    }

    fn outlives_handle(&mut self) -> bool {
        self.retired = true;
        !self.sessions.is_empty()
    }
}
