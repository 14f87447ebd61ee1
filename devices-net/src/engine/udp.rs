//! UDP flows: a connected host socket for each pair of ends.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::RecvFlags;
use sm_event_loop::{Interest, Readiness, Registered, Registry, SlotQueue, Timer};

use super::answers::Answers;
use super::config::EngineLimits;
use super::egress::{EgressRequest, FlowProtocol};
use super::events::FlowEnd;
use super::flow::{FlowKey, TokenKind, token};
use super::journal::{Journal, Tally};
use super::link::{GuestFrame, LinkFull};
use super::output::Output;
use super::socket::{self, Failure};
use super::table::{FlowTable, Keyed};
use super::turn::Turn;
use crate::wire::{IcmpUnreachable, IpProtocol, MAX_IP_PACKET, UdpHeader};

/// Datagrams that a flow delivers before others have their turn.
const QUANTUM: usize = 16;
/// Errors that one read reports.
const MAX_ERRORS: usize = 8;
/// Smallest time between two timers: flows may live that much longer.
const TICK: Duration = Duration::from_secs(1);

struct UdpFlow {
    key: FlowKey,
    tally: Tally,
    socket: Registered<OwnedFd>,
    readable: bool,
    /// The guest has sent several datagrams.
    settled: bool,
    /// No datagram is sent in fragments.
    dont_fragment: bool,
    last: Instant,
}

impl Keyed for UdpFlow {
    fn key(&self) -> &FlowKey {
        &self.key
    }
}

/// A datagram that the link had no room for.
struct Held {
    key: FlowKey,
    len: usize,
}

/// All UDP flows of an engine.
pub(crate) struct UdpFlows {
    table: FlowTable<UdpFlow>,
    /// Flows whose sockets may have datagrams.
    ready: SlotQueue,
    /// Flows that wait because of a rate.
    throttled: SlotQueue,
    /// Flows with one datagram of the guest, and others, those unused longest first.
    young: SlotQueue,
    settled: SlotQueue,
    limits: EngineLimits,
    timer: Option<Timer>,
    /// One datagram; empty until there is one.
    buffer: Vec<u8>,
    held: Option<Held>,
    /// Number of the next datagram that is sent in fragments.
    id: u32,
}

