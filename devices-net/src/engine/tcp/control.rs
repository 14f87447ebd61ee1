//! The numbers of a connection with the guest (RFC 9293 3.3.1), without its bytes.

use super::super::sequence::{Acceptable, acceptable, at_most, before, distance};
use crate::wire::{SynOptions, TcpFlags, TcpSegment};

/// Bits by which windows for the guest are shifted, if the guest can (RFC 7323).
pub(crate) const SCALE: u8 = 8;
/// Acknowledgments of one number after which a segment is taken for lost (RFC 5681 3.2).
const DUPLICATES: u8 = 3;
/// Window that is enough until the next segment of the guest is acknowledged anyway.
const LOW_WINDOW: u32 = 32 << 10;
/// Maximum payload of a segment if the guest does not say (RFC 9293 3.7.1).
const DEFAULT_MSS: [u16; 2] = [536, 1220];
/// Smallest maximum that is accepted: a smaller one is more headers than content.
const MIN_MSS: u16 = 88;

/// State of the connection with the guest, apart from its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The host socket is connecting; the guest's SYN has no answer.
    Connecting,
    /// The guest has not answered the SYN of this side.
    Opening,
    /// The guest has not acknowledged the answer to its SYN.
    Accepting,
    /// The connection is established.
    Open,
}

/// Numbers of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub(crate) phase: Phase,
    /// Next number that is expected from the guest.
    pub(crate) receive_next: u32,
    /// End of the largest window that the guest was granted.
    receive_edge: u32,
    /// First number that the guest has not acknowledged.
    pub(crate) send_first: u32,
    /// Next number to send; before `send_end` while segments are sent again.
    pub(crate) send_next: u32,
    /// End of the numbers that were ever sent.
    pub(crate) send_end: u32,
    /// Window of the guest, in bytes from `send_first` on.
    window: u32,
    /// Numbers of the segment that had this window.
    window_sequence: u32,
    window_acknowledgment: u32,
    /// End of the numbers that were sent when segments were last sent again.
    recover: u32,
    /// Maximum payload of a segment for the guest.
    pub(crate) mss: u16,
    /// Bits by which the guest's windows are shifted; `None` if neither side shifts.
    scale: Option<u8>,
    duplicates: u8,
    /// The guest has sent its FIN.
    pub(crate) guest_ended: bool,
    /// One byte may be sent although the window is closed.
    pub(crate) probe: bool,
}

/// The effect of a segment on a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// The guest has reset the connection.
    pub(crate) reset: bool,
    /// The connection has become established.
    pub(crate) established: bool,
    /// The segment claims what is impossible: it is answered by a reset with this number.
    pub(crate) refused: Option<u32>,
    /// Number of bytes that are acknowledged now.
    pub(crate) acknowledged: u32,
    /// The segment acknowledges the FIN.
    pub(crate) end_acknowledged: bool,
    /// There may be more to send: the window has grown, or segments are sent again.
    pub(crate) send: bool,
    /// Segments are sent again from the first unacknowledged one on.
    pub(crate) again: bool,
    /// The segment is to be acknowledged.
    pub(crate) acknowledge: bool,
    /// Bytes before the segment are missing: it needs an acknowledgment of its own.
    pub(crate) gap: bool,
    /// The segment is a keep-alive probe.
    pub(crate) probe: bool,
    /// The part of the payload that comes next.
    pub(crate) payload: Option<Acceptable>,
    /// The segment has a FIN behind its payload.
    pub(crate) end: bool,
}

/// A segment to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sendable {
    /// Number of bytes of payload.
    pub(crate) len: u32,
    /// No bytes follow.
    pub(crate) end: bool,
}

impl Control {
    /// The answer to a SYN, whose first number will be `initial`. Segments of this side have
    /// at most `largest` bytes.
    pub(crate) fn new(syn: &TcpSegment, initial: u32, largest: u16, v6: bool) -> Self {
        let mut control = Self {
            phase: Phase::Connecting,
            // Those of the SYN, if it has them.
            mss: 0,
            scale: None,
            ..Self::opening(initial, largest)
        };
        control.begin(syn, largest, v6);
        control
    }

