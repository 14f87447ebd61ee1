//! The device: queues on one side, the muxer on the other.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};

use sm_vmm_core::GuestMemory;
use sm_vmm_core::event_loop::{
    Interest, Readiness, Registration, Registry, drain, new_eventfd, signal,
};
use sm_vmm_core::virtio::queue::{Chain, Queue, QueueError, Span, slice_spans};
use sm_vmm_core::virtio::{ActivateError, Activation, DevicePayload, Interrupt, VirtioDevice};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes as _, GuestAddress};

use crate::connection::Phase;
use crate::handle::{Command, Mailbox, MuxerHandle};
use crate::muxer::{Muxer, reply};
use crate::packet::{HEADER_LEN, HOST_CID, Header, Operation, TYPE_STREAM};
use crate::profile::Stage;

const RX: usize = 0;
const TX: usize = 1;
/// Most receive buffers that one read fills, when nobody else waits and when
/// somebody does.
const RUN_ALONE: usize = 32;
const RUN_SHARED: usize = 4;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Token of the mailbox; connections use their slot numbers.
const MAILBOX: u64 = 1 << 62;
/// VIRTIO_VSOCK_F_STREAM (virtio 1.3 section 5.10.3).
const F_STREAM: u64 = 1;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;
/// Packets of the guest looked at before other handlers get their turn.
const TX_BUDGET: usize = 512;

/// What a vsock device is made with.
#[derive(Clone, Copy, Debug)]
pub struct VsockConfig {
    /// Context identifier of the guest.
    pub guest_cid: u64,
    /// Bytes that the guest may have on the way in one connection.
    pub window: u32,
    /// Largest number of connections.
    pub max_connections: usize,
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self {
            guest_cid: 3,
            window: 256 * 1024,
            max_connections: 16_384,
        }
    }
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// The vsock device.
pub struct Vsock {
    config: VsockConfig,
    muxer: Muxer,
    mailbox: Arc<Mailbox>,
    mailbox_registration: Option<Registration>,
    active: Option<Active>,
    queues: Vec<Queue>,
    chain: Chain,
    spans: Vec<Span>,
    /// Receive buffers that are filled together with the first: the chains, all
    /// their spans, and how much of each.
    extra: Vec<Chain>,
    run_spans: Vec<Span>,
    runs: Vec<u32>,
    /// The machine was restored: the guest is owed a transport reset.
    restored: bool,
    /// The guest has been told of the reset and has not handled it yet: new
    /// connections wait, since it would reset them too.
    resetting: bool,
}

impl Vsock {
    /// Makes a device and a handle for host code.
    ///
    /// # Errors
    /// No descriptors to be had.
    pub fn new(config: VsockConfig) -> io::Result<(Arc<Mutex<Self>>, MuxerHandle)> {
        let mailbox = Arc::new(Mailbox::new(new_eventfd()?));
        let device = Self {
            config,
            muxer: Muxer::new(config.max_connections, config.window),
            mailbox: Arc::clone(&mailbox),
            mailbox_registration: None,
            active: None,
            queues: Vec::new(),
            chain: Chain::new(),
            spans: Vec::new(),
            extra: Vec::new(),
            run_spans: Vec::new(),
            runs: Vec::new(),
            restored: false,
            resetting: false,
        };
        Ok((Arc::new(Mutex::new(device)), MuxerHandle { mailbox }))
    }

