//! Events of host sockets and timers.

use sm_event_loop::Readiness;

use super::super::egress::FlowProtocol;
use super::super::socket::take_error;
use super::super::turn::Turn;
use super::control::Phase;
use super::{TcpFlows, end_of, fail, failure};

/// Number of times that segments are sent again until the guest is taken for dead: five
/// minutes, in which it may have been paused.
const MAX_TRIES: u8 = 100;
/// Number of times that a SYN is sent again: a minute, in which a guest may start.
const MAX_OPENINGS: u8 = 22;

impl TcpFlows {
    /// Processes an event of a host socket.
    pub(crate) fn host_ready(&mut self, turn: &mut Turn<'_>, slot: u32, readiness: Readiness) {
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        if !flow.host.connected && !self.connected(turn, slot, readiness) {
            return;
        }
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        flow.host.hangup |= readiness.hangup || readiness.closed || readiness.error;
        flow.host.readable |= readiness.readable || flow.host.hangup;
        flow.host.urgent |= readiness.priority;
        flow.host.failed |= readiness.error;
        if readiness.writable && !flow.host.failed && !flow.to_host.is_empty() {
            self.flush(turn, slot);
        }
        self.ready.push_back(slot);
    }

    /// Returns true if the host socket has connected; ends the flow if it has failed to.
    fn connected(&mut self, turn: &mut Turn<'_>, slot: u32, readiness: Readiness) -> bool {
        let Some(flow) = self.table.get_mut(slot) else {
            return false;
        };
        match take_error(&flow.socket) {
            Ok(()) if readiness.writable => {
                flow.host.connected = true;
                self.connecting -= 1;
                turn.stats.tcp_connected += 1;
                if !flow.host.internal {
                    turn.opened(FlowProtocol::Tcp, &flow.key);
                }
                if flow.host.held {
                    let key = flow.key;
                    self.await_name(turn, key);
                }
                true
            }
            Ok(()) => false,
            Err(error) => {
                let key = flow.key;
                let sequence = flow.control.receive_next.wrapping_sub(1);
                turn.stats.tcp_failed += 1;
                let end = end_of(failure(error));
                self.remove(turn.registry, turn.journal, slot, end);
                fail(turn, &key, sequence, failure(error));
                false
            }
        }
    }

    /// Sends the backlog of a flow as far as its host socket and the rate allow.
    pub(super) fn flush(&mut self, turn: &mut Turn<'_>, slot: u32) {
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        let flushed = flow.flush_host(&mut self.store, (&mut *turn.rates, turn.now));
        if flushed.and_then(|_| flow.finish_host()).is_err() {
            self.host_failed(slot);
        } else {
            self.wait_for_rate(turn, slot);
        }
    }

    /// Has a flow with a backlog resumed, if it is the rate that it waits for.
    pub(super) fn wait_for_rate(&mut self, turn: &mut Turn<'_>, slot: u32) {
        let waits = self
            .table
            .get(slot)
            .is_some_and(|flow| !flow.to_host.is_empty());
        if waits && !turn.rates.may_send(turn.now) {
            self.throttled.push_back(slot);
        }
    }

    /// Serves flows again that have waited because of a rate.
    pub(crate) fn resume(&mut self, turn: &mut Turn<'_>) {
        std::mem::swap(&mut self.throttled, &mut self.resumed);
        while let Some(slot) = self.resumed.pop_front() {
            if self.table.get(slot).is_some_and(|flow| !flow.host.failed) {
                self.flush(turn, slot);
            }
            self.ready.push_back(slot);
        }
    }

    /// Processes a timer.
    pub(crate) fn timer(&mut self, turn: &mut Turn<'_>, slot: u32) {
        let Some(flow) = self.table.get_mut(slot) else {
            return;
        };
        flow.timer = None;
        let Some(deadline) = flow.deadline else {
            return;
        };
        if turn.now < deadline {
            return flow.arm_at(slot, deadline, turn.registry);
        }
        if flow.control.in_flight() == 0 && flow.is_half_closed() {
            flow.ask = true;
            self.ready.push_back(slot);
            return flow.watch(slot, turn.now, turn.registry);
        }
        flow.deadline = None;
        flow.tries = flow.tries.saturating_add(1);
        let most = match flow.control.phase {
            Phase::Opening => MAX_OPENINGS,
            _ => MAX_TRIES,
        };
        if flow.tries > most {
            return self.abort(turn, slot);
        }
        turn.stats.tcp_retransmissions += 1;
        flow.control.rewind();
        flow.sent = flow.to_guest.start();
        flow.control.probe = flow.control.phase == Phase::Open;
        self.ready.push_back(slot);
    }
}
