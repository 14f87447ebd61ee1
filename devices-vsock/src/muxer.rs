//! The table of connections, their shared resources, and their life cycle.

mod timers;

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use sm_event_loop::{Interest, Registered, Registry, SlotQueue};

use crate::allowance::Allowance;
use crate::backlog::ChunkPool;
use crate::config::VsockConfig;
use crate::connection::{Awaiting, Connection, Key, Phase};
use crate::group::Group;
use crate::handle::{
    Acceptor, Command, ConnectError, ConnectRequest, GuestStream, Mailbox, SocketKind,
};
use crate::host::HostSocket;
use crate::packet::{Header, TYPE_SEQPACKET};
use crate::profile::ProfileStage;

pub(crate) use self::timers::{DEADLINE, RETRIES};

/// First host port of connections that the host opens.
const FIRST_EPHEMERAL: u32 = 1 << 30;
/// Maximum number of resets without a connection that wait for a receive buffer. Beyond it,
/// the guest's transmit queue waits.
const MAX_RESETS: usize = 256;

/// A reset for a packet without a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StrayReset {
    pub(crate) key: Key,
    /// The socket type of the packet that it answers.
    pub(crate) kind: u16,
}

struct Listener {
    id: u64,
    acceptor: Acceptor,
}

pub(crate) struct Muxer {
    config: VsockConfig,
    // Boxed, so that the table's own growth is cheap and leaves little memory unused.
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<u32>,
    /// Without draining connections: the guest has forgotten these, and may use the ports
    /// again.
    by_key: HashMap<Key, u32>,
    /// Connections that need a receive buffer, in the order of service.
    pub(crate) ready: SlotQueue,
    pub(crate) resets: VecDeque<StrayReset>,
    listeners: HashMap<Option<u32>, Listener>,
    pub(crate) pool: ChunkPool,
    allowance: Allowance,
    /// Start of the search for a free ephemeral port.
    pub(crate) next_port: u32,
    pub(crate) mailbox: Arc<Mailbox>,
    warned_of_limit: bool,
}

impl Muxer {
    pub(crate) fn new(config: VsockConfig, mailbox: Arc<Mailbox>) -> Self {
        Self {
            config,
            connections: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            ready: SlotQueue::default(),
            resets: VecDeque::with_capacity(MAX_RESETS),
            listeners: HashMap::new(),
            pool: ChunkPool::default(),
            allowance: Allowance::new(&config),
            next_port: 0,
            mailbox,
            warned_of_limit: false,
        }
    }

    pub(crate) fn get(&mut self, slot: u32) -> Option<&mut Connection> {
        self.connections.get_mut(slot as usize)?.as_deref_mut()
    }

    /// Returns a connection, and the pool that it shares with others.
    pub(crate) fn parts(&mut self, slot: u32) -> Option<(&mut Connection, &mut ChunkPool)> {
        let connection = self.connections.get_mut(slot as usize)?.as_deref_mut()?;
        Some((connection, &mut self.pool))
    }

