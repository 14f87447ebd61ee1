//! A model of the guest's driver, for tests and benches: queues in memory of its own, no
//! VM. It follows the virtio specification, section 5.10.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot continue is a failed test"
)]

pub mod linux;
mod packet;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sm_event_loop::EventLoop;
use sm_virtio::GuestMemory;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

pub use packet::{CREDIT_UPDATE, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN};

use crate::{ConnectError, ConnectOptions, MuxerHandle, Stats, Vsock, VsockConfig};

const HEADER: usize = 44;
/// VIRTIO_VSOCK_F_SEQPACKET.
const F_SEQPACKET: u64 = 1 << 1;
const RX_BUFFER: u64 = 4096;
/// The smallest number of receive buffers that a Linux guest offers.
const RX_BUFFERS: u64 = 128;
const RX_BASE: u64 = 0x10_0000;
const TX_BASE: u64 = 0x20_0000;
/// Packets that may be in the transmit queue at once, and the room for each.
const SLOTS: u64 = 8;
/// Address of the queues, and their sizes.
const QUEUES: u64 = 0x1_0000;
const SIZES: [u16; 3] = [256, 32, 16];
const SLOT_LEN: u64 = 0x1_1000;
/// Longest data that a Linux guest sends in one packet.
const PACKET: usize = 64 << 10;
/// Length of guest memory; most of it is never touched.
const MEMORY: usize = 32 << 20;
/// Address of a table of indirect descriptors.
const TABLE: u64 = 0x38_0000;
/// Address of the buffer of the event queue.
pub const EVENT_BASE: u64 = 0x30_0000;
const GUEST: u64 = 3;
const HOST: u64 = 2;
/// Timeout of a device in a test.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The guest's port that [`Guest::connected`] uses.
pub const PORT: u32 = 7;

/// The guest's driver.
pub struct Guest {
    memory: GuestMemory,
    /// The transport, from the driver's side.
    pub driver: Driver,
    /// The queue of received packets.
    pub rx: DriverQueue,
    tx: DriverQueue,
    /// The queue of events.
    pub event: DriverQueue,
    buffers: HashMap<u16, Span>,
    /// For each host port, the bytes that may be sent now, and those sent in total.
    room: HashMap<u32, u64>,
    sent: HashMap<u32, u64>,
    /// For each host port, the bytes taken that were announced to the device.
    taken: HashMap<u32, u32>,
    /// Packets in the transmit queue, and the slot of the next one.
    in_flight: u64,
    slot: u64,
    /// The host's side.
    pub muxer: MuxerHandle,
    _event_loop: EventLoop,
}

impl Guest {
    /// Creates a device and a driver that has started it.
    ///
    /// # Panics
    /// If the system refuses.
    #[must_use]
    pub fn new(config: VsockConfig) -> Self {
        Self::with_receive_buffers(config, RX_BUFFERS)
    }

    /// As [`Self::new`], with this number of receive buffers.
    ///
    /// # Panics
    /// If the system refuses.
    #[must_use]
    pub fn with_receive_buffers(config: VsockConfig, count: u64) -> Self {
        let mut guest = Self::without_driver(config);
        let all = guest.driver.offered();
        guest.start(all, count);
        guest
    }

    /// As [`Self::new`], with a driver without seqpacket sockets.
    ///
    /// # Panics
    /// If the system refuses.
    #[must_use]
    pub fn with_streams_only(config: VsockConfig) -> Self {
        let mut guest = Self::without_driver(config);
        let streams = guest.driver.offered() & !F_SEQPACKET;
        guest.start(streams, RX_BUFFERS);
        guest
    }

    fn start(&mut self, features: u64, count: u64) {
        let queues = self.driver.start_with(features, QUEUES, &SIZES);
        let mut queues = queues.into_iter();
        self.rx = queues.next().unwrap();
        self.tx = queues.next().unwrap();
        self.event = queues.next().unwrap();
        self.buffers.clear();
        self.in_flight = 0;
        for index in 0..count {
            self.offer_rx(Span {
                address: GuestAddress(RX_BASE + index * RX_BUFFER),
                len: RX_BUFFER as u32,
            });
        }
        self.offer_event();
        self.driver.notify(0);
    }

