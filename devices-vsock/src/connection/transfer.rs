//! Transfer of a connection's bytes.

use std::io::IoSlice;

use sm_virtio::GuestMemory;
use sm_virtio::iov::{self, Window};
use sm_virtio::queue::Span;

use super::{Connection, Phase};
use crate::backlog::{CHUNK, ChunkPool};
use crate::host::Moved;
use crate::packet::{END_OF_MESSAGE, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::stats::Counters;

/// Largest message in bytes; also the most that one call writes from chunks.
pub(crate) const MAX_MESSAGE: u32 = 1 << 20;
/// Maximum number of chunks in one write to a stream.
const SLICES: usize = 32;
/// Chunks of the largest message, which may start and end within one.
const MESSAGE_SLICES: usize = MAX_MESSAGE as usize / CHUNK + 1;
/// Bytes of window for each message that may wait.
const PER_MESSAGE: u32 = 16;

/// Result of filling receive buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// There are no data now.
    Nothing,
    /// This number of bytes; a message may have none.
    Data { len: u32, ends_message: bool },
    /// A message that the guest can never receive.
    Unfit,
}

impl Connection {
    /// Fills `spans`, which have room for `room` bytes, with data for the guest. `scratch`
    /// is a buffer for a message.
    pub(crate) fn fill(
        &mut self,
        memory: &GuestMemory,
        spans: &[Span],
        room: u32,
        scratch: &mut Vec<u8>,
    ) -> Filled {
        if self.phase != Phase::Established {
            return Filled::Nothing;
        }
        let filled = if self.prefix_sent < self.prefix.len() {
            self.fill_from_prefix(memory, spans, room)
        } else if !self.readable || self.read_done {
            Filled::Nothing
        } else if self.is_seqpacket() {
            self.fill_from_message(memory, spans, room, scratch)
        } else {
            self.fill_from_stream(memory, spans, room)
        };
        if let Filled::Data { len, .. } = filled {
            self.outgoing.send(len);
        }
        filled
    }

    fn fill_from_prefix(&mut self, memory: &GuestMemory, spans: &[Span], room: u32) -> Filled {
        let rest = self.prefix.get(self.prefix_sent..).unwrap_or_default();
        let now = rest.get(..room as usize).unwrap_or(rest);
        if !Window::new(spans, 0, room).copy_in(memory, now) {
            return Filled::Unfit;
        }
        // At most `room`.
        let len = u32::try_from(now.len()).unwrap_or(room);
        self.prefix_sent += now.len();
        let ends_message = self.prefix_sent >= self.prefix.len();
        if ends_message {
            self.prefix = Vec::new();
            self.prefix_sent = 0;
        }
        Filled::Data { len, ends_message }
    }

    fn fill_from_stream(&mut self, memory: &GuestMemory, spans: &[Span], room: u32) -> Filled {
        let (moved, more) = self.socket.read(memory, spans, room);
        match moved {
            Moved::Bytes(len) => {
                // The event loop reports data that arrive from now on, but not an end that
                // it has reported before.
                self.readable = more || self.hung_up;
                let ends_message = false;
                Filled::Data { len, ends_message }
            }
            Moved::Nothing => self.nothing_to_read(),
            Moved::Retry => self.read_later(),
            ended => self.end_reading(ended),
        }
    }

    /// Handles a socket without data and without an end. The event loop reports both from
    /// now on.
    fn nothing_to_read(&mut self) -> Filled {
        self.readable = false;
        self.hung_up = false;
        Filled::Nothing
    }

    fn read_later(&mut self) -> Filled {
        self.short_of_memory = true;
        self.readable = false;
        Filled::Nothing
    }

    /// Handles the end of the host's data.
    fn end_reading(&mut self, how: Moved) -> Filled {
        self.read_done = true;
        self.pending.ends |= SHUTDOWN_SEND;
        if how == Moved::Broken {
            self.pending.ends |= SHUTDOWN_RECEIVE;
        }
        self.handle_hang_up();
        Filled::Nothing
    }

    fn fill_from_message(
        &mut self,
        memory: &GuestMemory,
        spans: &[Span],
        room: u32,
        scratch: &mut Vec<u8>,
    ) -> Filled {
        let most = self.incoming_limit();
        if scratch.len() < most as usize {
            scratch.resize(most as usize, 0);
        }
        let buffer = scratch.get_mut(..most as usize).unwrap_or_default();
        let len = match self.socket.read_message(buffer) {
            Moved::Bytes(len) => len,
            Moved::Nothing => return self.nothing_to_read(),
            Moved::Retry => return self.read_later(),
            ended => return self.end_reading(ended),
        };
        if len > most.min(self.outgoing.window()) {
            return Filled::Unfit;
        }
        let message = buffer.get(..len as usize).unwrap_or_default();
        let (now, later) = message.split_at(message.len().min(room as usize));
        if !Window::new(spans, 0, room).copy_in(memory, now) {
            return Filled::Unfit;
        }
        self.prefix = later.to_vec();
        Filled::Data {
            len: len.min(room),
            ends_message: later.is_empty(),
        }
    }

    /// Returns the length of the host's largest message.
    fn incoming_limit(&self) -> u32 {
        self.incoming.window().min(MAX_MESSAGE)
    }

