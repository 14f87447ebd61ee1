//! Packets of the guest that come in fragments (RFC 791 3.2, RFC 8200 4.5).
//!
//! Overlapping fragments make a packet invalid (RFC 5722).

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Instant;

use super::config::EngineLimits;
use super::link::GuestFrame;
use crate::wire::{IpPacket, IpProtocol, MAX_IP_PACKET};

/// Maximum number of parts that are not adjacent.
const MAX_PARTS: usize = 16;
/// Buffers that are reused.
const SPARE: usize = 2;

/// Starts and ends of the parts that have come, in order, none adjacent to another.
type Parts = Vec<(usize, usize)>;

/// The name of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Name {
    source: IpAddr,
    destination: IpAddr,
    protocol: IpProtocol,
    id: u32,
}

/// A packet of which some fragments have come.
struct Partial {
    name: Name,
    since: Instant,
    bytes: Vec<u8>,
    parts: Parts,
    /// Length of the whole, if its last fragment has come.
    len: Option<usize>,
    hops: u8,
}

/// A packet of which all fragments have come.
pub(crate) struct Whole {
    /// Its header, as if it had come in one piece.
    pub(crate) packet: IpPacket,
    /// Its transport header and payload.
    pub(crate) bytes: Vec<u8>,
    parts: Parts,
}

/// Packets that are incomplete, the oldest first.
pub(crate) struct Fragments {
    partial: VecDeque<Partial>,
    limits: EngineLimits,
    /// Bytes of all partial packets.
    stored: usize,
    spare: Vec<(Vec<u8>, Parts)>,
}

impl Fragments {
    pub(crate) fn new(limits: EngineLimits) -> Self {
        Self {
            partial: VecDeque::new(),
            limits,
            stored: 0,
            spare: Vec::new(),
        }
    }

    /// Adds a fragment; returns the packet that it completes. `Err` if it was dropped.
    pub(crate) fn add(
        &mut self,
        packet: &IpPacket,
        frame: &dyn GuestFrame,
        now: Instant,
    ) -> Result<Option<Whole>, Dropped> {
        let fragment = packet.fragment.ok_or(Dropped)?;
        let name = Name {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            id: fragment.id,
        };
        let found = self.partial.iter().position(|it| it.name == name);
        let (start, end) = (
            usize::from(fragment.offset),
            usize::from(fragment.offset) + packet.len,
        );
        let fits = end <= MAX_IP_PACKET
            && packet.len > 0
            && (!fragment.more || packet.len.is_multiple_of(8));
        if !fits {
            if let Some(index) = found {
                self.drop_partial(index);
            }
            return Err(Dropped);
        }
        let index = match found {
            Some(index) => index,
            None => self.begin(name, now),
        };
        if !self.fill(index, packet, frame, (start, end), fragment.more) {
            self.drop_partial(index);
            return Err(Dropped);
        }
        Ok(self.finish(index, packet))
    }

    fn begin(&mut self, name: Name, now: Instant) -> usize {
        if self.partial.len() >= self.limits.reassembled.max(1) {
            self.drop_partial(0);
        }
        let (bytes, parts) = self.spare.pop().unwrap_or_default();
        self.partial.push_back(Partial {
            name,
            since: now,
            bytes,
            parts,
            len: None,
            hops: u8::MAX,
        });
        self.partial.len() - 1
    }

    /// Copies a fragment to its place; returns false if the packet is invalid.
    fn fill(
        &mut self,
        index: usize,
        packet: &IpPacket,
        frame: &dyn GuestFrame,
        (start, end): (usize, usize),
        more: bool,
    ) -> bool {
        let Some(partial) = self.partial.get_mut(index) else {
            return false;
        };
        let known = partial.len.unwrap_or(MAX_IP_PACKET);
        let last = partial.parts.last().map_or(0, |part| part.1);
        if end > known || (!more && (partial.len.is_some() || last > end)) {
            return false;
        }
        if !more {
            partial.len = Some(end);
        }
        if !insert(&mut partial.parts, start, end) {
            return false;
        }
        if partial.bytes.len() < end {
            let grown = end - partial.bytes.len();
            if self.stored + grown > self.limits.reassembled_bytes {
                return false;
            }
            self.stored += grown;
            partial.bytes.resize(end, 0);
        }
        partial.hops = partial.hops.min(packet.hops);
        let room = partial.bytes.get_mut(start..end);
        room.is_some_and(|room| frame.copy_out(packet.offset, room))
    }

    /// Removes a packet that is complete.
    fn finish(&mut self, index: usize, packet: &IpPacket) -> Option<Whole> {
        let partial = self.partial.get(index)?;
        if partial.parts.first().copied() != partial.len.map(|len| (0, len)) {
            return None;
        }
        let partial = self.partial.remove(index)?;
        self.stored -= partial.bytes.len();
        Some(Whole {
            packet: IpPacket {
                offset: 0,
                len: partial.bytes.len(),
                fragment: None,
                dont_fragment: false,
                hops: partial.hops,
                ..*packet
            },
            bytes: partial.bytes,
            parts: partial.parts,
        })
    }

    /// Takes back the memory of a packet.
    pub(crate) fn recycle(&mut self, whole: Whole) {
        let Whole {
            mut bytes,
            mut parts,
            ..
        } = whole;
        if self.spare.len() < SPARE {
            bytes.clear();
            parts.clear();
            self.spare.push((bytes, parts));
        }
    }

    fn drop_partial(&mut self, index: usize) {
        if let Some(mut partial) = self.partial.remove(index) {
            self.stored -= partial.bytes.len();
            if self.spare.len() < SPARE {
                partial.bytes.clear();
                partial.parts.clear();
                self.spare.push((partial.bytes, partial.parts));
            }
        }
    }

    /// Drops packets that have waited too long; returns the time of the next.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Instant> {
        while let Some(first) = self.partial.front() {
            let due = first.since + self.limits.reassembly_timeout;
            if now < due {
                return Some(due);
            }
            self.drop_partial(0);
        }
        None
    }

    pub(crate) fn clear(&mut self) {
        while !self.partial.is_empty() {
            self.drop_partial(0);
        }
    }
}

/// A fragment was dropped, and the packet to which it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dropped;

/// Adds a part to a list of ordered parts; returns false if it overlaps one, or there would
/// be too many.
fn insert(parts: &mut Parts, start: usize, end: usize) -> bool {
    let at = parts.partition_point(|part| part.0 < start);
    let before = at
        .checked_sub(1)
        .and_then(|index| parts.get(index))
        .copied();
    let after = parts.get(at).copied();
    if before.is_some_and(|part| part.1 > start) || after.is_some_and(|part| part.0 < end) {
        return false;
    }
    let joins_before = before.is_some_and(|part| part.1 == start);
    let joins_after = after.is_some_and(|part| part.0 == end);
    match (joins_before, joins_after) {
        (true, true) => {
            let removed = parts.remove(at);
            parts[at - 1].1 = removed.1;
        }
        (true, false) => parts[at - 1].1 = end,
        (false, true) => parts[at].0 = start,
        (false, false) if parts.len() < MAX_PARTS => parts.insert(at, (start, end)),
        (false, false) => return false,
    }
    true
}

#[cfg(test)]
#[path = "fragments/tests.rs"]
mod tests;
