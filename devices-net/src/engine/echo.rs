//! Echo requests of ICMP, by unprivileged sockets, or raw ones if those are not allowed.
//!
//! One socket of each family serves all requests. The host's kernel replaces the identifier of
//! a request by that of the socket, so requests are distinguished by sequence numbers of this
//! side.

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto,
    socket_with,
};
use sm_event_loop::{Interest, Registered, Registry, Timer};

use super::config::EngineLimits;
use super::egress::{EgressRequest, FlowProtocol};
use super::flow::{FlowKey, TokenKind, token};
use super::link::{GuestFrame, LinkFull};
use super::output::Output;
use super::socket::Failure;
use super::turn::Turn;
use crate::wire::{IcmpEcho, IcmpUnreachable, IpProtocol, MAX_IP_PACKET};

/// Replies of the gateway that wait for room on the link.
const MAX_OWN: usize = 16;
/// Buffers that are reused.
const SPARE: usize = 4;
/// Replies of hosts that are delivered before others have their turn.
const QUANTUM: usize = 16;
/// Errors and foreign messages that one read skips.
const MAX_SKIPPED: usize = 64;

/// A socket for requests of one family.
struct EchoSocket {
    socket: Registered<OwnedFd>,
    /// It receives all ICMP messages of the host, and those of IPv4 with their header.
    raw: bool,
    readable: bool,
}

/// A request that waits for its reply.
#[derive(Clone, Copy)]
struct Request {
    key: FlowKey,
    echo: IcmpEcho,
    /// The receiver, from the host.
    address: IpAddr,
    /// Sequence number of this side.
    number: u16,
    since: Instant,
}

/// A reply of the gateway.
struct Own {
    key: FlowKey,
    echo: IcmpEcho,
    payload: Vec<u8>,
}

/// All echo requests of an engine.
pub(crate) struct Echoes {
    sockets: [Option<EchoSocket>; 2],
    /// The oldest first.
    requests: VecDeque<Request>,
    own: VecDeque<Own>,
    spare: Vec<Vec<u8>>,
    /// One message; empty until there is one.
    buffer: Vec<u8>,
    /// Identifier of requests on raw sockets.
    id: u16,
    number: u16,
    timer: Option<Timer>,
    limits: EngineLimits,
    warned: bool,
}

impl Echoes {
    pub(crate) fn new(limits: EngineLimits) -> Self {
        // Two of its bytes.
        let id = u16::try_from(RandomState::new().hash_one(0) >> 48).unwrap_or(0);
        Self {
            sockets: [None, None],
            requests: VecDeque::new(),
            own: VecDeque::new(),
            spare: Vec::new(),
            buffer: Vec::new(),
            id,
            number: 0,
            timer: None,
            limits,
            warned: false,
        }
    }

    /// Processes a request whose payload begins at `offset`. `transport` is the beginning of
    /// its header.
    pub(crate) fn receive(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        echo: IcmpEcho,
        frame: &dyn GuestFrame,
        (offset, transport): (usize, [u8; 8]),
    ) {
        if turn.config.is_gateway(key.remote().ip()) {
            return self.answer(key, echo, frame, offset);
        }
        let verdict = turn.judge(&EgressRequest {
            protocol: FlowProtocol::Echo,
            destination: key.remote(),
        });
        let sent = match verdict.address() {
            Some(address) => self.send(turn, key, echo, frame, (offset, address)),
            None => Err(Failure::Unreachable(IcmpUnreachable::Prohibited)),
        };
        let error = match sent {
            Ok(()) => return,
            Err(Failure::Unreachable(error)) => error,
            Err(Failure::Refused) => IcmpUnreachable::Host,
            Err(Failure::Resources) => return turn.limited("echo requests", &key),
        };
        let (guest, remote) = (key.guest().ip(), key.remote().ip());
        turn.unreachable(error, guest, remote, protocol(&key), transport);
    }

    /// Replies in the name of the gateway.
    fn answer(&mut self, key: FlowKey, echo: IcmpEcho, frame: &dyn GuestFrame, offset: usize) {
        if self.own.len() >= MAX_OWN {
            return;
        }
        let mut payload = self.spare.pop().unwrap_or_default();
        payload.resize(echo.payload, 0);
        if frame.copy_out(offset, &mut payload) {
            self.own.push_back(Own { key, echo, payload });
        }
    }

