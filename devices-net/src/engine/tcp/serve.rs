//! Segments for the guest.

use std::io::{self, IoSlice};
use std::os::fd::AsFd as _;

use sm_event_loop::Registry;

use super::super::events::FlowEnd;
use super::super::link::LinkFull;
use super::super::output::{MAX_PARTS, Output, largest_segment};
use super::super::turn::Turn;
use super::TcpFlows;
use super::control::Phase;
use super::flow::TcpFlow;
use crate::wire::{TcpFlags, TcpSegment};

/// Bytes that a flow sends before others have their turn.
const QUANTUM: u32 = 128 << 10;
/// Maximum length of a read.
const MAX_READ: u32 = 64 << 10;

/// The host socket has failed.
struct HostFailed;

impl TcpFlows {
    /// Serves the next flow that may have something to send; returns false if there is none.
    pub(crate) fn serve(
        &mut self,
        output: &mut Output<'_>,
        registry: &mut dyn Registry,
    ) -> Result<bool, LinkFull> {
        let Some(slot) = self.ready.first() else {
            return Ok(false);
        };
        let more = self.visit(slot, output, registry)?;
        self.ready.remove(slot);
        if more {
            self.ready.push_back(slot);
        }
        Ok(true)
    }

    /// Returns true if the flow has more to send.
    fn visit(
        &mut self,
        slot: u32,
        output: &mut Output<'_>,
        registry: &mut dyn Registry,
    ) -> Result<bool, LinkFull> {
        let Some(flow) = self.table.get_mut(slot) else {
            return Ok(false);
        };
        if !flow.host.connected {
            return Ok(false);
        }
        if flow.host.prohibited {
            return self.reset(slot, output, registry, FlowEnd::Prohibited);
        }
        if flow.control.phase != Phase::Open {
            self.accept(slot, output, registry)?;
            return Ok(false);
        }
        let mut left = QUANTUM;
        let mut failed = false;
        while left > 0 {
            let read = self.read(slot, output);
            let sent = self.send(slot, output, registry)?;
            failed = read.is_err();
            if failed || sent == 0 {
                break;
            }
            left = left.saturating_sub(sent);
        }
        if failed {
            return self.reset(slot, output, registry, FlowEnd::ResetByPeer);
        }
        self.acknowledge(slot, output)?;
        let Some(flow) = self.table.get_mut(slot) else {
            return Ok(false);
        };
        if flow.is_over() {
            self.remove(registry, output.journal, slot, FlowEnd::Closed);
            return Ok(false);
        }
        Ok(left == 0)
    }

    /// Answers the SYN of the guest, or sends that of this side.
    fn accept(
        &mut self,
        slot: u32,
        output: &mut Output<'_>,
        registry: &mut dyn Registry,
    ) -> Result<(), LinkFull> {
        let Some(flow) = self.table.get_mut(slot) else {
            return Ok(());
        };
        let room = flow.room(&self.store, self.limits.tcp_stored);
        let control = &mut flow.control;
        if control.phase != Phase::Connecting && control.send_next != control.send_first {
            return Ok(());
        }
        let (key, mss) = (flow.key, control.mss);
        let flags = match control.phase {
            Phase::Opening => TcpFlags::SYN,
            _ => TcpFlags::SYN.and(TcpFlags::ACK),
        };
        let mut segment = TcpSegment::new(key.remote().port(), key.guest().port(), flags);
        segment.sequence = control.send_first;
        segment.acknowledgment = control.receive_next;
        segment.options = control.options(largest_segment(output.framer.config.mtu, key.is_v6()));
        segment.window = control.grant(room, true);
        output.segment(&key, &segment, mss, &[])?;
        control.sent_syn();
        flow.arm(slot, output.now, registry);
        Ok(())
    }