    /// Returns the number of slots, in use or free: every slot number is less.
    pub(crate) fn slots(&self) -> u32 {
        // At most the number of connections, which fits a u32.
        u32::try_from(self.connections.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn find(&self, key: Key) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    fn in_use(&self) -> usize {
        self.connections.len() - self.free.len()
    }

    /// Queues a connection for a receive buffer, if it needs one.
    pub(crate) fn queue(&mut self, slot: u32) {
        if self.get(slot).is_some_and(|it| it.wants_buffer()) {
            self.ready.push_back(slot);
        }
    }

    /// Executes a command of host code. `refusal` is the reason why no connection is
    /// possible.
    pub(crate) fn command(
        &mut self,
        command: Command,
        refusal: Option<ConnectError>,
        registry: &mut dyn Registry,
    ) {
        match command {
            Command::Connect(stream, mut request) => match refusal {
                Some(error) => request.report.send(Err(error)),
                None => self.connect(stream, request, registry),
            },
            Command::Listen {
                id,
                host_port,
                acceptor,
            } => {
                self.listeners.insert(host_port, Listener { id, acceptor });
            }
            Command::Unlisten { id, host_port } => {
                if self.listeners.get(&host_port).is_some_and(|it| it.id == id) {
                    self.listeners.remove(&host_port);
                }
            }
            Command::Cut(group) => self.cut(&group, registry),
        }
    }

    /// Opens a connection from the host.
    fn connect(
        &mut self,
        stream: OwnedFd,
        mut request: ConnectRequest,
        registry: &mut dyn Registry,
    ) {
        if !self.has_capacity() {
            request.report.send(Err(ConnectError::Limit));
            return;
        }
        let socket = match HostSocket::new(stream, self.largest_message()) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "a descriptor is no socket that can be connected");
                request.report.send(Err(ConnectError::Unusable));
                return;
            }
        };
        let Some((slot, socket)) = self.register(socket, registry) else {
            request.report.send(Err(ConnectError::Unusable));
            return;
        };
        let key = (request.guest_port, self.free_port(request.guest_port));
        let window = self.window_for(&socket);
        let most = self.config.answer_timeout.saturating_add(request.wait);
        let connection =
            Connection::new(key, socket, Phase::Requested, window).with_request(request);
        self.insert(slot, connection);
        self.await_until(slot, Awaiting::Answer, most, registry);
        self.queue(slot);
    }

    /// Returns true if one more connection is possible.
    fn has_capacity(&mut self) -> bool {
        if self.in_use() < self.config.max_connections {
            return true;
        }
        self.mailbox.counters.refused.add(1);
        if !std::mem::replace(&mut self.warned_of_limit, true) {
            let limit = self.config.max_connections;
            tracing::warn!(
                limit,
                "the limit of connections is reached; others are refused"
            );
        }
        false
    }

    fn largest_message(&self) -> u32 {
        self.config.window.min(crate::connection::MAX_MESSAGE)
    }

    fn window_for(&mut self, socket: &HostSocket) -> u32 {
        let first = self.allowance.first();
        match socket.kind {
            SocketKind::Stream => first,
            // A message must fit, and the window cannot grow for it later.
            SocketKind::SeqPacket => {
                let wanted = self.largest_message().saturating_sub(first);
                self.allowance.more(first, wanted)
            }
        }
    }

    /// Registers the socket of a future connection, under its slot.
    fn register(
        &mut self,
        socket: HostSocket,
        registry: &mut dyn Registry,
    ) -> Option<(u32, Registered<HostSocket>)> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.slots() - 1
        });
        match registry.add(socket, u64::from(slot), interest(false)) {
            Ok(socket) => Some((slot, socket)),
            Err(error) => {
                tracing::warn!(%error, "a socket cannot be waited for");
                self.free.push(slot);
                None
            }
        }
    }

    fn insert(&mut self, slot: u32, connection: Connection) {
        self.by_key.insert(connection.key, slot);
        if let Some(entry) = self.connections.get_mut(slot as usize) {
            *entry = Some(Box::new(connection));
        }
        self.mailbox.counters.opened.add(1);
        self.count();
    }

    fn count(&self) {
        self.mailbox.counters.connections.set(self.in_use() as u64);
    }

    /// Returns a host port that no connection to `guest_port` uses.
    pub(crate) fn free_port(&mut self, guest_port: u32) -> u32 {
        // The loop ends: there are more ports than connections.
        loop {
            let port = FIRST_EPHEMERAL | self.next_port & (FIRST_EPHEMERAL - 1);
            self.next_port = self.next_port.wrapping_add(1);
            if !self.by_key.contains_key(&(guest_port, port)) {
                return port;
            }
        }
    }

    /// Serves a REQUEST of the guest.
    pub(crate) fn accept(&mut self, header: &Header, registry: &mut dyn Registry) {
        let key = (header.src_port, header.dst_port);
        match self.call_acceptor(header, key, registry) {
            Some((slot, connection)) => {
                self.insert(slot, connection);
                self.queue(slot);
            }
            None => self.reset_stray(key, header.kind),
        }
    }

    fn call_acceptor(
        &mut self,
        header: &Header,
        key: Key,
        registry: &mut dyn Registry,
    ) -> Option<(u32, Connection)> {
        // Before the acceptor: it may dial.
        if !self.has_capacity() {
            return None;
        }
        let kind = match header.kind {
            TYPE_SEQPACKET => SocketKind::SeqPacket,
            _ => SocketKind::Stream,
        };
        let request = GuestStream {
            guest_port: key.0,
            host_port: key.1,
            kind,
        };
        let listener = match self.listeners.contains_key(&Some(key.1)) {
            true => self.listeners.get_mut(&Some(key.1)),
            false => self.listeners.get_mut(&None),
        };
        let accepted = listener
            .and_then(|listener| (listener.acceptor)(request))
            .and_then(|accepted| Some((self.usable(accepted.socket, kind)?, accepted.member)));
        let Some((socket, member)) = accepted else {
            self.mailbox.counters.refused.add(1);
            return None;
        };
        let (slot, socket) = self.register(socket, registry)?;
        let window = self.window_for(&socket);
        let mut connection = Connection::new(key, socket, Phase::Established, window);
        connection.outgoing.update(header.buf_alloc, header.fwd_cnt);
        connection.pending.response = true;
        connection.member = member;
        if let Some(member) = &mut connection.member {
            member.begin();
        }
        Some((slot, connection))
    }

    fn usable(&self, fd: OwnedFd, kind: SocketKind) -> Option<HostSocket> {
        match HostSocket::new(fd, self.largest_message()) {
            Ok(socket) if socket.kind == kind => Some(socket),
            other => {
                tracing::warn!(
                    ?kind,
                    ?other,
                    "an acceptor returned another type of socket than requested"
                );
                None
            }
        }
    }

    /// Queues a reset for a packet without a connection.
    pub(crate) fn reset_stray(&mut self, key: Key, kind: u16) {
        self.resets.push_back(StrayReset { key, kind });
    }

    /// Returns true if the guest's next packet can be handled: a reset that it may cause
    /// has room.
    pub(crate) fn has_room(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Returns window and counter for the next packet of a connection, with a larger window
    /// if the guest uses the one it has.
    pub(crate) fn announce(&mut self, slot: u32) -> (u32, u32) {
        let Some(connection) = self.connections.get_mut(slot as usize) else {
            return (0, 0);
        };
        let Some(connection) = connection.as_deref_mut() else {
            return (0, 0);
        };
        let window = connection.incoming.window();
        if connection.incoming.is_due() && !connection.is_seqpacket() {
            connection
                .incoming
                .grow(self.allowance.more(window, window));
        }
        connection.announce()
    }

    /// Removes a connection, and closes its socket. A requester that waits for it gets
    /// `outcome`.
    pub(crate) fn remove(&mut self, slot: u32, outcome: ConnectError, registry: &mut dyn Registry) {
        let entry = self.connections.get_mut(slot as usize);
        let Some(mut connection) = entry.and_then(Option::take) else {
            return;
        };
        self.remove_key(&connection, slot);
        self.ready.remove(slot);
        for timer in [connection.deadline, connection.retry]
            .into_iter()
            .flatten()
        {
            registry.cancel_timer(timer);
        }
        connection.release(&mut self.pool);
        self.allowance.release(connection.incoming.window());
        self.free.push(slot);
        self.count();
        connection.report(Err(outcome));
        registry.remove(connection.socket);
    }

    fn remove_key(&mut self, connection: &Connection, slot: u32) {
        if self.by_key.get(&connection.key) == Some(&slot) {
            self.by_key.remove(&connection.key);
        }
    }

    /// Ends a connection; the guest gets a reset if it knows the connection.
    pub(crate) fn abort(&mut self, slot: u32, outcome: ConnectError, registry: &mut dyn Registry) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        let known_to_guest = connection.phase == Phase::Established
            || connection.phase == Phase::Requested && !connection.pending.request;
        let (key, kind) = (connection.key, connection.socket_type());
        self.remove(slot, outcome, registry);
        if known_to_guest {
            self.reset_stray(key, kind);
        }
    }

    /// Ends all connections of a group.
    pub(crate) fn cut(&mut self, group: &Group, registry: &mut dyn Registry) {
        for slot in 0..self.slots() {
            let member = self.get(slot).and_then(|one| one.member.as_ref());
            if member.is_some_and(|member| member.group() == group) {
                self.abort(slot, ConnectError::Reset, registry);
            }
        }
    }

    /// Ends all connections, without resets: the guest knows, or is gone. Its earlier data
    /// are still written, unless the event loop is gone too.
    pub(crate) fn clear(&mut self, registry: Option<&mut dyn Registry>) {
        self.resets.clear();
        self.warned_of_limit = false;
        let Some(registry) = registry else {
            for mut connection in std::mem::take(&mut self.connections).into_iter().flatten() {
                connection.report(Err(ConnectError::Reset));
            }
            self.free.clear();
            self.by_key.clear();
            self.ready = SlotQueue::default();
            self.pool = ChunkPool::default();
            self.allowance = Allowance::new(&self.config);
            self.count();
            return;
        };
        for slot in 0..self.slots() {
            self.guest_resets(slot, ConnectError::Reset, registry);
        }
    }

    /// Makes the event loop report writability while a backlog exists.
    pub(crate) fn watch_writing(&mut self, slot: u32, registry: &mut dyn Registry) {
        if let Some(connection) = self.get(slot)
            && connection.has_backlog() != connection.watches_writing
        {
            let wanted = connection.has_backlog();
            match registry.modify(&connection.socket, interest(wanted)) {
                Ok(()) => connection.watches_writing = wanted,
                Err(error) => tracing::error!(%error, "a socket cannot be waited for"),
            }
        }
    }

    /// Continues after bytes were written to a socket, or a direction has ended.
    pub(crate) fn settle(&mut self, slot: u32, registry: &mut dyn Registry) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        if connection.is_finished() {
            // Sends a reset unless the guest knows.
            self.abort(slot, ConnectError::Reset, registry);
            return;
        }
        let awaits = connection.awaits();
        if awaits != connection.awaiting {
            let most = match awaits {
                Awaiting::Answer => None,
                Awaiting::Status => {
                    let wait = connection.status_wait;
                    Some(self.config.status_timeout.saturating_add(wait))
                }
                Awaiting::Nothing => Some(Duration::MAX),
                Awaiting::End => Some(self.config.answer_timeout),
                Awaiting::Tail => Some(self.config.linger),
            };
            if let Some(most) = most {
                self.await_until(slot, awaits, most, registry);
            }
        }
        self.retry_if_due(slot, registry);
        self.queue(slot);
    }

    /// Writes stored bytes to a socket, as far as it accepts them; returns false if the
    /// connection ended thereby.
    pub(crate) fn flush(&mut self, slot: u32, registry: &mut dyn Registry) -> bool {
        let entry = self.connections.get_mut(slot as usize);
        let Some(connection) = entry.and_then(Option::as_deref_mut) else {
            return false;
        };
        if !connection.has_backlog() {
            return true;
        }
        let sound = connection.flush(&mut self.pool, &self.mailbox.counters);
        if !connection.has_backlog() {
            let since = connection.stored_since.take();
            self.mailbox.profiler.end(ProfileStage::GuestToHost, since);
        }
        if !sound {
            self.abort(slot, ConnectError::Reset, registry);
        }
        sound
    }

    /// Handles the guest's end of a connection; its earlier data are still written. A
    /// requester that waits for it gets `outcome`.
    pub(crate) fn guest_resets(
        &mut self,
        slot: u32,
        outcome: ConnectError,
        registry: &mut dyn Registry,
    ) {
        let entry = self.connections.get_mut(slot as usize);
        let Some(connection) = entry.and_then(Option::as_deref_mut) else {
            return;
        };
        if connection.phase == Phase::Draining {
            return;
        }
        if connection.phase == Phase::Requested || !connection.has_backlog() {
            self.remove(slot, outcome, registry);
            return;
        }
        connection.report(Err(outcome));
        connection.guest_closed();
        self.by_key.remove(&connection.key);
        self.ready.remove(slot);
        self.settle(slot, registry);
    }
}

fn interest(writable: bool) -> Interest {
    let edge = Interest::READ.edge_triggered();
    match writable {
        true => edge.and(Interest::WRITE),
        false => edge,
    }
}