    /// A connection that this side opens, with a SYN whose number will be `initial`. Its segments
    /// have at most `largest` bytes.
    pub(crate) fn opening(initial: u32, largest: u16) -> Self {
        Self {
            phase: Phase::Opening,
            receive_next: 0,
            receive_edge: 0,
            send_first: initial,
            send_next: initial,
            send_end: initial,
            window: 0,
            window_sequence: 0,
            window_acknowledgment: initial,
            recover: initial,
            mss: largest,
            // It is offered.
            scale: Some(0),
            duplicates: 0,
            guest_ended: false,
            probe: false,
        }
    }

    /// Takes the answer to the SYN of this side (RFC 9293 3.10.7.3).
    fn receive_answer(&mut self, segment: &TcpSegment, effect: &mut Effect) {
        if !segment.flags.has(TcpFlags::ACK) {
            return;
        }
        if segment.acknowledgment != self.send_end {
            effect.refused = Some(segment.acknowledgment);
            return;
        }
        if !segment.flags.has(TcpFlags::SYN) {
            return;
        }
        let granted = distance(self.receive_next, self.receive_edge);
        let mss = segment.options.mss.unwrap_or(DEFAULT_MSS[0]);
        self.mss = mss.max(MIN_MSS).min(self.mss);
        self.scale = segment.options.scale;
        self.receive_next = segment.sequence.wrapping_add(1);
        self.receive_edge = self.receive_next.wrapping_add(granted);
        self.window = segment.window.into();
        self.window_sequence = segment.sequence;
        self.window_acknowledgment = segment.acknowledgment;
        self.send_first = self.send_end;
        self.send_next = self.send_end;
        self.phase = Phase::Open;
        effect.established = true;
        effect.acknowledge = true;
        effect.send = true;
    }

    /// Replaces the SYN, which has had no answer.
    pub(crate) fn begin(&mut self, syn: &TcpSegment, largest: u16, v6: bool) {
        let default = DEFAULT_MSS[usize::from(v6)];
        self.mss = syn.options.mss.unwrap_or(default).max(MIN_MSS).min(largest);
        self.scale = syn.options.scale;
        self.receive_next = syn.sequence.wrapping_add(1);
        self.receive_edge = self.receive_next;
        self.window = syn.window.into();
        self.window_sequence = syn.sequence;
    }

    /// The options of the answer to the SYN.
    pub(crate) fn options(&self, largest: u16) -> SynOptions {
        SynOptions {
            mss: Some(largest),
            scale: self.scale.map(|_| SCALE),
        }
    }

    /// Number of bytes that were sent and are not acknowledged, FIN and SYN included.
    pub(crate) fn in_flight(&self) -> u32 {
        distance(self.send_first, self.send_end)
    }

    /// Number of bytes that the guest would accept, those in flight included.
    pub(crate) fn window(&self) -> u32 {
        self.window
    }

    /// Processes a segment. `stored` bytes from `send_first` on are stored; with `ended`, a
    /// FIN follows them.
    pub(crate) fn receive(&mut self, segment: &TcpSegment, stored: u32, ended: bool) -> Effect {
        let mut effect = Effect::default();
        if segment.flags.has(TcpFlags::RST) {
            self.receive_reset(segment, &mut effect);
            return effect;
        }
        if self.phase == Phase::Connecting {
            return effect;
        }
        if self.phase == Phase::Opening {
            self.receive_answer(segment, &mut effect);
            return effect;
        }
        if segment.flags.has(TcpFlags::SYN) {
            // A repeated SYN has an old number and is acknowledged; so is another one, which
            // a guest that knows of no connection answers by a reset (RFC 5961 4.2).
            effect.again = self.phase == Phase::Accepting;
            effect.acknowledge = !effect.again;
            if effect.again {
                self.rewind();
            }
            return effect;
        }
        if !segment.flags.has(TcpFlags::ACK) {
            return effect;
        }
        if self.phase == Phase::Accepting {
            if segment.acknowledgment != self.send_end {
                effect.refused = Some(segment.acknowledgment);
                return effect;
            }
            self.phase = Phase::Open;
            effect.established = true;
            effect.send = true;
            self.send_first = self.send_end;
            self.send_next = self.send_end;
            self.window_sequence = segment.sequence.wrapping_sub(1);
        }
        self.receive_acknowledgment(segment, stored, ended, &mut effect);
        self.receive_payload(segment, &mut effect);
        effect
    }

