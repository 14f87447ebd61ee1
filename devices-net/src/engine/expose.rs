//! Ports of the host that reach the guest.
//!
//! The guest sees the address of the client, if that is one that packets on its link may have, and
//! the gateway's otherwise: clients on the host itself are such. A client of UDP is a flow, whose
//! answers come from the port of the host that it has asked. One of TCP is accepted by the host at
//! once, and is reset if the guest refuses it.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recvfrom, sendto};
use sm_event_loop::{Interest, Registered, Registry, SlotQueue, Timer};

use super::config::{EngineConfig, EngineLimits};
use super::egress::FlowProtocol;
use super::events::FlowEnd;
use super::flow::{FlowKey, TokenKind, token};
use super::handle::NewPort;
use super::journal::{Journal, Tally};
use super::link::{GuestFrame, LinkFull};
use super::output::Output;
use super::socket;
use super::table::{FlowTable, Keyed};
use super::tcp::TcpFlows;
use super::turn::Turn;
use crate::wire::MAX_IP_PACKET;

/// Datagrams that a port delivers before others have their turn, and connections.
const QUANTUM: usize = 16;
/// Ports that are tried for a client whose own is one of another client already.
const ATTEMPTS: u16 = 64;
/// Smallest time between two timers: flows may live that much longer.
const TICK: Duration = Duration::from_secs(1);

struct Port {
    number: u64,
    protocol: FlowProtocol,
    guest_port: u16,
    socket: PortSocket,
}

enum PortSocket {
    /// The engine has not started.
    Idle(OwnedFd),
    Active(Registered<OwnedFd>),
}

/// A client of a UDP port.
struct Client {
    key: FlowKey,
    port: u32,
    address: SocketAddr,
    last: Instant,
    tally: Tally,
}

impl Keyed for Client {
    fn key(&self) -> &FlowKey {
        &self.key
    }
}

/// A datagram that the link had no room for.
struct Held {
    key: FlowKey,
    len: usize,
}

/// All exposed ports of an engine.
pub(crate) struct ExposedPorts {
    ports: Vec<Option<Port>>,
    clients: FlowTable<Client>,
    /// Clients, those unused longest first.
    order: SlotQueue,
    /// UDP ports whose sockets may have datagrams.
    ready: SlotQueue,
    held: Option<Held>,
    /// One datagram for the guest, and one of it; empty until there is one.
    buffer: Vec<u8>,
    outgoing: Vec<u8>,
    timer: Option<Timer>,
    id: u32,
    limits: EngineLimits,
}

impl ExposedPorts {
    pub(crate) fn new(limits: EngineLimits) -> Self {
        Self {
            ports: Vec::new(),
            clients: FlowTable::new(),
            order: SlotQueue::default(),
            ready: SlotQueue::default(),
            held: None,
            buffer: Vec::new(),
            outgoing: Vec::new(),
            timer: None,
            id: 0,
            limits,
        }
    }