    /// Creates a device whose driver has not started it: nothing can be sent or received.
    ///
    /// # Panics
    /// If the system refuses.
    #[must_use]
    pub fn without_driver(config: VsockConfig) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let event_loop = EventLoop::spawn("test").unwrap();
        let (device, muxer) = Vsock::new(config).unwrap();
        let device: Arc<Mutex<dyn sm_virtio::VirtioDevice>> = device;
        let driver = Driver::new(device, &memory, event_loop.handle());
        let queue = |index: usize| {
            let base = QUEUES + 0x1_0000 * index as u64;
            DriverQueue::new(memory.clone(), base, SIZES[index])
        };
        let (rx, tx, event) = (queue(0), queue(1), queue(2));
        Self {
            memory,
            driver,
            rx,
            tx,
            event,
            buffers: HashMap::new(),
            room: HashMap::new(),
            sent: HashMap::new(),
            taken: HashMap::new(),
            in_flight: 0,
            slot: 0,
            muxer,
            _event_loop: event_loop,
        }
    }

    fn offer_rx(&mut self, span: Span) {
        let head = self.rx.offer(&[], &[span]).unwrap();
        self.buffers.insert(head, span);
    }

    /// Sends a packet, and waits until the device has taken it.
    ///
    /// # Panics
    /// If it does not.
    pub fn send(&mut self, packet: &Packet) {
        self.queue(packet, &packet.payload);
        self.flush();
    }

    /// Waits for a packet.
    ///
    /// # Panics
    /// If none arrives, or an invalid one.
    pub fn receive(&mut self) -> Packet {
        let (head, len) = self.driver.wait_used(&mut self.rx);
        self.open(head, len)
    }

    /// Reads the packet in a receive buffer, and offers the buffer again.
    fn open(&mut self, head: u16, len: u32) -> Packet {
        let span = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, span.address).unwrap();
        self.offer_rx(span);
        self.driver.notify(0);
        let packet = Packet::decode(&bytes);
        assert_eq!((packet.src_cid, packet.dst_cid), (HOST, GUEST));
        packet
    }

    /// Returns a packet, if one has arrived.
    ///
    /// # Panics
    /// If it is invalid.
    pub fn try_receive(&mut self) -> Option<Packet> {
        let (head, len) = self.rx.take_used()?;
        Some(self.open(head, len))
    }

    /// Waits until the device has handled all earlier notifications.
    ///
    /// # Panics
    /// If the event loop has stopped.
    pub fn settle(&self) {
        // In the order of the loop: a pause handles everything before it.
        self.driver.transport.quiesce().unwrap();
        self.driver.transport.unquiesce();
        self.driver.transport.quiesce().unwrap();
        self.driver.transport.unquiesce();
    }

    /// Waits until the counters satisfy a condition.
    ///
    /// # Panics
    /// If that takes a minute.
    pub fn wait_until(&self, wanted: impl Fn(&Stats) -> bool) {
        let begun = Instant::now();
        while !wanted(&self.muxer.stats()) {
            assert!(begun.elapsed() < TIMEOUT, "{:?}", self.muxer.stats());
            std::thread::yield_now();
        }
    }

    /// Puts a packet into the transmit queue, without waiting for its use.
    ///
    /// # Panics
    /// If the queue is full and the device takes nothing.
    pub fn queue_packet(&mut self, packet: &Packet) {
        self.queue(packet, &packet.payload);
    }

    /// Offers any bytes as a packet, cut into descriptors of these lengths and one for the
    /// rest, without waiting. Dropped if there is no room.
    ///
    /// # Panics
    /// If they are longer than a packet may be.
    pub fn offer_cut(&mut self, bytes: &[u8], cuts: &[u8]) {
        while self.tx.take_used().is_some() {
            self.in_flight -= 1;
        }
        if self.in_flight == SLOTS {
            return;
        }
        assert!(bytes.len() as u64 <= SLOT_LEN);
        let address = TX_BASE + self.slot * SLOT_LEN;
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
        let mut spans = Vec::new();
        let mut start = 0;
        let ends = cuts.iter().scan(0, |end, &cut| {
            *end += usize::from(cut);
            Some(*end)
        });
        for end in ends.chain([bytes.len()]) {
            let end = end.min(bytes.len());
            spans.push(Span {
                address: GuestAddress(address + start as u64),
                len: (end - start) as u32,
            });
            start = end;
        }
        if self.tx.offer(&spans, &[]).is_some() {
            self.slot = (self.slot + 1) % SLOTS;
            self.in_flight += 1;
        }
        self.driver.notify(1);
    }

    /// Takes all packets that have arrived, calls `callback` with the ports of each, the
    /// guest's first, and offers the buffers again with another length. Does not wait.
    pub fn take_all(&mut self, next: u32, mut callback: impl FnMut((u32, u32))) {
        while let Some((head, len)) = self.rx.take_used() {
            let span = self.buffers.remove(&head).unwrap();
            let mut header = [0; HEADER];
            assert!(
                len as usize >= HEADER && len <= span.len,
                "{len} bytes used"
            );
            self.memory.read_slice(&mut header, span.address).unwrap();
            let packet = Packet::read(&header);
            assert_eq!((packet.src_cid, packet.dst_cid), (HOST, GUEST));
            callback((packet.dst_port, packet.src_port));
            self.offer_rx(Span { len: next, ..span });
        }
        self.driver.notify(0);
    }

    /// Resets the device and starts it again.
    ///
    /// # Panics
    /// If the device refuses.
    pub fn restart(&mut self) {
        self.driver.reset();
        let all = self.driver.offered();
        self.start(all, RX_BUFFERS);
    }

    /// Saves the machine and restores it in place.
    ///
    /// # Panics
    /// If the device refuses.
    pub fn restore(&mut self) {
        let transport = &self.driver.transport;
        transport.quiesce().unwrap();
        let state = transport.save().unwrap();
        transport.restore(&state).unwrap();
        transport.unquiesce();
    }

    /// Makes the transmit queue claim more buffers than it has.
    pub fn break_transmit_queue(&mut self) {
        self.tx.set_available_index(0x8000);
        self.driver.notify(1);
    }

    /// Offers a buffer for an event, and notifies the device.
    ///
    /// # Panics
    /// If the queue is full.
    pub fn offer_event(&mut self) {
        let event = Span {
            address: GuestAddress(EVENT_BASE),
            len: 8,
        };
        self.event.offer(&[], &[event]).unwrap();
        self.driver.notify(2);
    }

    /// Sends any bytes as a packet, and waits until the device has taken them.
    ///
    /// # Panics
    /// If it does not, or if they are longer than a packet may be.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= HEADER + PACKET);
        self.memory
            .write_slice(bytes, GuestAddress(TX_BASE))
            .unwrap();
        let span = Span {
            address: GuestAddress(TX_BASE),
            len: bytes.len() as u32,
        };
        self.flush();
        if self.tx.offer(&[span], &[]).is_some() {
            self.in_flight += 1;
            self.driver.notify(1);
            self.flush();
        }
    }

    /// Sends any bytes as a packet that continues with `more`, in an indirect table, in one
    /// batch with `before`; waits until the device has taken both.
    ///
    /// # Panics
    /// If it does not.
    pub fn send_spans(&mut self, before: &Packet, bytes: &[u8], more: &[Span]) {
        self.flush();
        self.driver.transport.quiesce().unwrap();
        self.queue(before, &before.payload);
        let address = GuestAddress(TX_BASE + self.slot * SLOT_LEN);
        self.memory.write_slice(bytes, address).unwrap();
        let first = Span {
            address,
            len: bytes.len() as u32,
        };
        let spans: Vec<Span> = [first].into_iter().chain(more.iter().copied()).collect();
        self.tx.offer_indirect(TABLE, &spans, &[]).unwrap();
        self.in_flight += 1;
        self.driver.transport.unquiesce();
        self.driver.notify(1);
        self.flush();
    }

    /// Waits for a packet, and offers its buffer again with another length.
    ///
    /// # Panics
    /// As [`Self::receive`].
    pub fn receive_into(&mut self, next: u32) -> Packet {
        let (head, len) = self.driver.wait_used(&mut self.rx);
        let span = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, span.address).unwrap();
        self.offer_rx(Span { len: next, ..span });
        self.driver.notify(0);
        Packet::decode(&bytes)
    }

    /// Waits for a packet with operation `op`.
    ///
    /// # Panics
    /// If another arrives.
    #[track_caller]
    pub fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// Opens a connection from the host that the guest accepts; returns the host's end, and
    /// the request.
    ///
    /// # Panics
    /// If that fails.
    pub fn connected(&mut self) -> (UnixStream, Packet) {
        let (ours, result) = connect(&self.muxer, ConnectOptions::default());
        let request = self.expect(REQUEST);
        assert_eq!(request.dst_port, PORT);
        self.send(&request.reply(RESPONSE));
        assert_eq!(result.recv().unwrap(), Ok(()));
        (ours, request)
    }
}

