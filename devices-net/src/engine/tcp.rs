//! TCP flows: a connection of the guest that ends here, and one of a host socket.
//!
//! A SYN of the guest has no answer until the host socket is connected, so that the guest sees
//! what a program on the host would see. The link neither loses nor reorders frames unless the
//! guest does: there is no congestion control. Bytes that the host socket does not accept are
//! stored and acknowledged; the window is the room for more.
//!
//! Architecture invariants: nothing that was acknowledged is dropped while the connection
//! exists; a host socket is read only as far as the guest has a window; one flow stores no
//! more than its share.

mod control;
mod exposed;
mod flow;
mod host;
mod names;
mod serve;

use std::hash::{BuildHasher as _, RandomState};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt;
use sm_event_loop::{Interest, Registry, SlotQueue};

use self::control::{Control, Effect, Phase};
use self::flow::TcpFlow;
use self::names::FlowNames;
use super::config::EngineLimits;
use super::egress::{EgressRequest, EgressVerdict, FlowProtocol};
use super::events::FlowEnd;
use super::flow::{FlowKey, TokenKind, token};
use super::journal::Journal;
use super::link::GuestFrame;
use super::output::largest_segment;
use super::socket::{self, Failure};
use super::store::ChunkStore;
use super::table::FlowTable;
use super::turn::Turn;
use crate::wire::{IcmpUnreachable, IpProtocol, TcpFlags, TcpSegment};

/// Acknowledgments of their own that a flow owes at most: enough for the guest to notice a
/// loss.
const MAX_ACKNOWLEDGMENTS: u8 = 3;
/// Events of a host socket. A write end is noticed once after each refusal.
const INTEREST: Interest = Interest::READ
    .and(Interest::WRITE)
    .and(Interest::PRIORITY)
    .edge_triggered();

/// All TCP flows of an engine.
pub(crate) struct TcpFlows {
    table: FlowTable<TcpFlow>,
    /// Flows that may have something to send.
    ready: SlotQueue,
    /// Flows that wait because of a rate, and those that have waited.
    throttled: SlotQueue,
    resumed: SlotQueue,
    store: ChunkStore,
    limits: EngineLimits,
    connecting: usize,
    names: FlowNames,
    /// Key and time base of initial sequence numbers (RFC 6528).
    secret: RandomState,
    epoch: Instant,
}

