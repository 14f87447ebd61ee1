//! Fills the guest's receive buffers: from the host to the guest.

use std::collections::VecDeque;

use sm_event_loop::Registry;
use sm_virtio::GuestMemory;
use sm_virtio::iov::{MAX_SPANS, Window};
use sm_virtio::queue::{DescriptorChain, Queue, QueueError, Span};

use super::{Active, BATCH, Pause, RX, Vsock};
use crate::connection::{Filled, Key};
use crate::handle::ConnectError;
use crate::muxer::Muxer;
use crate::packet::{END_OF_MESSAGE, HEADER_LEN, HOST_CID, Header, Operation};
use crate::profile::ProfileStage;

/// Maximum number of buffers that one read fills, without and with other connections that
/// wait.
const RUN_UNCONTENDED: usize = 32;
const RUN_SHARED: usize = 8;
/// Buffers filled before other handlers have their turn.
const BUDGET: usize = 256;

/// State for filling buffers that persists between turns.
#[derive(Default)]
pub(super) struct Receiver {
    /// Buffers taken from the queue, in order, for the next packets.
    stash: VecDeque<DescriptorChain>,
    /// Chains for reuse.
    spare: Vec<DescriptorChain>,
    spans: Vec<Span>,
    /// Maximum length of data in each buffer of a run.
    capacities: Vec<u32>,
    /// Buffer for one message.
    scratch: Vec<u8>,
    /// Connections whose requests wait for the end of a transport reset.
    parked: Vec<u32>,
}

impl Receiver {
    /// Clears the state after the queues and all connections are gone.
    pub(super) fn clear(&mut self) {
        self.spare.extend(self.stash.drain(..));
        self.parked.clear();
    }

    /// Returns unused buffers to their queue.
    pub(super) fn return_unused(&mut self, queue: &mut Queue) {
        for chain in self.stash.drain(..) {
            queue.undo_pop();
            self.spare.push(chain);
        }
    }

    pub(super) fn unpark(&mut self, muxer: &mut Muxer) {
        for slot in self.parked.drain(..) {
            muxer.queue(slot);
        }
    }

    /// Takes buffers until `wanted` are available, as far as the guest offers them.
    fn take(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        wanted: usize,
    ) -> Result<usize, QueueError> {
        while self.stash.len() < wanted {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(memory, &mut chain)? {
                self.spare.push(chain);
                break;
            }
            self.stash.push_back(chain);
        }
        Ok(self.stash.len())
    }

    /// Collects room for `credit` bytes of data in the first `wanted` buffers; returns its
    /// size.
    fn collect(&mut self, wanted: usize, credit: u32) -> Result<u32, QueueError> {
        self.spans.clear();
        self.capacities.clear();
        let mut offered = 0;
        for chain in self.stash.iter().take(wanted) {
            let capacity = chain.writable_len().checked_sub(HEADER_LEN);
            let Some(capacity) = capacity else {
                // An error of the guest, once this buffer is the first.
                match self.capacities.is_empty() {
                    true => return Err(QueueError::Buffer),
                    false => break,
                }
            };
            let most = capacity.min(credit - offered);
            let window = Window::new(&chain.writable, HEADER_LEN, most);
            let mut now = 0;
            for span in window.spans() {
                if self.spans.len() == MAX_SPANS {
                    break;
                }
                self.spans.push(span);
                now += span.len;
            }
            if now == 0 {
                break;
            }
            self.capacities.push(now);
            offered += now;
        }
        Ok(offered)
    }

    /// Returns the first buffer with a packet in it.
    fn send_header(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        header: &Header,
    ) -> Result<(), QueueError> {
        let Some(chain) = self.stash.pop_front() else {
            return Ok(());
        };
        let window = Window::new(&chain.writable, 0, HEADER_LEN);
        if !window.copy_in(memory, &header.encode()) {
            return Err(QueueError::Buffer);
        }
        queue.push_used(memory, chain.head(), HEADER_LEN + header.len)?;
        self.spare.push(chain);
        Ok(())
    }
}

impl Vsock {
    /// Fills receive buffers for connections in turn, until no connection needs one, no
    /// buffer is left, or the budget is used up.
    pub(super) fn receive(
        &mut self,
        active: &Active,
        registry: &mut dyn Registry,
    ) -> Result<Pause, QueueError> {
        let mut left = BUDGET;
        let mut unpublished = 0;
        while !self.muxer.resets.is_empty() || !self.muxer.ready.is_empty() {
            if left == 0 {
                return Ok(Pause::Budget);
            }
            if self.buffers(&active.memory, 1)? == 0 {
                return Ok(Pause::Buffers);
            }
            let used = self.produce(&active.memory, registry)?;
            left = left.saturating_sub(used.max(1));
            unpublished += used;
            if unpublished >= BATCH {
                // The guest can start while more is read.
                self.publish(active, RX)?;
                unpublished = 0;
            }
        }
        Ok(Pause::Idle)
    }

    fn buffers(&mut self, memory: &GuestMemory, wanted: usize) -> Result<usize, QueueError> {
        match self.queues.get_mut(RX) {
            Some(queue) => self.receiver.take(queue, memory, wanted),
            None => Ok(0),
        }
    }

    fn send_header(&mut self, memory: &GuestMemory, header: &Header) -> Result<(), QueueError> {
        match self.queues.get_mut(RX) {
            Some(queue) => self.receiver.send_header(queue, memory, header),
            None => Ok(()),
        }
    }

