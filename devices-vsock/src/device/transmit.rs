//! Looking at what the guest sent: from the guest to the host.

use sm_vmm_core::GuestMemory;
use sm_vmm_core::event_loop::Registry;
use sm_vmm_core::virtio::iov::Window;
use sm_vmm_core::virtio::queue::{Chain, QueueError};

use super::{Active, BATCH, Pause, TX, Vsock};
use crate::connection::Phase;
use crate::handle::ConnectError;
use crate::packet::{HEADER_LEN, HOST_CID, Header, Operation, TYPE_SEQPACKET, TYPE_STREAM};
use crate::profile::Stage;

/// Packets and bytes of the guest looked at before other handlers get their turn.
const BUDGET: usize = 256;
const BYTES: u32 = 1 << 20;

impl Vsock {
    /// Looks at the guest's packets until there are none, resets have no room, or
    /// it was enough.
    pub(super) fn transmit(
        &mut self,
        active: &Active,
        registry: &mut Registry<'_>,
    ) -> Result<Pause, QueueError> {
        let memory = &active.memory;
        let mut bytes = 0;
        let mut chain = std::mem::take(&mut self.chain);
        let mut pause = Pause::Budget;
        for count in 1..=BUDGET {
            if !self.muxer.has_room() {
                // Goes on when the guest has taken some resets.
                pause = Pause::Buffers;
                break;
            }
            let Some(queue) = self.queues.get_mut(TX) else {
                break;
            };
            if !queue.pop(memory, &mut chain)? {
                pause = Pause::Idle;
                break;
            }
            bytes += self.handle_chain(memory, &chain, registry);
            if let Some(queue) = self.queues.get_mut(TX) {
                queue.push_used(memory, chain.head(), 0)?;
            }
            if count % BATCH == 0 {
                // The guest can use its buffers again while the others are looked at.
                self.publish(active, TX)?;
            }
            if bytes >= BYTES {
                break;
            }
        }
        self.chain = chain;
        Ok(pause)
    }

    /// Looks at one packet; says how much data it had.
    fn handle_chain(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        registry: &mut Registry<'_>,
    ) -> u32 {
        let mut bytes = [0; HEADER_LEN as usize];
        let head = Window::new(&chain.readable, 0, HEADER_LEN);
        if !head.copy_out(memory, &mut bytes) {
            self.count_malformed();
            return 0;
        }
        let header = Header::decode(&bytes);
        self.handle_packet(memory, chain, &header, registry);
        header.len.min(chain.readable_len())
    }

    fn handle_packet(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        header: &Header,
        registry: &mut Registry<'_>,
    ) {
        let key = (header.src_port, header.dst_port);
        let available = chain.readable_len().saturating_sub(HEADER_LEN);
        let kind = header.kind == TYPE_STREAM || self.seqpacket && header.kind == TYPE_SEQPACKET;
        let sound = header.src_cid == self.config.guest_cid
            && header.dst_cid == HOST_CID
            && kind
            && header.len <= available;
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
                // What host code asked for before the guest spoke counts: a listener
                // that exists by now is one that the request finds.
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
            tracing::warn!("the guest sends packets that make no sense; they are counted");
        }
        counters.malformed.add(1);
    }

    fn malformed(&mut self, slot: Option<u32>, header: &Header, registry: &mut Registry<'_>) {
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
        chain: &Chain,
        slot: u32,
        op: Operation,
        header: &Header,
        registry: &mut Registry<'_>,
    ) {
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        match (op, connection.phase) {
            (Operation::Reset, _) => {
                self.muxer
                    .guest_resets(slot, ConnectError::Refused, registry);
            }
            (Operation::Response, Phase::Requested) if !connection.owed.request => {
                connection.phase = Phase::Established;
                self.mailbox
                    .profiler
                    .end(Stage::Open, connection.asked.take());
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
                connection.owed.credit = true;
                self.muxer.queue(slot);
            }
            // A second REQUEST, a RESPONSE nobody asked for, data too early.
            _ => self.malformed(Some(slot), header, registry),
        }
    }

    fn data_from_guest(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        slot: u32,
        header: &Header,
        registry: &mut Registry<'_>,
    ) {
        let mut data = Window::new(&chain.readable, HEADER_LEN, header.len);
        let Some((connection, pool)) = self.muxer.parts(slot) else {
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
        self.spans.clear();
        self.spans.extend(data.spans());
        let counters = &self.mailbox.counters;
        counters.from_guest.add(u64::from(data.len()));
        if let Some(member) = &connection.member {
            member.count_from_guest(u64::from(data.len()));
        }
        let begun = self.mailbox.profiler.begin();
        let (len, flags) = (data.len(), header.flags);
        let taken = connection.take(memory, pool, counters, &mut self.spans, len, flags);
        self.mailbox.profiler.end(Stage::SocketWrite, begun);
        if !taken {
            self.muxer.abort(slot, ConnectError::Reset, registry);
            return;
        }
        if connection.has_backlog() {
            connection.kept_since = connection.kept_since.or(self.kicked);
            if !connection.watches_writing {
                self.muxer.watch_writing(slot, registry);
            }
        } else {
            self.mailbox.profiler.end(Stage::GuestToHost, self.kicked);
        }
        self.muxer.settle(slot, registry);
    }
}
