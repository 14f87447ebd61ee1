//! Handles the guest's packets: from the guest to the host.

use sm_event_loop::Registry;
use sm_virtio::GuestMemory;
use sm_virtio::iov::{MAX_SPANS, Window};
use sm_virtio::queue::{DescriptorChain, QueueError, Span};

use super::{Active, BATCH, Pause, TX, Vsock};
use crate::connection::Phase;
use crate::handle::ConnectError;
use crate::packet::{HEADER_LEN, HOST_CID, Header, Operation, TYPE_SEQPACKET, TYPE_STREAM};
use crate::profile::ProfileStage;

/// Maximum number of bytes of one connection that are written together.
const GATHERED: u32 = 64 << 10;
/// Packets and bytes of the guest that are handled before other handlers have their turn.
const BUDGET: usize = 128;
const BYTES: u32 = 256 << 10;

/// Packets of one stream that are written together.
#[derive(Default)]
pub(super) struct Gathered {
    slot: u32,
    len: u32,
    spans: Vec<Span>,
    /// Their chains, which belong to the device until then.
    heads: Vec<u16>,
}

impl Gathered {
    /// Clears the state after the queue is gone.
    pub(super) fn clear(&mut self) {
        self.len = 0;
        self.spans.clear();
        self.heads.clear();
    }
}

impl Vsock {
    /// Handles the guest's packets until none is left, resets have no room, or the budget
    /// is used up.
    pub(super) fn transmit(
        &mut self,
        active: &Active,
        registry: &mut dyn Registry,
    ) -> Result<Pause, QueueError> {
        // Saturating: with overlapping buffers, one packet can have 4 GiB.
        let mut bytes = 0u32;
        let mut chain = std::mem::take(&mut self.chain);
        let mut pause = Ok(Pause::Budget);
        for count in 1..=BUDGET {
            if !self.muxer.has_room() {
                // Continues when the guest has received some resets.
                pause = Ok(Pause::Buffers);
                break;
            }
            match self.next_chain(active, &mut chain, registry) {
                Ok(true) => {}
                Ok(false) => {
                    pause = Ok(Pause::Idle);
                    break;
                }
                Err(error) => {
                    pause = Err(error);
                    break;
                }
            }
            let len = self.handle_chain(&active.memory, &chain, registry)?;
            bytes = bytes.saturating_add(len);
            if count % BATCH == 0 {
                // The guest can reuse its buffers while the others are handled.
                self.publish(active, TX)?;
            }
            if bytes >= BYTES {
                break;
            }
        }
        self.chain = chain;
        // Packets before a malformed chain are valid.
        self.write_gathered(&active.memory, registry)?;
        pause
    }

    /// Takes the guest's next packet. Writes the gathered packets before the device
    /// requests a notification of further ones.
    fn next_chain(
        &mut self,
        active: &Active,
        chain: &mut DescriptorChain,
        registry: &mut dyn Registry,
    ) -> Result<bool, QueueError> {
        let Some(queue) = self.queues.get_mut(TX) else {
            return Ok(false);
        };
        if !self.gathered.heads.is_empty() && queue.pending(&active.memory)? == 0 {
            self.write_gathered(&active.memory, registry)?;
            self.publish(active, TX)?;
        }
        match self.queues.get_mut(TX) {
            Some(queue) => queue.pop(&active.memory, chain),
            None => Ok(false),
        }
    }

    /// Returns a packet's buffers to the guest.
    fn used(&mut self, memory: &GuestMemory, head: u16) -> Result<(), QueueError> {
        match self.queues.get_mut(TX) {
            Some(queue) => queue.push_used(memory, head, 0),
            None => Ok(()),
        }
    }

    /// Handles one packet; returns the length of its data.
    fn handle_chain(
        &mut self,
        memory: &GuestMemory,
        chain: &DescriptorChain,
        registry: &mut dyn Registry,
    ) -> Result<u32, QueueError> {
        let mut bytes = [0; HEADER_LEN as usize];
        let head = Window::new(&chain.readable, 0, HEADER_LEN);
        let header = head
            .copy_out(memory, &mut bytes)
            .then(|| Header::decode(&bytes));
        if let Some(header) = &header
            && self.gather(memory, chain, header, registry)?
        {
            return Ok(header.len);
        }
        // In the order of their arrival.
        self.write_gathered(memory, registry)?;
        match &header {
            Some(header) => self.handle_packet(memory, chain, header, registry),
            None => self.count_malformed(),
        }
        self.used(memory, chain.head())?;
        Ok(header.map_or(0, |header| header.len.min(chain.readable_len())))
    }