    fn send(
        &mut self,
        turn: &mut Turn<'_>,
        key: FlowKey,
        echo: IcmpEcho,
        frame: &dyn GuestFrame,
        (offset, address): (usize, SocketAddr),
    ) -> Result<(), Failure> {
        self.open(turn, key.is_v6())?;
        self.buffer.resize(MAX_IP_PACKET, 0);
        let len = IcmpEcho::LEN + echo.payload;
        let Self {
            sockets, buffer, ..
        } = self;
        let (Some(socket), Some(message)) =
            (&sockets[usize::from(key.is_v6())], buffer.get_mut(..len))
        else {
            return Err(Failure::Resources);
        };
        let (header, payload) = message.split_at_mut(IcmpEcho::LEN);
        if !frame.copy_out(offset, payload) {
            return Err(Failure::Resources);
        }
        let number = self.number;
        let mut own = echo;
        (own.id, own.sequence) = (self.id, number);
        header.copy_from_slice(&own.request(key.is_v6(), payload));
        let to = SocketAddr::new(address.ip(), 0);
        sendto(&*socket.socket, message, SendFlags::NOSIGNAL, &to).map_err(Failure::of)?;
        turn.stats.echoes += 1;
        turn.opened_once(FlowProtocol::Echo, &key);
        self.number = number.wrapping_add(1);
        if self.requests.len() >= self.limits.echoes.max(1) {
            self.requests.pop_front();
        }
        self.requests.push_back(Request {
            key,
            echo,
            address: address.ip(),
            number,
            since: turn.now,
        });
        if self.timer.is_none() {
            let at = turn.now + self.limits.echo_timeout;
            self.timer = Some(turn.registry.set_timer(at, token(TokenKind::EchoTimer, 0)));
        }
        Ok(())
    }

    /// Opens the socket of a family.
    fn open(&mut self, turn: &mut Turn<'_>, v6: bool) -> Result<(), Failure> {
        let index = usize::from(v6);
        if self.sockets[index].is_some() {
            return Ok(());
        }
        let (socket, raw) = match open_socket(v6, SocketType::DGRAM) {
            Ok(socket) => (socket, false),
            Err(Errno::ACCESS | Errno::PERM | Errno::PROTONOSUPPORT) => {
                let raw = open_socket(v6, SocketType::RAW).inspect_err(|_| {
                    if !std::mem::replace(&mut self.warned, true) {
                        tracing::warn!(
                            "echo requests of the guest are prohibited: \
                             net.ipv4.ping_group_range allows this process no socket for them"
                        );
                    }
                });
                (raw.map_err(Failure::of)?, true)
            }
            Err(error) => return Err(Failure::of(error)),
        };
        let slot = u32::from(v6);
        let interest = Interest::READ.edge_triggered();
        let socket = turn
            .registry
            .add(socket, token(TokenKind::Echo, slot), interest);
        self.sockets[index] = Some(EchoSocket {
            socket: socket.map_err(|error| Failure::of_io(&error))?,
            raw,
            readable: false,
        });
        Ok(())
    }

    /// Asks the policy about each request again, and forgets those that it prohibits now.
    pub(crate) fn judge_again(&mut self, turn: &mut Turn<'_>) {
        self.requests.retain(|request| {
            turn.may_continue(&EgressRequest {
                protocol: FlowProtocol::Echo,
                destination: request.key.remote(),
            })
        });
    }

    pub(crate) fn host_ready(&mut self, slot: u32) {
        if let Some(Some(socket)) = self.sockets.get_mut(slot as usize) {
            socket.readable = true;
        }
    }

    /// Forgets requests that have waited too long.
    pub(crate) fn timer(&mut self, turn: &mut Turn<'_>) {
        self.timer = None;
        while let Some(first) = self.requests.front() {
            let due = first.since + self.limits.echo_timeout;
            if turn.now < due {
                let token = token(TokenKind::EchoTimer, 0);
                self.timer = Some(turn.registry.set_timer(due, token));
                return;
            }
            self.requests.pop_front();
        }
        // A raw socket receives messages that are not for it.
        for socket in self.sockets.iter_mut().filter_map(Option::take) {
            drop(turn.registry.remove(socket.socket));
        }
    }