    /// Exposes a port.
    pub(crate) fn add(&mut self, new: NewPort, registry: &mut dyn Registry) {
        let port = Some(Port {
            number: new.number,
            protocol: new.protocol,
            guest_port: new.guest_port,
            socket: PortSocket::Idle(new.socket),
        });
        match self.ports.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = port,
            None => self.ports.push(port),
        }
        self.start(registry);
    }

    /// Has the event loop wait for all ports.
    pub(crate) fn start(&mut self, registry: &mut dyn Registry) {
        for (slot, place) in (0u32..).zip(&mut self.ports) {
            let Some(port) = place.take() else { continue };
            let socket = match port.socket {
                PortSocket::Idle(socket) => {
                    let token = token(TokenKind::Exposed, slot);
                    match registry.add(socket, token, Interest::READ.edge_triggered()) {
                        Ok(socket) => PortSocket::Active(socket),
                        Err(error) => {
                            tracing::warn!(%error, "an exposed port is closed");
                            continue;
                        }
                    }
                }
                active => active,
            };
            *place = Some(Port { socket, ..port });
            // Clients may have come before.
            registry.call_again(token(TokenKind::Exposed, slot));
        }
    }

    /// Closes a port, and ends the flows of its datagrams.
    pub(crate) fn remove(
        &mut self,
        number: u64,
        registry: &mut dyn Registry,
        journal: &mut Journal,
    ) {
        let is_it = |port: &&mut Option<Port>| port.as_ref().is_some_and(|it| it.number == number);
        let Some((slot, place)) = (0u32..)
            .zip(&mut self.ports)
            .find(|(_, place)| is_it(place))
        else {
            return;
        };
        if let Some(port) = place.take()
            && let PortSocket::Active(socket) = port.socket
        {
            drop(registry.remove(socket));
        }
        self.ready.remove(slot);
        for client in self.clients.slots() {
            if self.clients.get(client).is_some_and(|it| it.port == slot) {
                self.end(client, journal, FlowEnd::Stopped);
            }
        }
    }

    /// Processes the event of a port.
    pub(crate) fn host_ready(&mut self, turn: &mut Turn<'_>, tcp: &mut TcpFlows, slot: u32) {
        let Some(Some(port)) = self.ports.get(slot as usize) else {
            return;
        };
        if port.protocol != FlowProtocol::Tcp {
            return self.ready.push_back(slot);
        }
        let PortSocket::Active(listener) = &port.socket else {
            return;
        };
        for _ in 0..QUANTUM {
            let (socket, client) = match socket::accept(listener) {
                Ok(accepted) => accepted,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                // A new client, or one that ends, is another event.
                Err(_) => return,
            };
            let key = client_key(turn.config, client, port.guest_port, |key| tcp.has(key));
            if let Some(key) = key {
                tcp.accept_host(turn, key, socket);
            }
        }
        turn.registry.call_again(token(TokenKind::Exposed, slot));
    }

    /// Sends a datagram of the guest to the client whose flow it belongs to; returns false if it
    /// belongs to none.
    pub(crate) fn receive(
        &mut self,
        turn: &mut Turn<'_>,
        key: &FlowKey,
        frame: &dyn GuestFrame,
        (offset, len): (usize, usize),
    ) -> bool {
        if self.clients.len() == 0 {
            return false;
        }
        let Some(slot) = self.clients.find(key) else {
            return false;
        };
        let Some(client) = self.clients.get_mut(slot) else {
            return false;
        };
        let Some(Some(port)) = self.ports.get(client.port as usize) else {
            return false;
        };
        let PortSocket::Active(socket) = &port.socket else {
            return false;
        };
        self.outgoing.resize(MAX_IP_PACKET, 0);
        let payload = self.outgoing.get_mut(..len);
        let Some(payload) = payload.filter(|_| turn.rates.may_send(turn.now)) else {
            turn.stats.udp_dropped += 1;
            return true;
        };
        let sent = frame.copy_out(offset, payload)
            && sendto(&**socket, payload, SendFlags::NOSIGNAL, &client.address).is_ok();
        if sent {
            turn.stats.udp_from_guest += 1;
            turn.rates.sent(len as u64, turn.now);
            client.tally.from_guest += len as u64;
        } else {
            turn.stats.udp_dropped += 1;
        }
        client.last = turn.now;
        self.order.move_back(slot);
        true
    }

    /// Delivers datagrams of the next port that may have some; returns false if there is none.
    pub(crate) fn serve(
        &mut self,
        output: &mut Output<'_>,
        registry: &mut dyn Registry,
    ) -> Result<bool, LinkFull> {
        self.deliver_held(output)?;
        let Some(slot) = self.ready.pop_front() else {
            return Ok(false);
        };
        for _ in 0..QUANTUM {
            if !self.read(slot, output, registry) {
                return Ok(true);
            }
            if let Err(full) = self.deliver_held(output) {
                self.ready.push_back(slot);
                return Err(full);
            }
        }
        self.ready.push_back(slot);
        Ok(true)
    }

    fn deliver_held(&mut self, output: &mut Output<'_>) -> Result<(), LinkFull> {
        let Some(held) = &self.held else {
            return Ok(());
        };
        let payload = self.buffer.get(..held.len).unwrap_or_default();
        let (remote, guest) = (held.key.remote(), held.key.guest());
        output.datagram(remote, guest, payload, self.id)?;
        output.stats.udp_to_guest += 1;
        self.id = self.id.wrapping_add(1);
        self.held = None;
        Ok(())
    }

    /// Reads a datagram into the buffer; returns false if there is none.
    fn read(&mut self, slot: u32, output: &mut Output<'_>, registry: &mut dyn Registry) -> bool {
        let Some(Some(port)) = self.ports.get(slot as usize) else {
            return false;
        };
        let PortSocket::Active(socket) = &port.socket else {
            return false;
        };
        self.buffer.resize(MAX_IP_PACKET, 0);
        let buffer = self.buffer.as_mut_slice();
        let (len, client) = match recvfrom(&**socket, buffer, RecvFlags::empty()) {
            Ok((len, _, from)) => (len, from.and_then(|it| SocketAddr::try_from(it).ok())),
            // Errors of datagrams to other clients are nobody's business.
            Err(Errno::INTR | Errno::CONNREFUSED) => (0, None),
            Err(_) => return false,
        };
        let guest_port = port.guest_port;
        let Some(client) = client else { return true };
        if !output.rates.may_receive(output.now) {
            output.stats.udp_dropped += 1;
            return true;
        }
        let Some(client) = self.client(slot, client, guest_port, output, registry) else {
            return true;
        };
        if let Some(client) = self.clients.get_mut(client) {
            client.last = output.now;
            client.tally.to_guest += len as u64;
            output.rates.received(len as u64, output.now);
            self.held = Some(Held {
                key: client.key,
                len,
            });
        }
        self.order.move_back(client);
        true
    }

    /// Returns the flow of a client, which is a new one if there is none.
    fn client(
        &mut self,
        port: u32,
        address: SocketAddr,
        guest_port: u16,
        output: &mut Output<'_>,
        registry: &mut dyn Registry,
    ) -> Option<u32> {
        let is_other = |key: &FlowKey| {
            let client = self.clients.find(key).and_then(|it| self.clients.get(it));
            client.is_some_and(|it| (it.address, it.port) != (address, port))
        };
        let key = client_key(output.framer.config, address, guest_port, is_other)?;
        if let Some(slot) = self.clients.find(&key) {
            return Some(slot);
        }
        while self.clients.len() >= self.limits.udp_flows.max(1) {
            output.stats.limited += 1;
            let oldest = self.order.first()?;
            self.end(oldest, output.journal, FlowEnd::Evicted);
        }
        let slot = self.clients.insert(Client {
            key,
            port,
            address,
            last: output.now,
            tally: output.journal.begin(output.now),
        });
        self.order.push_back(slot);
        output.journal.opened_by_host(FlowProtocol::Udp, key);
        self.arm(registry);
        Some(slot)
    }

    fn end(&mut self, slot: u32, journal: &mut Journal, end: FlowEnd) {
        self.order.remove(slot);
        if let Some(client) = self.clients.remove(slot) {
            journal.ended_by_host(FlowProtocol::Udp, client.key, client.tally, end);
        }
    }

    fn arm(&mut self, registry: &mut dyn Registry) {
        let first = self.order.first().and_then(|slot| self.clients.get(slot));
        if self.timer.is_none()
            && let Some(first) = first
        {
            let at = (first.last + self.limits.udp_idle).max(registry.now() + TICK);
            self.timer = Some(registry.set_timer(at, token(TokenKind::ExposedTimer, 0)));
        }
    }

    /// Ends flows that were unused for too long.
    pub(crate) fn timer(&mut self, turn: &mut Turn<'_>) {
        self.timer = None;
        while let Some(slot) = self.order.first()
            && let Some(client) = self.clients.get(slot)
            && client.last + self.limits.udp_idle <= turn.now
        {
            self.end(slot, turn.journal, FlowEnd::TimedOut);
        }
        self.arm(turn.registry);
    }

    /// Ends all flows, and has ports wait until the engine starts again. Without a registry the
    /// event loop has ended, and closes them.
    pub(crate) fn clear(
        &mut self,
        mut registry: Option<&mut (dyn Registry + '_)>,
        journal: &mut Journal,
    ) {
        for slot in self.clients.slots() {
            self.end(slot, journal, FlowEnd::Stopped);
        }
        let mut ports = std::mem::take(&mut self.ports);
        if let (Some(registry), Some(timer)) = (registry.as_deref_mut(), self.timer.take()) {
            registry.cancel_timer(timer);
        }
        *self = Self::new(self.limits);
        let Some(registry) = registry else { return };
        for place in &mut ports {
            *place = place.take().map(|port| {
                let socket = match port.socket {
                    PortSocket::Active(socket) => PortSocket::Idle(registry.remove(socket)),
                    idle => idle,
                };
                Port { socket, ..port }
            });
        }
        self.ports = ports;
    }
}

/// Returns the key of a client's flow, as the guest sees it: one that `is_other` does not say to be
/// another client's.
fn client_key(
    config: &EngineConfig,
    client: SocketAddr,
    guest_port: u16,
    is_other: impl Fn(&FlowKey) -> bool,
) -> Option<FlowKey> {
    let address = client.ip().to_canonical();
    let seen = if is_foreign(config, address) {
        address
    } else {
        config.gateway(address)
    };
    let guest = (config.guest(address), guest_port);
    let ports = (0..ATTEMPTS).map(|attempt| client.port().wrapping_add(attempt).max(1));
    let mut keys = ports.map(|port| FlowKey::new(guest, (seen, port)));
    keys.find(|key| !is_other(key))
}

/// Returns true for addresses that packets for the guest may have: those of other hosts.
fn is_foreign(config: &EngineConfig, address: IpAddr) -> bool {
    let is_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(is_local
        || address.is_loopback()
        || address.is_unspecified()
        || address.is_multicast()
        || config.is_gateway(address)
        || config.is_guest(address))
}
