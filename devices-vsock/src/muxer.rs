//! The table of connections, and who is served next.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use sm_vmm_core::event_loop::{Interest, Registry};

use crate::connection::{Connection, Phase};
use crate::group::Group;
use crate::handle::{Acceptor, ConnectError, ConnectOptions, GuestStream, Stats};
use crate::packet::{Header, Operation};

/// First host port given to connections that the host opens.
const FIRST_EPHEMERAL: u32 = 1 << 30;
/// Resets without a connection that may wait for a receive buffer. When there
/// are more, the guest's transmit queue waits.
pub(crate) const MAX_RESETS: usize = 256;

/// Guest port and host port.
pub(crate) type Key = (u32, u32);

#[derive(Default)]
pub(crate) struct Muxer {
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    /// Connections that want a receive buffer, in the order they are served.
    pub(crate) ready: VecDeque<usize>,
    /// Resets for packets without a connection.
    pub(crate) resets: VecDeque<Key>,
    listeners: HashMap<u32, Acceptor>,
    other_listener: Option<Acceptor>,
    /// Where the search for a free ephemeral port begins.
    pub(crate) next_port: u32,
    pub(crate) limit: usize,
    pub(crate) window: u32,
    pub(crate) stats: Stats,
}

impl Muxer {
    pub(crate) fn new(limit: usize, window: u32) -> Self {
        Self {
            limit,
            window,
            ..Self::default()
        }
    }

    pub(crate) fn get(&mut self, slot: usize) -> Option<&mut Connection> {
        self.connections.get_mut(slot)?.as_mut()
    }

    /// Slots in use or free: every slot number is below.
    pub(crate) fn slots(&self) -> usize {
        self.connections.len()
    }

    pub(crate) fn find(&self, key: Key) -> Option<usize> {
        self.by_key.get(&key).copied()
    }

    pub(crate) fn listen(&mut self, host_port: Option<u32>, acceptor: Acceptor) {
        match host_port {
            Some(port) => {
                self.listeners.insert(port, acceptor);
            }
            None => self.other_listener = Some(acceptor),
        }
    }