/// Requests a connection to [`PORT`]; returns the host's end, and a receiver of the result.
///
/// # Panics
/// If no descriptors are left.
#[must_use]
pub fn connect(
    muxer: &MuxerHandle,
    options: ConnectOptions,
) -> (UnixStream, Receiver<Result<(), ConnectError>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (send, receive) = channel();
    let options = options.on_result(move |result| send.send(result.map(|_port| ())).unwrap());
    muxer.connect(PORT, theirs.into(), options);
    (ours, receive)
}

impl Guest {
    /// Takes the packets that have arrived, at least one: records the credit that each
    /// grants and the length of its data, and returns the buffers. Returns the operations
    /// of the packets and the bytes of data.
    fn consume(&mut self) -> (Vec<u16>, u64) {
        let mut next = Some(self.driver.wait_used(&mut self.rx));
        let (mut kinds, mut bytes) = (Vec::new(), 0);
        while let Some((head, len)) = next {
            let span = self.buffers.remove(&head).unwrap();
            let mut header = [0; HEADER];
            self.memory.read_slice(&mut header, span.address).unwrap();
            let packet = Packet::read(&header);
            let data = len - HEADER as u32;
            bytes += u64::from(data);
            kinds.push(packet.op);
            let sent = self.sent.entry(packet.src_port).or_default();
            // Counters wrap at 32 bits; the bytes in flight are never that many.
            let way = (*sent as u32).wrapping_sub(packet.fwd_cnt);
            let room = packet.buf_alloc.saturating_sub(way);
            self.room.insert(packet.src_port, u64::from(room));
            self.offer_rx(span);
            next = self.rx.take_used();
        }
        self.driver.notify(0);
        (kinds, bytes)
    }