    /// Passes `len` bytes of the guest's data, which are in `spans`, to the host. Returns
    /// false if the guest violated the protocol, or if the host's socket can never accept
    /// them.
    #[must_use]
    pub(crate) fn take(
        &mut self,
        memory: &GuestMemory,
        pool: &mut ChunkPool,
        counters: &Counters,
        spans: &mut Vec<Span>,
        len: u32,
        flags: u32,
    ) -> bool {
        if self.guest_ends & SHUTDOWN_SEND != 0 || !self.incoming.receive(len) {
            return false;
        }
        if self.refuses {
            counters.discarded.add(u64::from(len));
            self.forwarded(len);
            return true;
        }
        if self.is_seqpacket() {
            return self.take_message(memory, pool, counters, spans, len, flags);
        }
        while self.backlog.is_empty() && !spans.is_empty() {
            match self.socket.write(memory, spans) {
                Moved::Bytes(written) => {
                    iov::advance(spans, written as usize);
                    self.forwarded(written);
                }
                Moved::Nothing => break,
                Moved::Retry => {
                    self.short_of_memory = true;
                    break;
                }
                Moved::Ended => {
                    self.refuse(pool, counters);
                    return true;
                }
                Moved::Broken => return false,
            }
        }
        let store = |span: &Span| self.backlog.push(pool, memory, span.address, span.len);
        spans.iter().all(store)
    }

    fn take_message(
        &mut self,
        memory: &GuestMemory,
        pool: &mut ChunkPool,
        counters: &Counters,
        spans: &[Span],
        len: u32,
        flags: u32,
    ) -> bool {
        let ends = flags & END_OF_MESSAGE != 0;
        let whole = ends && self.messages.partial == 0 && !self.has_backlog();
        if whole && spans.len() <= iov::MAX_SPANS {
            match self.socket.write(memory, spans) {
                Moved::Bytes(_) => {
                    self.forwarded(len);
                    return true;
                }
                Moved::Nothing => {}
                Moved::Retry => self.short_of_memory = true,
                Moved::Ended => {
                    self.refuse(pool, counters);
                    return true;
                }
                Moved::Broken => return false,
            }
        }
        for span in spans {
            if !self.backlog.push(pool, memory, span.address, span.len) {
                return false;
            }
        }
        let messages = &mut self.messages;
        messages.partial += len;
        if messages.partial > MAX_MESSAGE {
            return false;
        }
        if ends {
            let message = std::mem::take(&mut messages.partial);
            messages.lens.push_back(message);
        }
        // Messages without bytes take no credit, so credit does not limit their number.
        messages.lens.len() <= (self.incoming.window() / PER_MESSAGE) as usize
            && (whole || self.flush(pool, counters))
    }

    /// Writes stored bytes, as far as the socket accepts them. Returns false if it can
    /// never accept them.
    #[must_use]
    pub(crate) fn flush(&mut self, pool: &mut ChunkPool, counters: &Counters) -> bool {
        while self.has_backlog() {
            let moved = if self.is_seqpacket() {
                self.flush_message(pool)
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let count = self.backlog.slices(pool, u32::MAX, &mut slices);
                let slices = slices.get(..count).unwrap_or_default();
                self.socket.write_stored(slices)
            };
            match moved {
                Moved::Bytes(written) => {
                    self.backlog.consume(pool, written);
                    self.progressed = true;
                    self.forwarded(written);
                }
                Moved::Nothing => return true,
                Moved::Retry => {
                    self.short_of_memory = true;
                    return true;
                }
                Moved::Ended => self.refuse(pool, counters),
                Moved::Broken => return false,
            }
        }
        self.close_writing_if_due();
        true
    }

    fn flush_message(&mut self, pool: &ChunkPool) -> Moved {
        let len = self.messages.lens.front().copied().unwrap_or(0);
        let mut slices = [IoSlice::new(&[]); MESSAGE_SLICES];
        let count = self.backlog.slices(pool, len, &mut slices);
        let slices = slices.get(..count).unwrap_or_default();
        let moved = self.socket.write_stored(slices);
        if !matches!(moved, Moved::Nothing | Moved::Retry) {
            self.messages.lens.pop_front();
        }
        moved
    }

    /// Handles a host that accepts no more: stored and later bytes are dropped, and the
    /// guest gets a SHUTDOWN. Data of the host still arrive.
    fn refuse(&mut self, pool: &mut ChunkPool, counters: &Counters) {
        self.refuses = true;
        self.backlog.clear(pool);
        self.messages = super::Messages::default();
        let unforwarded = self.incoming.unforwarded();
        counters.discarded.add(u64::from(unforwarded));
        self.forwarded(unforwarded);
        self.pending.ends |= SHUTDOWN_RECEIVE;
        self.delivered();
    }

    /// Counts the status byte, which the device consumes instead of the socket; returns
    /// false if it exceeds the credit.
    #[must_use]
    pub(crate) fn take_status(&mut self) -> bool {
        let granted = self.incoming.receive(1);
        self.forwarded(1);
        granted
    }

    fn forwarded(&mut self, len: u32) {
        self.incoming.forward(len);
        self.pending.credit |= self.incoming.is_due();
    }
}