    /// Reads from the host socket as much as the guest has a window for.
    fn read(&mut self, slot: u32, output: &mut Output<'_>) -> Result<(), HostFailed> {
        let Some(flow) = self.table.get_mut(slot) else {
            return Ok(());
        };
        if flow.host.ended && flow.host.failed {
            return Err(HostFailed);
        }
        if !flow.host.readable || flow.host.ended {
            return Ok(());
        }
        let stored = flow.to_guest.len();
        let window = flow.control.window().saturating_sub(stored).min(MAX_READ);
        let wanted = window.min(self.store.share(&flow.to_guest, self.limits.tcp_stored));
        if wanted == 0 {
            if flow.host.failed {
                return Err(HostFailed);
            }
            // The guest has a byte to acknowledge first.
            return Ok(());
        }
        if !output.rates.may_receive(output.now) {
            self.throttled.push_back(slot);
            return Ok(());
        }
        let read = flow
            .to_guest
            .read(&mut self.store, flow.socket.as_fd(), wanted);
        if let Ok((len, _)) = &read {
            output.rates.received(u64::from(*len), output.now);
        }
        match read {
            Ok((0, _)) if flow.host.failed => return Err(HostFailed),
            Ok((0, _)) => {
                flow.host.ended = true;
                flow.host.readable = false;
            }
            // All was read, unless an end follows, which is not announced again.
            Ok((_, true)) => {
                flow.host.readable = flow.host.hangup || flow.host.urgent || flow.host.failed;
            }
            Ok((_, false)) => {}
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => flow.host.readable = false,
                io::ErrorKind::OutOfMemory => {}
                _ => return Err(HostFailed),
            },
        }
        Ok(())
    }

    /// Sends stored bytes as far as the guest's window goes; returns their number.
    fn send(
        &mut self,
        slot: u32,
        output: &mut Output<'_>,
        registry: &mut dyn Registry,
    ) -> Result<u32, LinkFull> {
        let mut total = 0;
        let Some(flow) = self.table.get_mut(slot) else {
            return Ok(0);
        };
        let (key, mss) = (flow.key, flow.control.mss);
        let largest = output.largest_payload(key.is_v6(), mss);
        while total < QUANTUM {
            let (stored, ended) = (flow.to_guest.len(), flow.ends());
            let Some(mut next) = flow.control.sendable(stored, ended, largest) else {
                break;
            };
            let mut slices = [IoSlice::new(&[]); MAX_PARTS - 1];
            let (len, count, after) =
                (flow.to_guest).slices(&self.store, flow.sent, next.len, &mut slices);
            next.end &= len == next.len;
            next.len = len;
            let mut flags = TcpFlags::ACK;
            if flow.sent != after || next.end {
                flags = flags.and(TcpFlags::PSH);
            }
            if next.end {
                flags = flags.and(TcpFlags::FIN);
            }
            let room = flow.room(&self.store, self.limits.tcp_stored);
            let mut segment = TcpSegment::new(key.remote().port(), key.guest().port(), flags);
            segment.sequence = flow.control.send_next;
            segment.acknowledgment = flow.control.receive_next;
            segment.window = flow.control.grant(room, false);
            segment.payload = len as usize;
            output.segment(&key, &segment, mss, &slices[..count])?;
            output.stats.tcp_bytes_to_guest += u64::from(len);
            flow.control.sent(next);
            flow.sent = match flow.control.send_next == flow.control.send_first {
                true => flow.to_guest.start(),
                false => after,
            };
            flow.acknowledgments = 0;
            flow.arm(slot, output.now, registry);
            total += len.max(1);
        }
        // Bytes behind a closed window are probed for.
        if flow.control.window() == 0 && !flow.to_guest.is_empty() {
            flow.arm(slot, output.now, registry);
        }
        Ok(total)
    }

    /// Sends the acknowledgments that the guest waits for, and notice of a larger window.
    fn acknowledge(&mut self, slot: u32, output: &mut Output<'_>) -> Result<(), LinkFull> {
        let Some(flow) = self.table.get_mut(slot) else {
            return Ok(());
        };
        let room = flow.room(&self.store, self.limits.tcp_stored);
        if flow.acknowledgments == 0 && flow.control.worth_granting(room) {
            flow.acknowledgments = 1;
        }
        while flow.acknowledgments > 0 || flow.ask {
            let key = flow.key;
            let mut segment =
                TcpSegment::new(key.remote().port(), key.guest().port(), TcpFlags::ACK);
            // A number that the guest has acknowledged makes it answer.
            segment.sequence = match flow.ask {
                true => flow.control.send_first.wrapping_sub(1),
                false => flow.control.sequence(),
            };
            segment.acknowledgment = flow.control.receive_next;
            segment.window = flow.control.grant(room, false);
            output.segment(&key, &segment, flow.control.mss, &[])?;
            if !std::mem::take(&mut flow.ask) {
                flow.acknowledgments -= 1;
            }
        }
        Ok(())
    }

    /// Ends a flow, and notifies the guest as soon as there is room; returns false.
    fn reset(
        &mut self,
        slot: u32,
        output: &mut Output<'_>,
        registry: &mut dyn Registry,
        end: FlowEnd,
    ) -> Result<bool, LinkFull> {
        if let Some(flow) = self.table.get(slot) {
            let head = output.framer.stray_segment(&flow.key, &reset(flow));
            output.frame(&head, &[])?;
        }
        self.remove(registry, output.journal, slot, end);
        Ok(false)
    }

    /// Ends a flow of a guest that does not answer, and notifies it unless too much else waits.
    pub(super) fn abort(&mut self, turn: &mut Turn<'_>, slot: u32) {
        if let Some(flow) = self.table.get(slot) {
            let head = turn.framer().stray_segment(&flow.key, &reset(flow));
            turn.answers.push(head);
        }
        self.remove(turn.registry, turn.journal, slot, FlowEnd::TimedOut);
    }
}

/// The segment that ends a flow.
fn reset(flow: &TcpFlow) -> TcpSegment {
    let flags = TcpFlags::RST.and(TcpFlags::ACK);
    let mut reset = TcpSegment::new(flow.key.remote().port(), flow.key.guest().port(), flags);
    reset.sequence = flow.control.send_end;
    reset.acknowledgment = flow.control.receive_next;
    reset
}