impl UdpFlows {
    pub(crate) fn new(limits: EngineLimits) -> Self {
        Self {
            table: FlowTable::new(),
            ready: SlotQueue::default(),
            throttled: SlotQueue::default(),
            young: SlotQueue::default(),
            settled: SlotQueue::default(),
            limits,
            timer: None,
            buffer: Vec::new(),
            held: None,
            id: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Sends a datagram of the guest, whose payload are `len` bytes from `offset` on.
    pub(crate) fn receive(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        header: &UdpHeader,
        frame: &dyn GuestFrame,
        (offset, len): (usize, usize),
        dont_fragment: bool,
    ) {
        let slot = match self.table.find(&key) {
            Some(slot) => {
                self.used(turn.now, slot, true);
                slot
            }
            None => match self.open(turn, key) {
                Ok(slot) => slot,
                Err(failure) => return reject(turn, &key, header.len.get(), failure),
            },
        };
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        if !turn.rates.may_send(turn.now) {
            turn.stats.udp_dropped += 1;
            return;
        }
        if flow.dont_fragment != dont_fragment {
            flow.dont_fragment = dont_fragment;
            socket::set_dont_fragment(&flow.socket, key.is_v6(), dont_fragment);
        }
        // The first call may return the error of an earlier datagram.
        let mut sent = frame.send(offset, len, flow.socket.as_fd());
        if sent
            .as_ref()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        {
            reject(turn, &key, header.len.get(), Failure::Refused);
            sent = frame.send(offset, len, flow.socket.as_fd());
        }
        match sent {
            Ok(_) => {
                turn.stats.udp_from_guest += 1;
                flow.tally.from_guest += len as u64;
                turn.rates.sent(len as u64, turn.now);
            }
            Err(error) => {
                turn.stats.udp_dropped += 1;
                let failure = match Errno::from_io_error(&error) {
                    Some(Errno::MSGSIZE) => {
                        let mtu = socket::path_mtu(&flow.socket, key.is_v6(), turn.config.mtu);
                        Failure::Unreachable(IcmpUnreachable::TooBig(mtu))
                    }
                    // The error comes with the next one again, or it is the socket's queue
                    // that is full.
                    Some(Errno::CONNREFUSED | Errno::AGAIN) => return,
                    _ => Failure::of_io(&error),
                };
                reject(turn, &key, header.len.get(), failure);
            }
        }
    }

    fn open(&mut self, turn: &mut Turn<'_>, key: FlowKey) -> Result<u32, Failure> {
        let request = request(&key);
        let verdict = turn.judge(&request);
        let Some(address) = verdict.address() else {
            return Err(Failure::Unreachable(IcmpUnreachable::Prohibited));
        };
        if self.table.len() >= self.limits.udp_flows {
            turn.limited("UDP flows", &key);
            let oldest = self.young.first().or_else(|| self.settled.first());
            let oldest = oldest.ok_or(Failure::Resources)?;
            self.remove(turn.registry, turn.journal, oldest, FlowEnd::Evicted);
        }
        let socket = socket::connect_datagram(address).map_err(Failure::of)?;
        let slot = self.table.next_slot();
        let interest = Interest::READ.edge_triggered();
        let socket = turn
            .registry
            .add(socket, token(TokenKind::Udp, slot), interest);
        let socket = socket.map_err(|error| Failure::of_io(&error))?;
        self.table.insert(UdpFlow {
            key,
            tally: turn.journal.begin(turn.now),
            socket,
            readable: false,
            settled: false,
            dont_fragment: false,
            last: turn.now,
        });
        self.young.push_back(slot);
        self.arm(turn.registry);
        turn.policy.flow_opened(&request);
        turn.opened(FlowProtocol::Udp, &key);
        Ok(slot)
    }

    /// Notes that a flow is used, and has had more than its first datagram.
    fn used(&mut self, now: Instant, slot: u32, settled: bool) {
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        flow.last = now;
        if settled && !flow.settled {
            flow.settled = true;
            self.young.remove(slot);
        }
        let queue = match flow.settled {
            true => &mut self.settled,
            false => &mut self.young,
        };
        queue.move_back(slot);
    }

    /// Returns the time at which the next flow ends.
    fn next_end(&self) -> Option<(Instant, u32)> {
        let end = |queue: &SlotQueue, idle: Duration| {
            let slot = queue.first()?;
            Some((self.table.get(slot)?.last + idle, slot))
        };
        let young = end(&self.young, self.limits.udp_first);
        let settled = end(&self.settled, self.limits.udp_idle);
        young.into_iter().chain(settled).min()
    }

    fn arm(&mut self, registry: &mut dyn Registry) {
        if self.timer.is_none()
            && let Some((end, _)) = self.next_end()
        {
            let at = end.max(registry.now() + TICK);
            self.timer = Some(registry.set_timer(at, token(TokenKind::UdpTimer, 0)));
        }
    }

    /// Ends flows that were unused for too long.
    pub(crate) fn timer(&mut self, turn: &mut Turn<'_>) {
        self.timer = None;
        while let Some((end, slot)) = self.next_end()
            && end <= turn.now
        {
            self.remove(turn.registry, turn.journal, slot, FlowEnd::TimedOut);
        }
        self.arm(turn.registry);
    }

    pub(crate) fn host_ready(&mut self, slot: u32, _readiness: Readiness) {
        if let Some(flow) = self.table.get_mut(slot) {
            flow.readable = true;
            self.ready.push_back(slot);
        }
    }

    /// Delivers datagrams of the next flow that may have some; returns false if there is none.
    pub(crate) fn serve(
        &mut self,
        output: &mut Output<'_>,
        answers: &mut Answers,
    ) -> Result<bool, LinkFull> {
        self.deliver_held(output)?;
        let Some(slot) = self.ready.pop_front() else {
            return Ok(false);
        };
        for _ in 0..QUANTUM {
            if !output.rates.may_receive(output.now) {
                self.throttled.push_back(slot);
                return Ok(true);
            }
            if !self.read(slot, output, answers) {
                return Ok(true);
            }
            self.used(output.now, slot, false);
            if let Err(full) = self.deliver_held(output) {
                self.ready.push_back(slot);
                return Err(full);
            }
        }
        self.ready.push_back(slot);
        Ok(true)
    }

    /// Serves flows again that have waited because of a rate.
    pub(crate) fn resume(&mut self) {
        while let Some(slot) = self.throttled.pop_front() {
            self.ready.push_back(slot);
        }
    }

    /// Delivers the datagram in the buffer.
    fn deliver_held(&mut self, output: &mut Output<'_>) -> Result<(), LinkFull> {
        let Some(held) = &self.held else {
            return Ok(());
        };
        let payload = self.buffer.get(..held.len).unwrap_or_default();
        output.datagram(held.key.remote(), held.key.guest(), payload, self.id)?;
        output.stats.udp_to_guest += 1;
        self.id = self.id.wrapping_add(1);
        self.held = None;
        Ok(())
    }

    /// Reads a datagram into the buffer; returns false if there is none.
    fn read(&mut self, slot: u32, output: &mut Output<'_>, answers: &mut Answers) -> bool {
        let Some(flow) = self.table.get_mut(slot).filter(|flow| flow.readable) else {
            return false;
        };
        self.buffer.resize(MAX_IP_PACKET, 0);
        for _ in 0..MAX_ERRORS {
            let buffer = self.buffer.as_mut_slice();
            match rustix::net::recv(&*flow.socket, buffer, RecvFlags::empty()) {
                Ok((len, _)) => {
                    let key = flow.key;
                    flow.tally.to_guest += len as u64;
                    output.rates.received(len as u64, output.now);
                    self.held = Some(Held { key, len });
                    return true;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    flow.readable = false;
                    return false;
                }
                // The error of a datagram that was sent; others may follow.
                Err(error) => {
                    let failure = match error {
                        Errno::MSGSIZE => {
                            let most = output.framer.config.mtu;
                            let mtu = socket::path_mtu(&flow.socket, flow.key.is_v6(), most);
                            Failure::Unreachable(IcmpUnreachable::TooBig(mtu))
                        }
                        error => Failure::of(error),
                    };
                    let Some(error) = unreachable(failure) else {
                        continue;
                    };
                    let (guest, remote) = (flow.key.guest().ip(), flow.key.remote().ip());
                    let transport = quote(&flow.key, 8);
                    let protocol = IpProtocol::UDP;
                    let framer = output.framer;
                    answers.push(framer.unreachable(error, guest, remote, protocol, transport));
                }
            }
        }
        flow.readable = false;
        false
    }

    /// Asks the policy about each flow again, and ends those that it prohibits now.
    pub(crate) fn judge_again(&mut self, turn: &mut Turn<'_>) {
        for slot in self.table.slots() {
            let flow = self.table.get(slot);
            if flow.is_some_and(|flow| !turn.may_continue(&request(&flow.key))) {
                self.remove(turn.registry, turn.journal, slot, FlowEnd::Prohibited);
            }
        }
    }

    fn remove(
        &mut self,
        registry: &mut dyn Registry,
        journal: &mut Journal,
        slot: u32,
        end: FlowEnd,
    ) {
        let queues = [
            &mut self.ready,
            &mut self.throttled,
            &mut self.young,
            &mut self.settled,
        ];
        for queue in queues {
            queue.remove(slot);
        }
        if let Some(flow) = self.table.remove(slot) {
            journal.ended(FlowProtocol::Udp, flow.key, flow.tally, end);
            drop(registry.remove(flow.socket));
        }
    }

    /// Removes all flows. Without a registry the event loop has ended.
    pub(crate) fn clear(
        &mut self,
        registry: Option<&mut (dyn Registry + '_)>,
        journal: &mut Journal,
    ) {
        if let Some(registry) = registry {
            for slot in self.table.slots() {
                self.remove(registry, journal, slot, FlowEnd::Stopped);
            }
            if let Some(timer) = self.timer.take() {
                registry.cancel_timer(timer);
            }
        }
        for flow in self.table.iter() {
            journal.ended(FlowProtocol::Udp, flow.key, flow.tally, FlowEnd::Stopped);
        }
        *self = Self::new(self.limits);
    }
}

/// Asks the policy about a datagram of `len` bytes that needs no flow; returns the address that it
/// is for, or notifies the guest that it is prohibited.
pub(crate) fn judge(turn: &mut Turn<'_>, key: &FlowKey, len: u16) -> Option<SocketAddr> {
    let address = turn.judge(&request(key)).address();
    if address.is_none() {
        let failure = Failure::Unreachable(IcmpUnreachable::Prohibited);
        reject(turn, key, len, failure);
    }
    address
}

/// The question to the policy about a flow.
fn request(key: &FlowKey) -> EgressRequest {
    EgressRequest {
        protocol: FlowProtocol::Udp,
        destination: key.remote(),
    }
}

/// The beginning of a datagram of the guest.
fn quote(key: &FlowKey, len: u16) -> [u8; 8] {
    let [a, b] = key.guest().port().to_be_bytes();
    let [c, d] = key.remote().port().to_be_bytes();
    let [e, f] = len.to_be_bytes();
    [a, b, c, d, e, f, 0, 0]
}

/// The error for the guest; `None` if it is not its business.
fn unreachable(failure: Failure) -> Option<IcmpUnreachable> {
    match failure {
        Failure::Refused => Some(IcmpUnreachable::Port),
        Failure::Unreachable(error) => Some(error),
        Failure::Resources => None,
    }
}

/// Answers a datagram of `len` bytes that was not sent.
fn reject(turn: &mut Turn<'_>, key: &FlowKey, len: u16, failure: Failure) {
    match unreachable(failure) {
        Some(error) => {
            let (guest, remote): (SocketAddr, SocketAddr) = (key.guest(), key.remote());
            let transport = quote(key, len);
            turn.unreachable(error, guest.ip(), remote.ip(), IpProtocol::UDP, transport);
        }
        None => turn.limited("descriptors for datagrams", key),
    }
}