    /// Returns a header to the guest.
    fn header(&self, (guest_port, host_port): Key, kind: u16, op: Operation) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.config.guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            kind,
            op: op as u16,
            ..Header::default()
        }
    }

    /// Writes the next packet, or run of data packets, into the buffers taken, at least one
    /// of which must exist; returns the number of buffers used.
    fn produce(
        &mut self,
        memory: &GuestMemory,
        registry: &mut dyn Registry,
    ) -> Result<usize, QueueError> {
        if let Some(stray) = self.muxer.resets.pop_front() {
            let header = self.header(stray.key, stray.kind, Operation::Reset);
            self.send_header(memory, &header)?;
            return Ok(1);
        }
        let Some(slot) = self.muxer.ready.pop_front() else {
            return Ok(0);
        };
        let resetting = self.is_resetting();
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(0);
        };
        if connection.pending.request {
            if resetting {
                self.receiver.parked.push(slot);
                return Ok(0);
            }
            if connection.is_seqpacket() && !self.seqpacket {
                self.muxer.remove(slot, ConnectError::Unsupported, registry);
                return Ok(0);
            }
        }
        match connection.next_pending() {
            Some((op, flags)) => {
                self.produce_packet(memory, slot, op, flags)?;
                self.muxer.settle(slot, registry);
                Ok(1)
            }
            None if connection.wants_buffer() => self.produce_data(memory, slot, registry),
            None => Ok(0),
        }
    }

    /// Writes a packet without data.
    fn produce_packet(
        &mut self,
        memory: &GuestMemory,
        slot: u32,
        op: Operation,
        flags: u32,
    ) -> Result<(), QueueError> {
        let (buf_alloc, fwd_cnt) = self.muxer.announce(slot);
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(());
        };
        let (key, kind) = (connection.key, connection.socket_type());
        let header = Header {
            flags,
            buf_alloc,
            fwd_cnt,
            ..self.header(key, kind, op)
        };
        self.send_header(memory, &header)
    }

    /// Reads from a connection's socket into as many buffers at once as it is likely to
    /// fill: one system call for each of the small buffers that guests offer would cost
    /// more than the bytes.
    fn produce_data(
        &mut self,
        memory: &GuestMemory,
        slot: u32,
        registry: &mut dyn Registry,
    ) -> Result<usize, QueueError> {
        // Other waiting connections get their turn soon.
        let most = match self.muxer.ready.is_empty() {
            true => RUN_UNCONTENDED,
            false => RUN_SHARED,
        };
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(0);
        };
        let wanted = connection.run.min(most);
        let credit = connection.outgoing.available();
        self.buffers(memory, wanted)?;
        let offered = self.receiver.collect(wanted, credit)?;
        if offered == 0 {
            // A buffer with room for a header only is used for one; the connection keeps
            // its position in the queue.
            self.produce_packet(memory, slot, Operation::CreditUpdate, 0)?;
            self.muxer.ready.push_front(slot);
            return Ok(1);
        }
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(0);
        };
        let since = self.mailbox.profiler.begin();
        let Receiver { spans, scratch, .. } = &mut self.receiver;
        let filled = connection.fill(memory, spans, offered, scratch);
        self.mailbox.profiler.end(ProfileStage::SocketRead, since);
        match filled {
            Filled::Data { len, ends_message } => {
                let used = self.produce_run(memory, slot, len, ends_message)?;
                if let Some(connection) = self.muxer.get(slot) {
                    connection.run = match len == offered {
                        true => (connection.run * 2).min(RUN_UNCONTENDED),
                        // As many as recently, so that messages of a constant size arrive
                        // whole.
                        false => (used + 1).max(connection.run - 1),
                    };
                }
                self.muxer.queue(slot);
                Ok(used)
            }
            Filled::Nothing => {
                // The end of the stream may have been detected.
                self.muxer.settle(slot, registry);
                Ok(0)
            }
            Filled::Unfit => {
                tracing::warn!("a message is too large for the guest; its connection is reset");
                self.muxer.abort(slot, ConnectError::Reset, registry);
                Ok(0)
            }
        }
    }

    /// Writes the headers of `filled` bytes of data that are in the buffers already.
    fn produce_run(
        &mut self,
        memory: &GuestMemory,
        slot: u32,
        filled: u32,
        ends_message: bool,
    ) -> Result<usize, QueueError> {
        self.mailbox.counters.to_guest.add(u64::from(filled));
        let (buf_alloc, fwd_cnt) = self.muxer.announce(slot);
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(0);
        };
        if let Some(member) = &connection.member {
            member.count_to_guest(u64::from(filled));
        }
        let (key, kind) = (connection.key, connection.socket_type());
        let mut header = Header {
            buf_alloc,
            fwd_cnt,
            ..self.header(key, kind, Operation::Data)
        };
        let mut left = filled;
        let mut used = 0;
        while let Some(&capacity) = self.receiver.capacities.get(used) {
            header.len = left.min(capacity);
            left -= header.len;
            if left == 0 && ends_message && is_seqpacket_type(kind) {
                header.flags = END_OF_MESSAGE;
            }
            self.send_header(memory, &header)?;
            used += 1;
            if left == 0 {
                break;
            }
        }
        Ok(used)
    }
}

/// Returns true if packets of this type mark the ends of messages.
fn is_seqpacket_type(kind: u16) -> bool {
    kind == crate::packet::TYPE_SEQPACKET
}
