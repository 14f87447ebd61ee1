//! Flows that have to prove a name before the host sends what the guest does.
//!
//! The guest's bytes are stored as those of a host socket that is full: they are acknowledged
//! and bounded as those. Only the copy is looked at.

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use sm_event_loop::Timer;

use super::super::flow::{FlowKey, TokenKind, token};
use super::super::turn::Turn;
use super::{TcpFlows, request};
use crate::hello::{ClientHello, MAX_HELLO, read_client_hello};

/// Time in which a flow has to prove its name.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Parts of stored bytes: a ClientHello, and a part of a chunk before and after it.
const SLICES: usize = 8;

/// Names of flows.
#[derive(Default)]
pub(super) struct FlowNames {
    proven: HashMap<u32, Box<str>>,
    /// Flows that have been connected, and the ends of their time, in their order. Some have
    /// ended meanwhile.
    waiting: VecDeque<(Instant, FlowKey)>,
    timer: Option<Timer>,
    scratch: Vec<u8>,
}

impl FlowNames {
    /// Returns the name that a flow has proven.
    pub(super) fn of(&self, slot: u32) -> Option<&str> {
        self.proven.get(&slot).map(|name| &**name)
    }

    /// Forgets the name of a flow, and returns it.
    pub(super) fn remove(&mut self, slot: u32) -> Option<Box<str>> {
        self.proven.remove(&slot)
    }

    pub(super) fn take_timer(&mut self) -> Option<Timer> {
        self.timer.take()
    }
}

impl TcpFlows {
    /// Waits for the name of a flow that has been connected.
    pub(super) fn await_name(&mut self, turn: &mut Turn<'_>, key: FlowKey) {
        let end = turn.now + TIMEOUT;
        self.names.waiting.push_back((end, key));
        // A guest that opens and resets flows faster than that does not get more memory.
        if self.names.waiting.len() > 2 * self.limits.tcp_flows.max(1)
            && let Some((_, first)) = self.names.waiting.pop_front()
        {
            self.too_late(turn, &first);
        }
        if self.names.timer.is_none() {
            let token = token(TokenKind::NameTimer, 0);
            self.names.timer = Some(turn.registry.set_timer(end, token));
        }
    }

    /// Ends the time of flows that have waited for too long.
    pub(crate) fn name_timer(&mut self, turn: &mut Turn<'_>) {
        self.names.timer = None;
        while let Some((end, key)) = self.names.waiting.front().copied() {
            if turn.now < end {
                let token = token(TokenKind::NameTimer, 0);
                self.names.timer = Some(turn.registry.set_timer(end, token));
                return;
            }
            self.names.waiting.pop_front();
            self.too_late(turn, &key);
        }
    }

    fn too_late(&mut self, turn: &mut Turn<'_>, key: &FlowKey) {
        if let Some(slot) = self.table.find(key)
            && self.table.get(slot).is_some_and(|flow| flow.host.held)
        {
            self.examine(turn, slot, true);
        }
    }

    /// Looks for the name in the stored bytes of a flow, and lets it go on or prohibits it. With
    /// `is_late`, no more bytes are waited for.
    pub(super) fn examine(&mut self, turn: &mut Turn<'_>, slot: u32, is_late: bool) {
        let Some(flow) = self.table.get(slot) else {
            return;
        };
        let mut slices = [IoSlice::new(&[]); SLICES];
        let most = u32::try_from(MAX_HELLO).unwrap_or(u32::MAX);
        let start = flow.to_host.start();
        let (_, count, _) = (flow.to_host).slices(&self.store, start, most, &mut slices);
        let mut scratch = std::mem::take(&mut self.names.scratch);
        scratch.clear();
        for slice in slices.get(..count).unwrap_or_default() {
            scratch.extend_from_slice(slice);
        }
        let is_silent = scratch.is_empty() && flow.control.guest_ended;
        let hello = read_client_hello(&scratch);
        self.names.scratch = scratch;
        if is_silent {
            // Nothing is to be sent.
            return self.let_go(turn, slot, None);
        }
        let name = match hello {
            ClientHello::Incomplete if !is_late && !flow.control.guest_ended => return,
            ClientHello::Named(name) => Some(name),
            _ => None,
        };
        let request = request(&flow.key);
        match turn.policy.may_name(&request, name.as_deref()) {
            Ok(()) => self.let_go(turn, slot, name),
            Err(reason) => {
                turn.stats.prohibited += 1;
                turn.journal.refused_name_of_flow(&request, name, reason);
                // The peer gets a reset, too.
                let _ = sockopt::set_socket_linger(&*flow.socket, Some(Duration::ZERO));
                self.prohibit(slot);
            }
        }
    }

    /// Sends what was stored, and what comes.
    fn let_go(&mut self, turn: &mut Turn<'_>, slot: u32, name: Option<String>) {
        if let Some(name) = name {
            self.names.proven.insert(slot, name.into());
        }
        if let Some(flow) = self.table.get_mut(slot) {
            flow.host.held = false;
        }
        self.flush(turn, slot);
        self.ready.push_back(slot);
    }
}