    /// Delivers replies; returns false if there are no more.
    pub(crate) fn serve(&mut self, output: &mut Output<'_>) -> Result<bool, LinkFull> {
        while let Some(own) = self.own.front() {
            deliver(output, &own.key, &own.echo, &own.payload)?;
            if let Some(mut own) = self.own.pop_front()
                && self.spare.len() < SPARE
            {
                own.payload.clear();
                self.spare.push(own.payload);
            }
        }
        for index in 0..self.sockets.len() {
            for _ in 0..QUANTUM {
                let Some((request, len)) = self.read(index) else {
                    break;
                };
                let Some(request) = self.requests.remove(request) else {
                    break;
                };
                let message = self.buffer.get(..len).unwrap_or_default();
                // The reply may have lost a part of its payload on the way.
                if let Some((_, payload)) = reply(request.key.is_v6(), message) {
                    // A reply without room is lost, and the guest has others.
                    deliver(output, &request.key, &request.echo, payload)?;
                }
            }
        }
        Ok(self.sockets.iter().flatten().any(|socket| socket.readable))
    }

    /// Reads a reply; returns its request and its length.
    fn read(&mut self, index: usize) -> Option<(usize, usize)> {
        let socket = self.sockets.get_mut(index)?.as_mut()?;
        if !socket.readable {
            return None;
        }
        self.buffer.resize(MAX_IP_PACKET, 0);
        for _ in 0..MAX_SKIPPED {
            let buffer = self.buffer.as_mut_slice();
            let (len, from) = match recvfrom(&*socket.socket, buffer, RecvFlags::empty()) {
                Ok((len, _, from)) => (len, from),
                Err(Errno::AGAIN) => {
                    socket.readable = false;
                    return None;
                }
                Err(_) => continue,
            };
            let from = from.and_then(|from| SocketAddr::try_from(from).ok());
            let v6 = index == 1;
            let message = self.buffer.get(..len).unwrap_or_default();
            let Some((echo, _)) = reply(v6, message) else {
                continue;
            };
            if socket.raw && echo.id != self.id {
                continue;
            }
            let request = self.requests.iter().position(|request| {
                request.number == echo.sequence
                    && request.key.is_v6() == v6
                    && from.is_some_and(|from| from.ip() == request.address)
            });
            if let Some(request) = request {
                return Some((request, len));
            }
        }
        None
    }

    /// Removes all requests. Without a registry the event loop has ended.
    pub(crate) fn clear(&mut self, registry: Option<&mut (dyn Registry + '_)>) {
        if let Some(registry) = registry {
            for socket in self.sockets.iter_mut().filter_map(Option::take) {
                drop(registry.remove(socket.socket));
            }
            if let Some(timer) = self.timer.take() {
                registry.cancel_timer(timer);
            }
        }
        *self = Self::new(self.limits);
    }
}

fn protocol(key: &FlowKey) -> IpProtocol {
    match key.is_v6() {
        true => IpProtocol::ICMPV6,
        false => IpProtocol::ICMP,
    }
}

fn open_socket(v6: bool, kind: SocketType) -> Result<OwnedFd, Errno> {
    let (family, protocol) = match v6 {
        true => (AddressFamily::INET6, ipproto::ICMPV6),
        false => (AddressFamily::INET, ipproto::ICMP),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family, kind, flags, Some(protocol))
}

/// Parses a reply. Those of raw IPv4 sockets have an IP header, which begins with the version
/// 4; an echo reply begins with a zero.
fn reply(v6: bool, message: &[u8]) -> Option<(IcmpEcho, &[u8])> {
    let message = match message.first() {
        Some(first) if !v6 && first >> 4 == 4 => message.get(usize::from(first & 15) * 4..)?,
        _ => message,
    };
    IcmpEcho::parse_reply(v6, message)
}

/// Sends a reply to the guest, as from the host that it asked.
fn deliver(
    output: &mut Output<'_>,
    key: &FlowKey,
    echo: &IcmpEcho,
    payload: &[u8],
) -> Result<(), LinkFull> {
    let (from, to) = (key.remote().ip(), key.guest().ip());
    let header = echo.reply(from, to, payload);
    let id = u32::from(echo.sequence);
    output.packet(from, to, protocol(key), &header, payload, id)
}