    /// Runs `work` with the guest's side, then publishes what it did.
    fn with_guest(&mut self, work: impl FnOnce(&mut Self, &GuestMemory) -> Result<(), QueueError>) {
        let Some(active) = self.active.take() else {
            return;
        };
        let done = work(self, &active.memory)
            .and_then(|()| self.receive(&active.memory))
            .and_then(|()| self.publish(&active.memory));
        self.mailbox.set_stats(self.muxer.stats);
        match done {
            Ok(interrupt) => {
                if interrupt {
                    let begun = self.mailbox.profiler.begin();
                    active.interrupt.used_buffers();
                    self.mailbox.profiler.end(Stage::Interrupt, begun);
                }
                self.active = Some(active);
            }
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
    }

    fn publish(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let mut interrupt = false;
        for queue in &mut self.queues {
            if queue.ready {
                interrupt |= queue.publish(memory)?;
            }
        }
        Ok(interrupt)
    }

    /// Does what host code asked for; only called with the guest's side at hand.
    fn take_commands_with(&mut self, registry: &mut Registry<'_>) {
        if self.resetting {
            return; // they wait in the mailbox
        }
        for command in self.mailbox.take() {
            match command {
                Command::Connect {
                    guest_port,
                    stream,
                    options,
                } => {
                    let asked = self.mailbox.profiler.begin();
                    self.muxer
                        .connect(guest_port, stream, options, asked, registry);
                }
                Command::Listen {
                    host_port,
                    acceptor,
                } => self.muxer.listen(host_port, acceptor),
                Command::Cut(group) => self.muxer.cut(&group, registry),
            }
        }
    }

    /// Fills receive buffers, one packet for each connection in turn.
    fn receive(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        loop {
            if self.muxer.resets.is_empty() && self.muxer.ready.is_empty() {
                return Ok(());
            }
            let Some(queue) = self.queues.get_mut(RX) else {
                return Ok(());
            };
            if !queue.pop(memory, &mut self.chain)? {
                return Ok(());
            }
            if !self.produce(memory)? {
                if let Some(queue) = self.queues.get_mut(RX) {
                    queue.undo_pop();
                }
                return Ok(());
            }
        }
    }

    /// Gives a receive buffer with `len` bytes in it back to the guest.
    fn received(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), QueueError> {
        match self.queues.get_mut(RX) {
            Some(queue) => queue.push_used(memory, head, len),
            None => Ok(()),
        }
    }

    /// Writes a packet into the chain taken, or a run of data packets into it and
    /// those after it. `false` when there was nothing to say after all, or nothing
    /// that fits.
    fn produce(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let room = self.chain.writable_len();
        let Some(data_room) = room.checked_sub(HEADER_LEN) else {
            return Err(QueueError::Buffer);
        };
        if let Some(key) = self.muxer.resets.pop_front() {
            let header = reply(self.config.guest_cid, key, Operation::Reset);
            put_header(memory, &self.chain.writable, &header)?;
            self.received(memory, self.chain.head(), HEADER_LEN)?;
            return Ok(true);
        }
        while let Some(slot) = self.muxer.ready.pop_front() {
            let guest_cid = self.config.guest_cid;
            let Some(connection) = self.muxer.get(slot) else {
                continue;
            };
            connection.queued = false;
            let key = (connection.guest_port, connection.host_port);
            let Some((op, flags)) = connection.next_owed() else {
                if data_room == 0 {
                    // A buffer for headers only: of no use here, so do not spin.
                    return Ok(false);
                }
                let filled = self.produce_data(memory, slot)?;
                // Reading may have found the end of the stream.
                self.muxer.queue(slot);
                if filled {
                    return Ok(true);
                }
                continue;
            };
            let (buf_alloc, fwd_cnt) = connection.announce();
            let header = Header {
                flags,
                buf_alloc,
                fwd_cnt,
                ..reply(guest_cid, key, op)
            };
            put_header(memory, &self.chain.writable, &header)?;
            self.muxer.queue(slot);
            self.received(memory, self.chain.head(), HEADER_LEN)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Reads from a connection's socket into the chain taken and, as long as that
    /// fills them, into more chains at once: a system call for each of the small
    /// buffers that guests offer would cost more than the bytes do.
    fn produce_data(&mut self, memory: &GuestMemory, slot: usize) -> Result<bool, QueueError> {
        let guest_cid = self.config.guest_cid;
        // Others that wait get their turn soon.
        let alone = self.muxer.ready.is_empty();
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(false);
        };
        let key = (connection.guest_port, connection.host_port);
        let wanted = connection
            .run
            .min(if alone { RUN_ALONE } else { RUN_SHARED });
        let mut credit = connection.credit();
        if credit == 0 {
            return Ok(false);
        }
        self.run_spans.clear();
        self.runs.clear();
        let mut extra = 0;
        loop {
            let chain = match extra {
                0 => &self.chain,
                n => &self.extra[n - 1],
            };
            let room = chain.writable_len().checked_sub(HEADER_LEN);
            let most = credit.min(room.ok_or(QueueError::Buffer)?);
            if most == 0 {
                // For a header only: it waits for one.
                if let Some(queue) = self.queues.get_mut(RX) {
                    queue.undo_pop();
                }
                extra -= 1;
                break;
            }
            slice_spans(&chain.writable, HEADER_LEN, most, &mut self.spans);
            self.run_spans.extend_from_slice(&self.spans);
            self.runs.push(most);
            credit -= most;
            if credit == 0 || self.runs.len() >= wanted {
                break;
            }
            if self.extra.len() == extra {
                self.extra.push(Chain::new());
            }
            let Some(queue) = self.queues.get_mut(RX) else {
                break;
            };
            if !queue.pop(memory, &mut self.extra[extra])? {
                break;
            }
            extra += 1;
        }
        let offered: u32 = self.runs.iter().sum();
        let Some(connection) = self.muxer.get(slot) else {
            return Ok(false);
        };
        let begun = self.mailbox.profiler.begin();
        let filled = connection.fill(memory, &self.run_spans);
        self.mailbox.profiler.end(Stage::SocketRead, begun);
        connection.run = match filled == offered {
            true => (connection.run * 2).min(RUN_ALONE),
            false => 1,
        };
        let (buf_alloc, fwd_cnt) = match filled {
            0 => (0, 0),
            _ => connection.announce(),
        };
        if let Some(member) = &connection.member {
            member.count_to_guest(u64::from(filled));
        }
        self.muxer.stats.to_guest += u64::from(filled);
        let mut left = filled;
        for index in 0..=extra {
            let len = left.min(self.runs.get(index).copied().unwrap_or(0));
            if len == 0 {
                // From here on nothing was used: the last taken goes back first.
                for _ in index.max(1)..=extra {
                    if let Some(queue) = self.queues.get_mut(RX) {
                        queue.undo_pop();
                    }
                }
                break;
            }
            left -= len;
            let header = Header {
                len,
                buf_alloc,
                fwd_cnt,
                ..reply(guest_cid, key, Operation::Data)
            };
            let chain = match index {
                0 => &self.chain,
                n => &self.extra[n - 1],
            };
            put_header(memory, &chain.writable, &header)?;
            let head = chain.head();
            self.received(memory, head, HEADER_LEN + len)?;
        }
        Ok(filled > 0)
    }

    /// Looks at what the guest sent.
    fn transmit(
        &mut self,
        memory: &GuestMemory,
        registry: &mut Registry<'_>,
    ) -> Result<(), QueueError> {
        for _ in 0..TX_BUDGET {
            if !self.muxer.has_room() {
                // Goes on when the guest has taken some resets.
                return Ok(());
            }
            let Some(queue) = self.queues.get_mut(TX) else {
                return Ok(());
            };
            if !queue.pop(memory, &mut self.chain)? {
                return Ok(());
            }
            let mut bytes = [0; HEADER_LEN as usize];
            if get_header(memory, &self.chain.readable, &mut bytes) {
                self.handle_packet(memory, &Header::decode(&bytes), registry);
            } else {
                self.muxer.stats.malformed += 1;
            }
            if let Some(queue) = self.queues.get_mut(TX) {
                queue.push_used(memory, self.chain.head(), 0)?;
            }
        }
        // More may be waiting: take another turn on the loop.
        signal(self.mailbox.wake.as_fd());
        Ok(())
    }

    fn handle_packet(
        &mut self,
        memory: &GuestMemory,
        header: &Header,
        registry: &mut Registry<'_>,
    ) {
        let key = (header.src_port, header.dst_port);
        let available = self.chain.readable_len().saturating_sub(HEADER_LEN);
        let sound = header.src_cid == self.config.guest_cid
            && header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM
            && header.len <= available;
        let Some(op) = header.operation().filter(|_| sound) else {
            self.malformed(key, header, registry);
            return;
        };
        let slot = self.muxer.find(key);
        match (slot, op) {
            (None, Operation::Request) => self.muxer.accept(header, registry),
            (None, Operation::Reset) => {}
            (None, _) => self.muxer.reset_unknown(key),
            (Some(slot), op) => {
                if let Some(connection) = self.muxer.get(slot) {
                    connection.update_credit(header.buf_alloc, header.fwd_cnt);
                }
                self.handle_known(memory, slot, op, header, registry);
            }
        }
    }

    fn malformed(&mut self, key: (u32, u32), header: &Header, registry: &mut Registry<'_>) {
        self.muxer.stats.malformed += 1;
        match self.muxer.find(key) {
            Some(slot) => self.muxer.abort(slot, registry),
            // A reset is not answered by a reset.
            None if header.operation() == Some(Operation::Reset) => {}
            None => self.muxer.reset_unknown(key),
        }
    }

    fn handle_known(
        &mut self,
        memory: &GuestMemory,
        slot: usize,
        op: Operation,
        header: &Header,
        registry: &mut Registry<'_>,
    ) {
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        match (op, connection.phase) {
            (Operation::Reset, _) => self.muxer.guest_resets(slot, registry),
            (Operation::Response, Phase::Requested) => {
                connection.phase = Phase::Established;
                self.mailbox
                    .profiler
                    .end(Stage::Open, connection.asked.take());
                if !connection.status_reply {
                    connection.report(Ok(()));
                }
                self.muxer.queue(slot);
            }
            (Operation::Data, Phase::Established) => {
                self.data_from_guest(memory, slot, header.len, registry);
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
            (_, Phase::Draining) => {}
            // A second REQUEST, a RESPONSE nobody asked for, data too early.
            _ => {
                self.muxer.stats.malformed += 1;
                self.muxer.abort(slot, registry);
            }
        }
    }

    fn data_from_guest(
        &mut self,
        memory: &GuestMemory,
        slot: usize,
        len: u32,
        registry: &mut Registry<'_>,
    ) {
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        let mut skip = HEADER_LEN;
        let mut left = len;
        if connection.status_reply && len > 0 {
            let mut status = [0];
            slice_spans(&self.chain.readable, skip, 1, &mut self.spans);
            let read = self
                .spans
                .first()
                .is_some_and(|span| memory.read_slice(&mut status, span.address).is_ok());
            connection.status_reply = false;
            if !read || status != [0] {
                connection.report(Err(crate::ConnectError::Status(status[0])));
                self.muxer.abort(slot, registry);
                return;
            }
            connection.report(Ok(()));
            connection.count_status();
            skip += 1;
            left -= 1;
        }
        slice_spans(&self.chain.readable, skip, left, &mut self.spans);
        self.muxer.stats.from_guest += u64::from(left);
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        if let Some(member) = &connection.member {
            member.count_from_guest(u64::from(left));
        }
        let begun = self.mailbox.profiler.begin();
        let taken = connection.take(memory, &mut self.spans);
        self.mailbox.profiler.end(Stage::SocketWrite, begun);
        if taken {
            self.muxer.queue(slot);
        } else {
            self.muxer.abort(slot, registry);
        }
    }

    /// Tells the guest that all its connections are gone.
    fn send_transport_reset(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(EVENT) else {
            return Ok(());
        };
        if !queue.ready || !queue.pop(memory, &mut self.chain)? {
            return Ok(());
        }
        let span = self.chain.writable.first().ok_or(QueueError::Buffer)?;
        if span.len < 4 {
            return Err(QueueError::Buffer);
        }
        memory
            .write_obj(TRANSPORT_RESET.to_le(), span.address)
            .map_err(|_| QueueError::Buffer)?;
        queue.push_used(memory, self.chain.head(), 4)?;
        // The driver puts the buffer back once it has handled the event.
        queue.request_notification(memory)?;
        self.resetting = true;
        Ok(())
    }

    fn socket_ready(&mut self, slot: usize, readiness: Readiness, registry: &mut Registry<'_>) {
        let Some(connection) = self.muxer.get(slot) else {
            return;
        };
        if readiness.readable || readiness.hangup || readiness.error {
            connection.readable = true;
        }
        if readiness.hangup || readiness.error {
            connection.notice_hang_up();
        }
        let writable = readiness.writable || readiness.error;
        if writable && connection.backlog_len() > 0 && !connection.flush() {
            self.muxer.abort(slot, registry);
            return;
        }
        self.muxer.settle(slot, registry);
    }
}

fn put_header(memory: &GuestMemory, spans: &[Span], header: &Header) -> Result<(), QueueError> {
    let bytes = header.encode();
    let mut rest = bytes.as_slice();
    for span in spans {
        let (now, later) = rest.split_at(rest.len().min(span.len as usize));
        memory
            .write_slice(now, span.address)
            .map_err(|_| QueueError::Buffer)?;
        rest = later;
        if rest.is_empty() {
            return Ok(());
        }
    }
    Err(QueueError::Buffer)
}

fn get_header(memory: &GuestMemory, spans: &[Span], bytes: &mut [u8]) -> bool {
    let mut rest = bytes;
    for span in spans {
        let len = rest.len().min(span.len as usize);
        let (now, later) = rest.split_at_mut(len);
        if memory
            .read_slice(now, GuestAddress(span.address.0))
            .is_err()
        {
            return false;
        }
        rest = later;
        if rest.is_empty() {
            return true;
        }
    }
    false
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for index in [RX, TX] {
            if !activation.queues.get(index).is_some_and(|q| q.ready) {
                return Err(ActivateError::QueueMissing { index });
            }
        }
        self.queues = activation.queues;
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn started(&mut self, registry: &mut Registry<'_>) {
        if self.mailbox_registration.is_none() {
            match registry.add(&self.mailbox.wake, MAILBOX, Interest::READ) {
                Ok(registration) => self.mailbox_registration = Some(registration),
                Err(error) => tracing::error!(%error, "host code cannot reach the guest"),
            }
        }
        // Edges may have been missed while the machine was paused.
        for slot in 0..self.muxer.slots() {
            let all = Readiness {
                readable: true,
                writable: true,
                ..Readiness::default()
            };
            self.socket_ready(slot, all, registry);
        }
        let restored = std::mem::take(&mut self.restored);
        self.with_guest(|this, memory| {
            if restored {
                this.send_transport_reset(memory)?;
            }
            this.take_commands_with(registry);
            this.transmit(memory, registry)
        });
    }

    fn queue_notified(&mut self, index: usize, registry: &mut Registry<'_>) {
        let begun = self.mailbox.profiler.begin();
        self.with_guest(|this, memory| {
            if index == EVENT {
                this.resetting = false;
            }
            // What was asked for before the guest spoke counts: a listener that
            // exists by now is one that the guest's request finds.
            this.take_commands_with(registry);
            // Room for resets may have come with receive buffers.
            this.receive(memory)?;
            this.transmit(memory, registry)
        });
        self.mailbox.profiler.end(Stage::GuestKick, begun);
    }

    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut Registry<'_>) {
        if token != MAILBOX {
            let slot = usize::try_from(token).unwrap_or(usize::MAX);
            let begun = self.mailbox.profiler.begin();
            self.socket_ready(slot, readiness, registry);
            self.with_guest(|_, _| Ok(()));
            self.mailbox.profiler.end(Stage::HostReady, begun);
            return;
        }
        let _ = drain(self.mailbox.wake.as_fd());
        self.with_guest(|this, memory| {
            this.take_commands_with(registry);
            this.transmit(memory, registry)
        });
    }

    fn reset(&mut self, registry: Option<&mut Registry<'_>>) {
        self.active = None;
        self.queues.clear();
        self.resetting = false;
        self.muxer.clear(registry);
    }

    fn quiesce(&mut self, registry: &mut Registry<'_>) {
        // Level-triggered: it would keep the loop busy until the device goes on.
        if let Some(registration) = self.mailbox_registration.take() {
            registry.remove(registration, &self.mailbox.wake);
        }
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> DevicePayload {
        let state = (self.config.guest_cid, self.muxer.next_port);
        DevicePayload {
            kind: "vsock".to_owned(),
            version: 2,
            bytes: postcard::to_stdvec(&state).unwrap_or_default(),
        }
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect("vsock", 2)?;
        // Ports go on from where they were: Linux does not forget a connection
        // that a transport reset ended before its process closes the socket, and
        // refuses another one with the same ports until then.
        (self.config.guest_cid, self.muxer.next_port) = postcard::from_bytes(&payload.bytes)
            .map_err(|e| ActivateError::Payload {
                kind: "vsock".to_owned(),
                reason: e.to_string(),
            })?;
        self.restored = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_device_takes_no_port_that_the_guest_may_remember() {
        let (saved, _handle) = Vsock::new(VsockConfig::default()).unwrap();
        let mut saved = saved.lock().unwrap();
        let used: Vec<u32> = (0..3).map(|_| saved.muxer.free_port(1024)).collect();
        let (restored, _handle) = Vsock::new(VsockConfig::default()).unwrap();
        let mut restored = restored.lock().unwrap();
        restored.restore(&saved.save()).unwrap();
        assert!(!used.contains(&restored.muxer.free_port(1024)));
    }
}