    /// A reset must have the next number; others are answered, so that a guest that means it
    /// sends that one (RFC 5961 3.2).
    fn receive_reset(&self, segment: &TcpSegment, effect: &mut Effect) {
        if self.phase == Phase::Opening {
            // It refuses the SYN that it acknowledges.
            effect.reset = segment.flags.has(TcpFlags::ACK)
                && segment.acknowledgment == self.send_end
                && self.in_flight() > 0;
            return;
        }
        if segment.sequence == self.receive_next {
            effect.reset = true;
        } else if before(self.receive_next, segment.sequence)
            && before(segment.sequence, self.receive_edge)
        {
            effect.acknowledge = self.phase != Phase::Connecting;
        }
    }

    fn receive_acknowledgment(
        &mut self,
        segment: &TcpSegment,
        stored: u32,
        ended: bool,
        effect: &mut Effect,
    ) {
        let number = segment.acknowledgment;
        let data_end = self.send_first.wrapping_add(stored);
        if before(self.send_end, number) {
            // It acknowledges what was never sent.
            effect.acknowledge = true;
            return;
        }
        let old_window = self.window;
        if at_most(self.send_first, number) {
            self.receive_window(segment);
        }
        if before(self.send_first, number) {
            let count = distance(self.send_first, number);
            effect.acknowledged = count.min(stored);
            self.send_first = number;
            if before(self.send_next, number) {
                self.send_next = number;
            }
            self.duplicates = 0;
            effect.send = true;
        } else if number == self.send_first
            && self.in_flight() > 0
            && segment.sequence_len() == 0
            && self.window == old_window
        {
            self.duplicates = self.duplicates.saturating_add(1);
            // Once for all segments that are in flight now.
            if self.duplicates == DUPLICATES && at_most(self.recover, number) {
                self.rewind();
                effect.again = true;
                effect.send = true;
            }
        }
        effect.send |= self.window > old_window;
        effect.end_acknowledged = ended && before(data_end, number);
    }

    /// Takes over the window of a segment that is not older than the last one.
    fn receive_window(&mut self, segment: &TcpSegment) {
        let newer = before(self.window_sequence, segment.sequence)
            || (self.window_sequence == segment.sequence
                && at_most(self.window_acknowledgment, segment.acknowledgment));
        if newer {
            self.window = u32::from(segment.window) << self.scale.unwrap_or(0);
            self.window_sequence = segment.sequence;
            self.window_acknowledgment = segment.acknowledgment;
        }
    }

    fn receive_payload(&mut self, segment: &TcpSegment, effect: &mut Effect) {
        let len = u32::try_from(segment.payload).unwrap_or(0);
        let end = segment.flags.has(TcpFlags::FIN);
        if len == 0 && !end {
            if segment.sequence != self.receive_next {
                // A keep-alive probe has the number before the next one.
                effect.acknowledge = true;
                effect.probe = segment.sequence == self.receive_next.wrapping_sub(1);
            }
            return;
        }
        effect.acknowledge = true;
        if self.guest_ended {
            return;
        }
        let room = distance(self.receive_next, self.receive_edge);
        let Some(part) = acceptable(segment.sequence, len, self.receive_next, room) else {
            effect.gap = true;
            return;
        };
        effect.probe = len == 1 && !end && part.skip == 1;
        effect.payload = (part.len > 0).then_some(part);
        // A FIN without its bytes comes again.
        effect.end = end && part.skip + part.len == len && {
            let at = segment.sequence.wrapping_add(len);
            at == self.receive_next.wrapping_add(part.len)
        };
    }

