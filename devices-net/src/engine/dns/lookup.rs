//! Questions to name servers of the host.
//!
//! A question is a datagram from a socket of its own, and goes to the next server if there is no
//! answer. One whose answer is truncated is asked again over TCP.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use sm_event_loop::{Interest, Registered};

use super::super::flow::{TokenKind, token};
use super::super::socket;
use super::super::turn::Turn;
use super::{Asker, DnsProxy, ResponseCode};
use crate::dns::{answers, is_truncated};
use crate::wire::MAX_IP_PACKET;

/// Time in which all servers are asked. The C library waits for five seconds.
const TIMEOUT: Duration = Duration::from_millis(4500);
/// Questions over TCP at the same time, each of which may store 64 KiB.
const MAX_STREAMS: usize = 32;
/// Bytes that one read of a stream takes.
const READ: usize = 4096;

/// A question that waits for an answer.
pub(super) struct Lookup {
    pub(super) asker: Asker,
    pub(super) guest_id: u16,
    pub(super) name: String,
    /// With a number of this side.
    pub(super) question: Vec<u8>,
    /// The server that the guest has chosen; `None` for those of the host.
    pub(super) chosen: Option<SocketAddr>,
    pub(super) exchange: Exchange,
}

/// The exchange with one server.
pub(super) struct Exchange {
    pub(super) socket: Registered<OwnedFd>,
    server: SocketAddr,
    attempts: usize,
    pub(super) deadline: Instant,
    stream: Option<Stream>,
}

/// A question over TCP.
struct Stream {
    is_sent: bool,
    /// The length of the response in two bytes, and the response.
    received: Vec<u8>,
}

impl DnsProxy {
    /// Sends a question to the next server that can be asked after `attempts` were made.
    pub(super) fn ask(
        &self,
        turn: &mut Turn<'_>,
        slot: u32,
        question: &[u8],
        chosen: Option<SocketAddr>,
        attempts: usize,
    ) -> Option<Exchange> {
        let servers = match &chosen {
            Some(chosen) => std::slice::from_ref(chosen),
            None => self.servers.known(),
        };
        let most = servers.len().max(2);
        for attempt in attempts..most {
            let server = *servers.get(attempt % servers.len().max(1))?;
            let Ok(socket) = socket::connect_datagram(server) else {
                continue;
            };
            if rustix::net::send(&socket, question, SendFlags::NOSIGNAL).is_err() {
                continue;
            }
            let wait = TIMEOUT / u32::try_from(most).unwrap_or(1);
            let interest = Interest::READ.edge_triggered();
            let socket = turn
                .registry
                .add(socket, token(TokenKind::Dns, slot), interest);
            return Some(Exchange {
                socket: socket.ok()?,
                server,
                attempts: attempt + 1,
                deadline: turn.now + wait,
                stream: None,
            });
        }
        None
    }

    /// Asks the same server over TCP; returns false if that is not possible.
    fn ask_stream(&mut self, turn: &mut Turn<'_>, slot: u32) -> bool {
        let streams = self.lookups.iter().flatten();
        let streams = streams.filter(|lookup| lookup.exchange.stream.is_some());
        if streams.count() >= MAX_STREAMS {
            return false;
        }
        let Some(Some(lookup)) = self.lookups.get_mut(slot as usize) else {
            return false;
        };
        let Ok(socket) = socket::connect_stream(lookup.exchange.server) else {
            return false;
        };
        let interest = Interest::READ.and(Interest::WRITE).edge_triggered();
        let token = token(TokenKind::Dns, slot);
        let Ok(socket) = turn.registry.add(socket, token, interest) else {
            return false;
        };
        let old = std::mem::replace(&mut lookup.exchange.socket, socket);
        drop(turn.registry.remove(old));
        lookup.exchange.deadline = turn.now + TIMEOUT / 2;
        lookup.exchange.stream = Some(Stream {
            is_sent: false,
            received: Vec::new(),
        });
        self.arm(turn.registry);
        true
    }