    /// Gathers data of a stream, to be written together with the following data; a system
    /// call for each of many small packets would cost more than their bytes. Returns false
    /// for all other packets.
    fn gather(
        &mut self,
        memory: &GuestMemory,
        chain: &DescriptorChain,
        header: &Header,
        registry: &mut dyn Registry,
    ) -> Result<bool, QueueError> {
        let data = Window::new(&chain.readable, HEADER_LEN, header.len);
        let plain = header.operation() == Some(Operation::Data)
            && self.is_sound(header)
            && header.kind == TYPE_STREAM
            && !data.is_empty()
            && data.len() == header.len
            && chain.readable.len() <= MAX_SPANS;
        let slot = self.muxer.find((header.src_port, header.dst_port));
        let Some(slot) = slot.filter(|_| plain) else {
            return Ok(false);
        };
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(false);
        };
        if connection.phase != Phase::Established
            || connection.status_reply
            || connection.socket_type() != TYPE_STREAM
        {
            return Ok(false);
        }
        let gathered = &self.gathered;
        if gathered.slot != slot
            || gathered.len.saturating_add(header.len) > GATHERED
            || gathered.spans.len() + chain.readable.len() > MAX_SPANS
        {
            self.write_gathered(memory, registry)?;
        }
        // Writing may have ended the connection.
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(false);
        };
        connection.outgoing.update(header.buf_alloc, header.fwd_cnt);
        let gathered = &mut self.gathered;
        gathered.slot = slot;
        gathered.len += header.len;
        gathered.spans.extend(data.spans());
        gathered.heads.push(chain.head());
        Ok(true)
    }

    /// Writes the gathered data.
    fn write_gathered(
        &mut self,
        memory: &GuestMemory,
        registry: &mut dyn Registry,
    ) -> Result<(), QueueError> {
        if self.gathered.heads.is_empty() {
            return Ok(());
        }
        let len = std::mem::take(&mut self.gathered.len);
        let mut spans = std::mem::take(&mut self.gathered.spans);
        self.pass_on(memory, self.gathered.slot, &mut spans, len, 0, registry);
        spans.clear();
        self.gathered.spans = spans;
        let mut heads = std::mem::take(&mut self.gathered.heads);
        for &head in &heads {
            self.used(memory, head)?;
        }
        heads.clear();
        self.gathered.heads = heads;
        Ok(())
    }

    /// Returns true if addresses and type of a packet are valid.
    fn is_sound(&self, header: &Header) -> bool {
        header.src_cid == self.config.guest_cid
            && header.dst_cid == HOST_CID
            && (header.kind == TYPE_STREAM || self.seqpacket && header.kind == TYPE_SEQPACKET)
    }

    fn handle_packet(
        &mut self,
        memory: &GuestMemory,
        chain: &DescriptorChain,
        header: &Header,
        registry: &mut dyn Registry,
    ) {
        let key = (header.src_port, header.dst_port);
        let available = chain.readable_len().saturating_sub(HEADER_LEN);
        let sound = self.is_sound(header) && header.len <= available;
        let slot = self.muxer.find(key);
        let of_its_kind = slot
            .and_then(|slot| self.muxer.get(slot))
            .is_none_or(|connection| connection.socket_type() == header.kind);
        let Some(op) = header.operation().filter(|_| sound && of_its_kind) else {
            self.malformed(slot, header, registry);
            return;
        };
        match (slot, op) {
            (None, Operation::Request) => {
                // Commands that host code sent before the guest's packet take effect first:
                // the request finds a listener that exists already.
                self.take_commands(registry);
                self.muxer.accept(header, registry);
            }
            (None, Operation::Reset) => {}
            (None, _) => self.muxer.reset_stray(key, header.kind),
            (Some(slot), op) => {
                if let Some(connection) = self.muxer.get(slot) {
                    connection.outgoing.update(header.buf_alloc, header.fwd_cnt);
                }
                self.handle_known(memory, chain, slot, op, header, registry);
            }
        }
    }

    fn count_malformed(&self) {
        let counters = &self.mailbox.counters;
        if counters.malformed.is_first() {
            tracing::warn!("the guest sends invalid packets; they are counted");
        }
        counters.malformed.add(1);
    }

    fn malformed(&mut self, slot: Option<u32>, header: &Header, registry: &mut dyn Registry) {
        self.count_malformed();
        match slot {
            Some(slot) => self.muxer.abort(slot, ConnectError::Reset, registry),
            // A reset is not answered by a reset.
            None if header.operation() == Some(Operation::Reset) => {}
            None => self
                .muxer
                .reset_stray((header.src_port, header.dst_port), header.kind),
        }
    }

    fn handle_known(
        &mut self,
        memory: &GuestMemory,
        chain: &DescriptorChain,
        slot: u32,
        op: Operation,
        header: &Header,
        registry: &mut dyn Registry,
    ) {
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        match (op, connection.phase) {
            (Operation::Reset, _) => {
                self.muxer
                    .guest_resets(slot, ConnectError::Refused, registry);
            }
            (Operation::Response, Phase::Requested) if !connection.pending.request => {
                connection.phase = Phase::Established;
                self.mailbox
                    .profiler
                    .end(ProfileStage::Open, connection.requested_at.take());
                if !connection.status_reply {
                    connection.report(Ok(()));
                }
                self.muxer.settle(slot, registry);
            }
            (Operation::Data, Phase::Established) => {
                self.data_from_guest(memory, chain, slot, header, registry);
            }
            (Operation::Shutdown, Phase::Established) => {
                connection.guest_shuts_down(header.flags);
                self.muxer.settle(slot, registry);
            }
            (Operation::CreditUpdate, Phase::Established) => self.muxer.queue(slot),
            (Operation::CreditRequest, Phase::Established) => {
                connection.pending.credit = true;
                self.muxer.queue(slot);
            }
            // A second REQUEST, an unexpected RESPONSE, or early data.
            _ => self.malformed(Some(slot), header, registry),
        }
    }

    fn data_from_guest(
        &mut self,
        memory: &GuestMemory,
        chain: &DescriptorChain,
        slot: u32,
        header: &Header,
        registry: &mut dyn Registry,
    ) {
        let mut data = Window::new(&chain.readable, HEADER_LEN, header.len);
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        if connection.status_reply && !data.is_empty() {
            let mut status = [0];
            let read = data.take(1).copy_out(memory, &mut status) && connection.take_status();
            connection.status_reply = false;
            if !read || status != [0] {
                let error = ConnectError::Status(status[0]);
                self.muxer.abort(slot, error, registry);
                return;
            }
            connection.report(Ok(()));
            data.advance(1);
        }
        let mut spans = std::mem::take(&mut self.spans);
        spans.clear();
        spans.extend(data.spans());
        self.pass_on(memory, slot, &mut spans, data.len(), header.flags, registry);
        self.spans = spans;
    }

    /// Passes data of the guest to the host's socket.
    fn pass_on(
        &mut self,
        memory: &GuestMemory,
        slot: u32,
        spans: &mut Vec<Span>,
        len: u32,
        flags: u32,
        registry: &mut dyn Registry,
    ) {
        let Some((connection, pool)) = self.muxer.parts(slot) else {
            return;
        };
        let counters = &self.mailbox.counters;
        counters.from_guest.add(u64::from(len));
        if let Some(member) = &connection.member {
            member.count_from_guest(u64::from(len));
        }
        let since = self.mailbox.profiler.begin();
        let taken = connection.take(memory, pool, counters, spans, len, flags);
        self.mailbox.profiler.end(ProfileStage::SocketWrite, since);
        if !taken {
            self.muxer.abort(slot, ConnectError::Reset, registry);
            return;
        }
        if connection.has_backlog() {
            connection.stored_since = connection.stored_since.or(self.kicked);
            if !connection.watches_writing {
                self.muxer.watch_writing(slot, registry);
            }
        } else {
            self.mailbox
                .profiler
                .end(ProfileStage::GuestToHost, self.kicked);
        }
        self.muxer.settle(slot, registry);
    }
}