    /// Notes that `count` bytes of the guest, and its FIN, were taken.
    pub(crate) fn taken(&mut self, count: u32, end: bool) {
        self.receive_next = self.receive_next.wrapping_add(count);
        if end {
            self.guest_ended = true;
            self.receive_next = self.receive_next.wrapping_add(1);
        }
        if before(self.receive_edge, self.receive_next) {
            self.receive_edge = self.receive_next;
        }
    }

    /// Continues with the first number that is not acknowledged.
    pub(crate) fn rewind(&mut self) {
        self.send_next = self.send_first;
        self.recover = self.send_end;
        self.duplicates = 0;
    }

    /// Returns the next segment, if one can be sent: `stored` bytes from `send_first` on are
    /// stored, and with `ended` no others follow. A segment has at most `largest` bytes.
    pub(crate) fn sendable(&self, stored: u32, ended: bool, largest: u32) -> Option<Sendable> {
        let done = distance(self.send_first, self.send_next);
        // The FIN was sent, and not lost.
        if self.phase != Phase::Open || done > stored {
            return None;
        }
        let waiting = stored - done;
        let mut window = self.window.saturating_sub(done);
        if self.probe && done == 0 {
            window = window.max(1);
        }
        let len = waiting.min(window).min(largest);
        let end = ended && len == waiting;
        // Small segments would follow each other for ever (RFC 1122 4.2.3.4).
        let silly = len < waiting && len < u32::from(self.mss) && done > 0;
        ((len > 0 && !silly) || end).then_some(Sendable { len, end })
    }

    /// Notes that a segment was sent.
    pub(crate) fn sent(&mut self, sendable: Sendable) {
        let next = self
            .send_next
            .wrapping_add(sendable.len + u32::from(sendable.end));
        // A probe's byte is probably discarded, and belongs to the next segment too.
        if self.window > 0 || sendable.end {
            self.send_next = next;
        }
        if before(self.send_end, next) {
            self.send_end = next;
        }
        self.probe = false;
    }

    /// Returns the number of a segment without content: the end of what was sent, unless that
    /// is behind the guest's window, where it would not be accepted.
    pub(crate) fn sequence(&self) -> u32 {
        self.send_first
            .wrapping_add(self.in_flight().min(self.window))
    }

    /// Notes that the SYN, or the answer to that of the guest, was sent.
    pub(crate) fn sent_syn(&mut self) {
        self.send_next = self.send_first.wrapping_add(1);
        self.send_end = self.send_next;
        if self.phase == Phase::Connecting {
            self.phase = Phase::Accepting;
        }
    }

    /// Returns the window field of the next segment, for a receiver with room for `room`
    /// bytes, and grants that window.
    pub(crate) fn grant(&mut self, room: u32, syn: bool) -> u16 {
        let scale = if syn {
            0
        } else {
            self.scale.map_or(0, |_| SCALE)
        };
        // A window that was granted stays valid.
        let granted = distance(self.receive_next, self.receive_edge);
        let field = u16::try_from(room.max(granted) >> scale).unwrap_or(u16::MAX);
        let edge = self.receive_next.wrapping_add(u32::from(field) << scale);
        if before(self.receive_edge, edge) {
            self.receive_edge = edge;
        }
        field
    }

    /// Returns true if the guest should be notified of room for `room` bytes: it knows
    /// of little, and there is at least twice as much, and a whole segment more.
    pub(crate) fn worth_granting(&self, room: u32) -> bool {
        let most = u32::from(u16::MAX) << self.scale.map_or(0, |_| SCALE);
        let room = room.min(most);
        let granted = distance(self.receive_next, self.receive_edge);
        self.phase == Phase::Open
            && !self.guest_ended
            && granted < LOW_WINDOW
            && room / 2 >= granted
            && room.saturating_sub(granted) >= u32::from(self.mss)
    }
}

#[cfg(test)]
#[path = "control/tests.rs"]
mod tests;