    /// Asks the next server, or notifies the guest that there is none.
    pub(super) fn ask_next(&mut self, turn: &mut Turn<'_>, slot: u32) {
        let Some(mut lookup) = self.lookups.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        let attempts = lookup.exchange.attempts;
        let next = self.ask(turn, slot, &lookup.question, lookup.chosen, attempts);
        let failed = next.is_none();
        if let Some(next) = next {
            let old = std::mem::replace(&mut lookup.exchange, next);
            drop(turn.registry.remove(old.socket));
        }
        self.put(slot, lookup);
        if failed {
            self.finish(turn.registry, slot, Some(ResponseCode::ServerFailure));
        } else {
            self.arm(turn.registry);
        }
    }

    pub(crate) fn host_ready(&mut self, turn: &mut Turn<'_>, slot: u32) {
        let Some(Some(lookup)) = self.lookups.get(slot as usize) else {
            return;
        };
        match lookup.exchange.stream.is_some() {
            true => self.stream_ready(turn, slot),
            false => self.datagram_ready(turn, slot),
        }
    }

    fn datagram_ready(&mut self, turn: &mut Turn<'_>, slot: u32) {
        self.buffer.resize(MAX_IP_PACKET, 0);
        // An answer that is not one does not end the wait.
        for _ in 0..8 {
            let Some(Some(lookup)) = self.lookups.get(slot as usize) else {
                return;
            };
            let (socket, buffer) = (&*lookup.exchange.socket, self.buffer.as_mut_slice());
            let len = match rustix::net::recv(socket, buffer, RecvFlags::empty()) {
                Ok((len, _)) => len,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                // The server is not there.
                Err(_) => return self.ask_next(turn, slot),
            };
            let response = self.buffer.get(..len).unwrap_or_default();
            if answers(&lookup.question, response) {
                if is_truncated(response) && self.ask_stream(turn, slot) {
                    return;
                }
                let buffer = std::mem::take(&mut self.buffer);
                self.answered(turn, slot, buffer.get(..len).unwrap_or_default());
                self.buffer = buffer;
                return;
            }
        }
        // Others follow: the next event comes with one of them.
    }

    /// Sends the question once the stream is connected, and reads its answer.
    fn stream_ready(&mut self, turn: &mut Turn<'_>, slot: u32) {
        match self.exchange_stream(slot) {
            Ok(None) => {}
            Ok(Some(response)) => self.answered(turn, slot, &response),
            Err(_) => self.ask_next(turn, slot),
        }
    }

    /// Returns the response, if it is complete.
    fn exchange_stream(&mut self, slot: u32) -> Result<Option<Vec<u8>>, Errno> {
        let Some(Some(lookup)) = self.lookups.get_mut(slot as usize) else {
            return Ok(None);
        };
        let exchange = &mut lookup.exchange;
        let Some(stream) = &mut exchange.stream else {
            return Ok(None);
        };
        if !stream.is_sent {
            let len = u16::try_from(lookup.question.len()).map_err(|_| Errno::MSGSIZE)?;
            let len = len.to_be_bytes();
            let parts = [IoSlice::new(&len), IoSlice::new(&lookup.question)];
            match socket::send(exchange.socket.as_fd(), &parts) {
                // A new connection has room for it.
                Ok(sent) if sent == lookup.question.len() + 2 => stream.is_sent = true,
                Ok(_) => return Err(Errno::NOBUFS),
                Err(Errno::AGAIN | Errno::NOTCONN) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        loop {
            let start = stream.received.len();
            stream.received.resize(start + READ, 0);
            let room = stream.received.get_mut(start..).unwrap_or_default();
            let read = rustix::net::recv(&*exchange.socket, room, RecvFlags::empty());
            let len = read.as_ref().map_or(0, |(len, _)| *len);
            stream.received.truncate(start + len);
            match read {
                Ok((0, _)) => return Err(Errno::CONNRESET),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error),
            }
            if let Some((len, rest)) = stream.received.split_first_chunk()
                && let Some(response) = rest.get(..usize::from(u16::from_be_bytes(*len)))
            {
                return match answers(&lookup.question, response) {
                    true => Ok(Some(response.to_vec())),
                    false => Err(Errno::PROTO),
                };
            }
        }
    }
}