    /// Queues a connection for a receive buffer, once.
    pub(crate) fn queue(&mut self, slot: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(slot)
            && !connection.queued
            && connection.wants_buffer()
        {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    fn insert(&mut self, mut connection: Connection, registry: &mut Registry<'_>) -> Option<usize> {
        if self.by_key.len() >= self.limit {
            connection.report(Err(ConnectError::Limit));
            return None;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let interest = Interest {
            readable: true,
            writable: true,
            edge: true,
        };
        let prepared = rustix::io::ioctl_fionbio(&connection.stream, true)
            .map_err(std::io::Error::from)
            .and_then(|()| registry.add(&connection.stream, slot as u64, interest));
        match prepared {
            Ok(registration) => connection.registration = Some(registration),
            Err(error) => {
                tracing::warn!(%error, "a stream cannot be waited for");
                connection.report(Err(ConnectError::Limit));
                self.free.push(slot);
                return None;
            }
        }
        self.by_key
            .insert((connection.guest_port, connection.host_port), slot);
        if let Some(place) = self.connections.get_mut(slot) {
            *place = Some(connection);
        }
        self.stats.opened += 1;
        self.stats.connections = self.by_key.len();
        Some(slot)
    }

    /// Opens a connection from the host.
    pub(crate) fn connect(
        &mut self,
        guest_port: u32,
        stream: OwnedFd,
        options: ConnectOptions,
        asked: Option<Instant>,
        registry: &mut Registry<'_>,
    ) {
        let host_port = self.free_port(guest_port);
        let mut connection =
            Connection::new(guest_port, host_port, stream, Phase::Requested, self.window)
                .with_options(options);
        connection.owed.request = true;
        connection.asked = asked;
        if let Some(slot) = self.insert(connection, registry) {
            self.queue(slot);
        }
    }

    /// A host port that no connection to `guest_port` has.
    pub(crate) fn free_port(&mut self, guest_port: u32) -> u32 {
        // Ends: there are more ports than connections.
        loop {
            let port = FIRST_EPHEMERAL | self.next_port & (FIRST_EPHEMERAL - 1);
            self.next_port = self.next_port.wrapping_add(1);
            if !self.by_key.contains_key(&(guest_port, port)) {
                return port;
            }
        }
    }

    /// Serves a REQUEST of the guest.
    pub(crate) fn accept(&mut self, header: &Header, registry: &mut Registry<'_>) {
        let request = GuestStream {
            guest_port: header.src_port,
            host_port: header.dst_port,
        };
        let key = (request.guest_port, request.host_port);
        let stream = self
            .listeners
            .get_mut(&request.host_port)
            .or(self.other_listener.as_mut())
            .and_then(|acceptor| acceptor(request));
        let Some(stream) = stream else {
            self.stats.refused += 1;
            self.reset_unknown(key);
            return;
        };
        let mut connection = Connection::new(
            request.guest_port,
            request.host_port,
            stream,
            Phase::Established,
            self.window,
        );
        connection.update_credit(header.buf_alloc, header.fwd_cnt);
        connection.owed.response = true;
        match self.insert(connection, registry) {
            Some(slot) => self.queue(slot),
            None => self.reset_unknown(key),
        }
    }

    /// Owes the guest a reset for something that is no connection.
    pub(crate) fn reset_unknown(&mut self, key: Key) {
        self.resets.push_back(key);
    }

    /// Whether the guest's next packet can be looked at: what it may cause to be
    /// owed has room.
    pub(crate) fn has_room(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Forgets a connection; its socket is closed.
    pub(crate) fn remove(&mut self, slot: usize, registry: &mut Registry<'_>) {
        let Some(mut connection) = self.connections.get_mut(slot).and_then(Option::take) else {
            return;
        };
        if let Some(registration) = connection.registration.take() {
            registry.remove(registration, &connection.stream);
        }
        connection.report(Err(ConnectError::Refused));
        self.by_key
            .remove(&(connection.guest_port, connection.host_port));
        if connection.queued {
            self.ready.retain(|&other| other != slot);
        }
        self.free.push(slot);
        self.stats.connections = self.by_key.len();
    }

    /// Ends a connection: the guest is owed a reset.
    pub(crate) fn abort(&mut self, slot: usize, registry: &mut Registry<'_>) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        let key = (connection.guest_port, connection.host_port);
        self.remove(slot, registry);
        self.reset_unknown(key);
    }

    /// Ends all connections of a group.
    pub(crate) fn cut(&mut self, group: &Group, registry: &mut Registry<'_>) {
        for slot in 0..self.connections.len() {
            let member = self.get(slot).and_then(|one| one.member.as_ref());
            if member.is_some_and(|member| member.group() == group) {
                self.abort(slot, registry);
            }
        }
    }

    /// Forgets everything; the guest knows, or is gone.
    pub(crate) fn clear(&mut self, registry: Option<&mut Registry<'_>>) {
        if let Some(registry) = registry {
            for slot in 0..self.connections.len() {
                self.remove(slot, registry);
            }
        }
        for connection in self.connections.drain(..).flatten() {
            drop(connection);
        }
        self.free.clear();
        self.by_key.clear();
        self.ready.clear();
        self.resets.clear();
        self.stats.connections = 0;
    }

    /// After bytes were written to a socket, or an end was told: what follows.
    pub(crate) fn settle(&mut self, slot: usize, registry: &mut Registry<'_>) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        if !connection.is_finished() {
            self.queue(slot);
        } else if connection.phase == Phase::Draining {
            self.remove(slot, registry);
        } else {
            self.abort(slot, registry);
        }
    }

    /// The guest ends a connection by RST; what it had sent is still written.
    pub(crate) fn guest_resets(&mut self, slot: usize, registry: &mut Registry<'_>) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        if connection.phase == Phase::Requested || connection.backlog_len() == 0 {
            self.remove(slot, registry);
            return;
        }
        connection.phase = Phase::Draining;
        connection.owed = crate::connection::Owed::default();
        connection.read_done = true;
    }
}

/// A header from the host to the guest.
pub(crate) fn reply(guest_cid: u64, (guest_port, host_port): Key, op: Operation) -> Header {
    Header {
        src_cid: crate::packet::HOST_CID,
        dst_cid: guest_cid,
        src_port: host_port,
        dst_port: guest_port,
        kind: crate::packet::TYPE_STREAM,
        op: op as u16,
        ..Header::default()
    }
}
