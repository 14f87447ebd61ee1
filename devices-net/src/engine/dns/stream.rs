//! Questions of the guest over TCP (RFC 7766), under rules about names.
//!
//! The guest's connection is a flow as others, whose host socket is one end of a pair; the name
//! server has the other end.

use std::io::IoSlice;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown};
use sm_event_loop::{Interest, Registered, Registry};

use super::super::flow::{FlowKey, TokenKind, token};
use super::super::socket;
use super::super::turn::Turn;
use super::{Asker, DnsProxy, MAX_QUESTION};

/// Clients at the same time; the oldest ends for another one.
const MAX_CLIENTS: usize = 32;
/// Bytes that one read takes.
const READ: usize = MAX_QUESTION + 2;

/// A client over TCP.
pub(super) struct NameClient {
    key: FlowKey,
    /// Distinguishes clients that have had the same slot.
    generation: u32,
    socket: Registered<OwnedFd>,
    /// Questions, each behind its length in two bytes.
    received: Vec<u8>,
}

impl DnsProxy {
    /// Takes the other end of a connection of the guest.
    pub(crate) fn adopt(&mut self, turn: &mut Turn<'_>, key: FlowKey, socket: OwnedFd) {
        if self.clients.iter().flatten().count() >= MAX_CLIENTS {
            let oldest = (0u32..)
                .zip(&self.clients)
                .filter_map(|(slot, client)| Some((client.as_ref()?.generation, slot)))
                .min();
            if let Some((_, slot)) = oldest {
                self.close(turn.registry, slot);
            }
        }
        let free = self.clients.iter().position(Option::is_none);
        let free = free.unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        let slot = u32::try_from(free).unwrap_or(u32::MAX);
        let token = token(TokenKind::NameClient, slot);
        let interest = Interest::READ.edge_triggered();
        let Ok(socket) = turn.registry.add(socket, token, interest) else {
            return turn.limited("descriptors for connections", &key);
        };
        self.generation = self.generation.wrapping_add(1);
        if let Some(place) = self.clients.get_mut(free) {
            *place = Some(NameClient {
                key,
                generation: self.generation,
                socket,
                received: Vec::new(),
            });
        }
    }

    /// Reads questions of a client.
    pub(crate) fn client_ready(&mut self, turn: &mut Turn<'_>, slot: u32) {
        loop {
            let Some(Some(client)) = self.clients.get_mut(slot as usize) else {
                return;
            };
            let start = client.received.len();
            client.received.resize(start + READ, 0);
            let room = client.received.get_mut(start..).unwrap_or_default();
            let read = rustix::net::recv(&*client.socket, room, RecvFlags::empty());
            let len = read.as_ref().map_or(0, |(len, _)| *len);
            client.received.truncate(start + len);
            match read {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Ok((1.., _)) if self.take_questions(turn, slot) => {}
                // The guest has ended its side. Answers that are on their way are lost, as it does
                // not wait for them.
                _ => return self.close(turn.registry, slot),
            }
        }
    }

    /// Processes questions that are complete; returns false if one is too long.
    fn take_questions(&mut self, turn: &mut Turn<'_>, slot: u32) -> bool {
        while let Some(Some(client)) = self.clients.get_mut(slot as usize) {
            let Some((len, rest)) = client.received.split_first_chunk() else {
                return true;
            };
            let len = usize::from(u16::from_be_bytes(*len));
            if len > MAX_QUESTION {
                return false;
            }
            let Some(question) = rest.get(..len) else {
                return true;
            };
            let question = question.to_vec();
            client.received.drain(..len + 2);
            let asker = Asker {
                key: client.key,
                client: Some((slot, client.generation)),
            };
            turn.stats.dns_questions += 1;
            self.question(turn, asker, question, None);
        }
        true
    }

    /// Sends an answer to a client, which is disconnected if it does not read.
    pub(super) fn reply_client(&self, (slot, generation): (u32, u32), message: &[u8]) {
        let client = self.clients.get(slot as usize).and_then(Option::as_ref);
        let Some(client) = client.filter(|client| client.generation == generation) else {
            return;
        };
        let Ok(len) = u16::try_from(message.len()) else {
            return;
        };
        let len = len.to_be_bytes();
        let parts = [IoSlice::new(&len), IoSlice::new(message)];
        let sent = socket::send(client.socket.as_fd(), &parts);
        if sent != Ok(message.len() + 2) {
            // The event of its end follows.
            let _ = rustix::net::shutdown(&*client.socket, Shutdown::Both);
        }
    }

    fn close(&mut self, registry: &mut dyn Registry, slot: u32) {
        let client = self.clients.get_mut(slot as usize).and_then(Option::take);
        if let Some(client) = client {
            drop(registry.remove(client.socket));
        }
    }

    /// Disconnects all clients.
    pub(super) fn close_clients(&mut self, registry: &mut dyn Registry) {
        for slot in 0..u32::try_from(self.clients.len()).unwrap_or(0) {
            self.close(registry, slot);
        }
    }
}