    /// Takes data packets of one connection until they hold `want` bytes, without reading
    /// the data, and grants credit meanwhile. `request` is the packet that opened it,
    /// `taken` the number of bytes taken before; returns the sum.
    ///
    /// # Panics
    /// If no packet arrives.
    pub fn take(&mut self, request: &Packet, want: u64, taken: u64) -> u64 {
        let mut total = taken;
        let mut granted = taken;
        let reply = request.reply(CREDIT_UPDATE);
        while total < taken + want {
            total += self.consume().1;
            if total - granted >= u64::from(reply.buf_alloc) / 4 || total >= taken + want {
                granted = total;
                let mut update = reply.clone();
                update.fwd_cnt = total as u32;
                self.taken.insert(request.src_port, update.fwd_cnt);
                self.queue(&update, &[]);
            }
        }
        total
    }

    /// Sends `data` in packets of Linux's largest length, waiting for credit if necessary;
    /// returns when the device has taken all of it.
    ///
    /// # Panics
    /// If the device grants no more.
    pub fn send_all(&mut self, request: &Packet, mut data: &[u8]) {
        let port = request.src_port;
        let first = u64::from(request.buf_alloc);
        while !data.is_empty() {
            let room = *self.room.entry(port).or_insert(first);
            if room == 0 {
                self.consume();
                continue;
            }
            let len = data.len().min(PACKET).min(usize::try_from(room).unwrap());
            let (now, later) = data.split_at(len);
            let mut packet = request.reply(RW);
            packet.fwd_cnt = self.taken.get(&port).copied().unwrap_or(0);
            self.queue(&packet, now);
            *self.sent.entry(port).or_default() += len as u64;
            self.room.insert(port, room - len as u64);
            data = later;
        }
        self.flush();
    }

    /// Waits until the device has taken all packets.
    fn flush(&mut self) {
        while self.in_flight > 0 {
            self.driver.wait_used(&mut self.tx);
            self.in_flight -= 1;
        }
    }

    /// Adds a packet to the transmit queue, behind earlier ones.
    fn queue(&mut self, packet: &Packet, data: &[u8]) {
        while self.in_flight == SLOTS || (self.in_flight > 0 && self.tx.take_used().is_some()) {
            if self.in_flight == SLOTS {
                self.driver.wait_used(&mut self.tx);
            }
            self.in_flight -= 1;
        }
        let address = GuestAddress(TX_BASE + self.slot * SLOT_LEN);
        self.slot = (self.slot + 1) % SLOTS;
        let header = packet.header(packet.len.unwrap_or(data.len() as u32));
        self.memory.write_slice(&header, address).unwrap();
        let body = GuestAddress(address.0 + HEADER as u64);
        self.memory.write_slice(data, body).unwrap();
        let span = Span {
            address,
            len: (HEADER + data.len()) as u32,
        };
        self.tx.offer(&[span], &[]).unwrap();
        self.in_flight += 1;
        self.driver.notify(1);
    }

    /// Waits for the end of a connection that the host has closed, and confirms it.
    ///
    /// # Panics
    /// If it does not end.
    pub fn closed(&mut self, request: &Packet) {
        loop {
            match self.receive().op {
                SHUTDOWN => {
                    self.send(&request.reply(RST));
                    return;
                }
                RST => return,
                _ => {}
            }
        }
    }
}