impl TcpFlows {
    pub(crate) fn new(limits: EngineLimits) -> Self {
        Self {
            table: FlowTable::new(),
            ready: SlotQueue::default(),
            throttled: SlotQueue::default(),
            resumed: SlotQueue::default(),
            store: ChunkStore::new(limits.stored),
            limits,
            connecting: 0,
            names: FlowNames::default(),
            secret: RandomState::new(),
            epoch: Instant::now(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Returns the key of each flow that the guest knows of, and the number of the next byte.
    pub(crate) fn known(&self) -> impl Iterator<Item = (FlowKey, u32)> {
        let known = self
            .table
            .iter()
            .filter(|flow| flow.control.phase != Phase::Connecting);
        known.map(|flow| (flow.key, flow.control.send_end))
    }

    /// Processes a segment of the guest, whose payload begins at `offset` of `frame`.
    pub(crate) fn receive(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        segment: &TcpSegment,
        frame: &dyn GuestFrame,
        offset: usize,
    ) {
        if let Some(slot) = self.table.find(&key) {
            return self.receive_known(turn, slot, segment, frame, offset);
        }
        if segment.flags.has(TcpFlags::RST) {
            return;
        }
        let flags = TcpFlags(segment.flags.0 & TcpFlags::SYN.and(TcpFlags::ACK).0);
        if flags == TcpFlags::SYN {
            return self.open(turn, key, segment);
        }
        refuse(turn, &key, segment);
    }

    fn open(&mut self, turn: &mut Turn<'_>, key: FlowKey, segment: &TcpSegment) {
        if self.table.len() >= self.limits.tcp_flows {
            return turn.limited("TCP connections", &key);
        }
        if self.connecting >= self.limits.tcp_connecting {
            return turn.limited("pending TCP connections", &key);
        }
        let request = request(&key);
        if turn.serves_names(&request) {
            if let Err(failure) = self.connect_names(turn, key, segment) {
                fail(turn, &key, segment.sequence, failure);
            }
            return;
        }
        let verdict = turn.judge(&request);
        let failure = match verdict.address() {
            None => Failure::Unreachable(IcmpUnreachable::Prohibited),
            Some(address) => {
                turn.policy.flow_opened(&request);
                match self.connect(turn, key, segment, address) {
                    Ok(slot) => {
                        if let Some(flow) = self.table.get_mut(slot) {
                            flow.host.held = verdict == EgressVerdict::ConnectNamed(address);
                        }
                        return;
                    }
                    Err(failure) => {
                        turn.stats.tcp_failed += 1;
                        let tally = turn.journal.begin(turn.now);
                        (turn.journal).ended(FlowProtocol::Tcp, key, tally, end_of(failure));
                        failure
                    }
                }
            }
        };
        fail(turn, &key, segment.sequence, failure);
    }

    fn connect(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        segment: &TcpSegment,
        address: SocketAddr,
    ) -> Result<u32, Failure> {
        let socket = socket::connect_stream(address).map_err(Failure::of)?;
        self.insert(turn, key, segment, socket)
    }

    /// Connects to the engine's own name server.
    fn connect_names(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        segment: &TcpSegment,
    ) -> Result<(), Failure> {
        let (near, far) = socket::pair().map_err(Failure::of)?;
        let slot = self.insert(turn, key, segment, near)?;
        if let Some(flow) = self.table.get_mut(slot) {
            flow.host.internal = true;
        }
        turn.name_clients.push((key, far));
        Ok(())
    }

    /// Inserts a flow whose host socket is connecting.
    fn insert(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        segment: &TcpSegment,
        socket: OwnedFd,
    ) -> Result<u32, Failure> {
        let token = token(TokenKind::Tcp, self.table.next_slot());
        let socket = turn.registry.add(socket, token, INTEREST);
        let socket = socket.map_err(|error| Failure::of_io(&error))?;
        let largest = largest_segment(turn.config.mtu, key.is_v6());
        let to_guest = self.store.reserve().ok_or(Failure::Resources)?;
        let initial = self.initial_number(&key, turn.now);
        let tally = turn.journal.begin(turn.now);
        let control = Control::new(segment, initial, largest, key.is_v6());
        let flow = TcpFlow::new(key, socket, control, to_guest, tally);
        self.connecting += 1;
        Ok(self.table.insert(flow))
    }

    /// An unpredictable number that grows by one every 4 us (RFC 9293 3.4.1).
    fn initial_number(&self, key: &FlowKey, now: Instant) -> u32 {
        let ticks = now.saturating_duration_since(self.epoch).as_micros() / 4;
        let number = u128::from(self.secret.hash_one(key)).wrapping_add(ticks);
        // The lower half of the sum's lower half.
        u32::try_from(number & u128::from(u32::MAX)).unwrap_or(0)
    }

    fn receive_known(
        &mut self,
        turn: &mut Turn<'_>,
        slot: u32,
        segment: &TcpSegment,
        frame: &dyn GuestFrame,
        offset: usize,
    ) {
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        if flow.control.phase == Phase::Connecting
            && segment.flags.has(TcpFlags::SYN)
            && segment.sequence.wrapping_add(1) != flow.control.receive_next
        {
            // The guest has cancelled the first attempt, and starts another.
            let v6 = flow.key.is_v6();
            let largest = largest_segment(turn.config.mtu, v6);
            return flow.control.begin(segment, largest, v6);
        }
        let (stored, ended) = (flow.to_guest.len(), flow.ends());
        let effect = flow.control.receive(segment, stored, ended);
        if effect.reset {
            // The peer gets a reset, too.
            let _ = sockopt::set_socket_linger(&*flow.socket, Some(Duration::ZERO));
            let end = match flow.control.phase {
                Phase::Opening => FlowEnd::Refused,
                _ => FlowEnd::ResetByGuest,
            };
            return self.remove(turn.registry, turn.journal, slot, end);
        }
        if effect.refused.is_some() {
            return refuse(turn, &flow.key, segment);
        }
        self.acknowledged(slot, &effect, turn);
        self.take(turn, slot, &effect, frame, offset);
        if effect.probe
            && let Some(flow) = self.table.get_mut(slot)
            && !flow.host.keepalive
        {
            // Probes of the guest end here: the peer has to be probed from here.
            flow.host.keepalive = true;
            let _ = sockopt::set_socket_keepalive(&*flow.socket, true);
        }
    }

    /// Applies the acknowledgment of a segment.
    fn acknowledged(&mut self, slot: u32, effect: &Effect, turn: &mut Turn<'_>) {
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        flow.to_guest.consume(&mut self.store, effect.acknowledged);
        flow.tally.to_guest += u64::from(effect.acknowledged);
        flow.end_acknowledged |= effect.end_acknowledged;
        if effect.established || effect.acknowledged > 0 || effect.end_acknowledged {
            flow.tries = 0;
            flow.deadline = None;
        }
        if flow.control.send_next == flow.control.send_first {
            flow.sent = flow.to_guest.start();
        }
        let closed = flow.control.window() == 0 && !flow.to_guest.is_empty();
        if closed {
            // The guest is alive.
            flow.tries = flow.tries.min(4);
        }
        if flow.control.in_flight() > 0 || closed {
            flow.arm(slot, turn.now, turn.registry);
        } else if flow.is_half_closed() {
            flow.watch(slot, turn.now, turn.registry);
        } else {
            flow.deadline = None;
        }
        if effect.again {
            turn.stats.tcp_retransmissions += 1;
        }
        if effect.acknowledge {
            let most = if effect.gap { MAX_ACKNOWLEDGMENTS } else { 1 };
            flow.acknowledgments = (flow.acknowledgments + 1).min(most.max(flow.acknowledgments));
        }
        if effect.gap {
            turn.stats.tcp_gaps += 1;
        }
        if effect.send || effect.again || effect.acknowledge || flow.is_over() {
            self.ready.push_back(slot);
        }
    }

    /// Passes the payload and the end of a segment to the host socket.
    fn take(
        &mut self,
        turn: &mut Turn<'_>,
        slot: u32,
        effect: &Effect,
        frame: &dyn GuestFrame,
        offset: usize,
    ) {
        if effect.payload.is_none() && !effect.end {
            return;
        }
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        let (mut taken, mut wanted) = (0, 0);
        if let Some(part) = effect.payload {
            wanted = part.len;
            let offset = offset + part.skip as usize;
            let rates = (&mut *turn.rates, turn.now);
            taken = flow.send_host(&mut self.store, rates, frame, (offset, part.len));
        }
        flow.control.taken(taken, effect.end && taken == wanted);
        flow.tally.from_guest += u64::from(taken);
        if flow.host.failed || flow.finish_host().is_err() {
            self.host_failed(slot);
        } else if flow.is_half_closed() && flow.control.in_flight() == 0 {
            flow.watch(slot, turn.now, turn.registry);
        }
        turn.stats.tcp_bytes_from_guest += u64::from(taken);
        self.wait_for_rate(turn, slot);
        if self.table.get(slot).is_some_and(|flow| flow.host.held) {
            self.examine(turn, slot, false);
        }
    }

    /// Ends a flow whose host socket has failed, as soon as what it has received is read.
    fn host_failed(&mut self, slot: u32) {
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        flow.host.failed = true;
        flow.host.readable = true;
        flow.to_host.clear(&mut self.store);
        self.ready.push_back(slot);
    }

    /// Asks the policy about each flow again, and ends those that it prohibits now.
    pub(crate) fn judge_again(&mut self, turn: &mut Turn<'_>) {
        for slot in self.table.slots() {
            let Some(flow) = self.table.get_mut(slot) else {
                continue;
            };
            if flow.host.from_host || flow.host.internal {
                continue;
            }
            let request = request(&flow.key);
            let name = self.names.of(slot);
            if turn.may_continue(&request)
                && (flow.host.held || turn.policy.may_name(&request, name).is_ok())
            {
                continue;
            }
            // The peer gets a reset, too.
            let _ = sockopt::set_socket_linger(&*flow.socket, Some(Duration::ZERO));
            if flow.control.phase == Phase::Connecting {
                // The guest repeats its SYN, and that is prohibited.
                self.remove(turn.registry, turn.journal, slot, FlowEnd::Prohibited);
            } else {
                self.prohibit(slot);
            }
        }
    }

    /// Has a flow end by resets in both directions.
    fn prohibit(&mut self, slot: u32) {
        if let Some(flow) = self.table.get_mut(slot) {
            flow.host.prohibited = true;
            flow.host.failed = true;
            flow.to_host.clear(&mut self.store);
            self.ready.push_back(slot);
        }
    }

    /// Removes a flow without a word to the guest.
    fn remove(
        &mut self,
        registry: &mut dyn Registry,
        journal: &mut Journal,
        slot: u32,
        end: FlowEnd,
    ) {
        for queue in [&mut self.ready, &mut self.throttled, &mut self.resumed] {
            queue.remove(slot);
        }
        let Some(flow) = self.table.remove(slot) else {
            return;
        };
        let name = self.names.remove(slot);
        match (flow.host.from_host, flow.host.internal) {
            (true, _) => journal.ended_by_host(FlowProtocol::Tcp, flow.key, flow.tally, end),
            // The policy does not know it.
            (_, true) => {}
            _ => journal.ended_named(flow.key, flow.tally, end, name),
        }
        if flow.control.phase == Phase::Connecting && !flow.host.connected {
            self.connecting -= 1;
        }
        if let Some(timer) = flow.timer {
            registry.cancel_timer(timer);
        }
        drop(registry.remove(flow.socket));
        self.store.remove(flow.to_guest);
        self.store.remove(flow.to_host);
    }

    /// Removes all flows. Without a registry the event loop has ended.
    pub(crate) fn clear(
        &mut self,
        mut registry: Option<&mut (dyn Registry + '_)>,
        journal: &mut Journal,
    ) {
        for slot in self.table.slots() {
            match registry.as_deref_mut() {
                Some(registry) => self.remove(registry, journal, slot, FlowEnd::Stopped),
                None => {
                    if let Some(flow) = self.table.remove(slot) {
                        journal.ended(FlowProtocol::Tcp, flow.key, flow.tally, FlowEnd::Stopped);
                    }
                }
            }
        }
        if let (Some(registry), Some(timer)) = (registry.as_deref_mut(), self.names.take_timer()) {
            registry.cancel_timer(timer);
        }
        self.names = FlowNames::default();
        if registry.is_none() {
            *self = Self::new(self.limits);
        }
    }
}

/// The question to the policy about a flow.
fn request(key: &FlowKey) -> EgressRequest {
    EgressRequest {
        protocol: FlowProtocol::Tcp,
        destination: key.remote(),
    }
}

/// Answers a segment that belongs to no connection (RFC 9293 3.10.7.1).
fn refuse(turn: &mut Turn<'_>, key: &FlowKey, segment: &TcpSegment) {
    let mut reset = TcpSegment::new(key.remote().port(), key.guest().port(), TcpFlags::RST);
    if segment.flags.has(TcpFlags::ACK) {
        reset.sequence = segment.acknowledgment;
    } else {
        reset.flags = TcpFlags::RST.and(TcpFlags::ACK);
        reset.acknowledgment = segment.sequence.wrapping_add(segment.sequence_len());
    }
    let head = turn.framer().stray_segment(key, &reset);
    turn.answers.push(head);
}

/// Notifies the guest that the connection of its SYN with number `sequence` has failed.
fn fail(turn: &mut Turn<'_>, key: &FlowKey, sequence: u32, failure: Failure) {
    match failure {
        Failure::Refused => {
            let mut syn = TcpSegment::new(key.guest().port(), key.remote().port(), TcpFlags::SYN);
            syn.sequence = sequence;
            refuse(turn, key, &syn);
        }
        Failure::Unreachable(error) => {
            let [a, b] = key.guest().port().to_be_bytes();
            let [c, d] = key.remote().port().to_be_bytes();
            let [e, f, g, h] = sequence.to_be_bytes();
            let transport = [a, b, c, d, e, f, g, h];
            let (guest, remote) = (key.guest().ip(), key.remote().ip());
            turn.unreachable(error, guest, remote, IpProtocol::TCP, transport);
        }
        // The guest repeats its SYN.
        Failure::Resources => turn.limited("descriptors for connections", key),
    }
}

/// The end of a flow that could not connect.
fn end_of(failure: Failure) -> FlowEnd {
    match failure {
        Failure::Refused => FlowEnd::Refused,
        Failure::Unreachable(_) => FlowEnd::Unreachable,
        Failure::Resources => FlowEnd::Evicted,
    }
}

/// The error of a socket that is not connected, as a failure.
fn failure(error: Errno) -> Failure {
    Failure::of(error)
}
