//! A model of the guest's driver, for tests and benches: own queues in memory, no
//! VM. It follows the virtio specification, section 5.10.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on is a failed test"
)]

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use sm_vmm_core::GuestMemory;
use sm_vmm_core::event_loop::EventLoop;
use sm_vmm_core::virtio::queue::Span;
use sm_vmm_core::virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

use crate::{ConnectError, ConnectOptions, MuxerHandle, Vsock, VsockConfig};

const HEADER: usize = 44;
const RX_BUFFER: u64 = 4096;
const RX_BASE: u64 = 0x10_0000;
const TX_BASE: u64 = 0x20_0000;
/// Where the buffer of the event queue is.
pub const EVENT_BASE: u64 = 0x30_0000;
const GUEST: u64 = 3;
const HOST: u64 = 2;
/// The guest's port that [`Guest::connected`] uses.
pub const PORT: u32 = 7;

/// A connection is asked for.
pub const REQUEST: u16 = 1;
/// It is accepted.
pub const RESPONSE: u16 = 2;
/// It is refused, or over.
pub const RST: u16 = 3;
/// One direction, or both, are over.
pub const SHUTDOWN: u16 = 4;
/// Data.
pub const RW: u16 = 5;
/// More room.
pub const CREDIT_UPDATE: u16 = 6;

/// A packet as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// 1 for streams.
    pub kind: u16,
    /// What it is for.
    pub op: u16,
    /// Of a shutdown: 1 no more received, 2 no more sent.
    pub flags: u32,
    /// Room of the sender for data.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken so far.
    pub fwd_cnt: u32,
    /// What the header says, when that is not the payload's length.
    pub len: Option<u32>,
    /// Data.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A packet of the guest with 64 KiB of room and no data.
    #[must_use]
    pub fn from_guest(src_port: u32, dst_port: u32, op: u16) -> Self {
        Self {
            src_cid: GUEST,
            dst_cid: HOST,
            src_port,
            dst_port,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
            len: None,
            payload: Vec::new(),
        }
    }

    /// An answer to this packet.
    #[must_use]
    pub fn reply(&self, op: u16) -> Self {
        Self::from_guest(self.dst_port, self.src_port, op)
    }

    fn encode(&self) -> Vec<u8> {
        let len = self.len.unwrap_or(self.payload.len() as u32);
        let mut bytes = Vec::new();
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    fn decode(bytes: &[u8]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let packet = Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            len: None,
            payload: bytes[HEADER..].to_vec(),
        };
        assert_eq!(u32_at(24) as usize, packet.payload.len(), "length field");
        packet
    }
}

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
    /// For each host port: bytes that may be sent in all, and that were.
    credit: HashMap<u32, (u64, u64)>,
    /// The host's side.
    pub muxer: MuxerHandle,
    _event_loop: EventLoop,
}

impl Guest {
    /// A device and a driver that has started it.
    ///
    /// # Panics
    /// When the system refuses.
    #[must_use]
    pub fn new(config: VsockConfig) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let event_loop = EventLoop::spawn("test").unwrap();
        let (device, muxer) = Vsock::new(config).unwrap();
        let device: Arc<Mutex<dyn sm_vmm_core::virtio::VirtioDevice>> = device;
        let driver = Driver::new(device, &memory, event_loop.handle());
        let mut queues = driver.start(0x1_0000, &[32, 32, 4]).into_iter();
        let (rx, tx, event) = (
            queues.next().unwrap(),
            queues.next().unwrap(),
            queues.next().unwrap(),
        );
        let mut guest = Self {
            memory,
            driver,
            rx,
            tx,
            event,
            buffers: HashMap::new(),
            credit: HashMap::new(),
            muxer,
            _event_loop: event_loop,
        };
        for index in 0..16 {
            guest.offer_rx(Span {
                address: GuestAddress(RX_BASE + index * RX_BUFFER),
                len: RX_BUFFER as u32,
            });
        }
        let event = Span {
            address: GuestAddress(EVENT_BASE),
            len: 8,
        };
        guest.event.offer(&[], &[event]).unwrap();
        guest.driver.notify(2);
        guest.driver.notify(0);
        guest
    }

    fn offer_rx(&mut self, span: Span) {
        let head = self.rx.offer(&[], &[span]).unwrap();
        self.buffers.insert(head, span);
    }

    /// Sends a packet, and waits until the device has taken it.
    ///
    /// # Panics
    /// When it does not.
    pub fn send(&mut self, packet: &Packet) {
        let bytes = packet.encode();
        self.memory
            .write_slice(&bytes, GuestAddress(TX_BASE))
            .unwrap();
        let span = Span {
            address: GuestAddress(TX_BASE),
            len: bytes.len() as u32,
        };
        self.tx.offer(&[span], &[]).unwrap();
        self.driver.notify(1);
        self.driver.wait_used(&mut self.tx);
    }

    /// Waits for a packet.
    ///
    /// # Panics
    /// When none comes, or one that makes no sense.
    pub fn receive(&mut self) -> Packet {
        let (head, len) = self.driver.wait_used(&mut self.rx);
        let span = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, span.address).unwrap();
        self.offer_rx(span);
        self.driver.notify(0);
        let packet = Packet::decode(&bytes);
        assert_eq!((packet.src_cid, packet.dst_cid), (HOST, GUEST));
        packet
    }

    /// Waits for a packet that is for `op`.
    ///
    /// # Panics
    /// When another comes.
    #[track_caller]
    pub fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// A connection that the host opened and the guest accepted: the host's end,
    /// and the request.
    ///
    /// # Panics
    /// When that fails.
    pub fn connected(&mut self) -> (UnixStream, Packet) {
        let (ours, result) = connect(&self.muxer, ConnectOptions::default());
        let request = self.expect(REQUEST);
        assert_eq!(request.dst_port, PORT);
        self.send(&request.reply(RESPONSE));
        assert_eq!(result.recv().unwrap(), Ok(()));
        (ours, request)
    }
}

/// Asks for a connection to [`PORT`]: the host's end, and what comes of it.
///
/// # Panics
/// When there are no descriptors left.
#[must_use]
pub fn connect(
    muxer: &MuxerHandle,
    options: ConnectOptions,
) -> (UnixStream, Receiver<Result<(), ConnectError>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (send, receive) = channel();
    let options = ConnectOptions {
        on_result: Some(Box::new(move |result| send.send(result).unwrap())),
        ..options
    };
    muxer.connect(PORT, theirs.into(), options);
    (ours, receive)
}

impl Guest {
    /// Takes data packets of one connection until they hold `want` bytes, without
    /// looking at the data, and grants room as it goes. `request` is the packet
    /// that opened it, `taken` what was taken of it before; the sum is returned.
    ///
    /// # Panics
    /// When no packet comes.
    pub fn take(&mut self, request: &Packet, want: u64, taken: u64) -> u64 {
        let mut total = taken;
        let mut granted = taken;
        while total < taken + want {
            let (head, len) = self.driver.wait_used(&mut self.rx);
            let span = self.buffers.remove(&head).unwrap();
            self.offer_rx(span);
            self.driver.notify(0);
            total += u64::from(len) - HEADER as u64;
            if total - granted >= u64::from(request.reply(RW).buf_alloc) / 2 {
                granted = total;
                let mut update = request.reply(CREDIT_UPDATE);
                // The counter wraps, as the specification has it.
                update.fwd_cnt = total as u32;
                self.send(&update);
            }
        }
        let mut update = request.reply(CREDIT_UPDATE);
        update.fwd_cnt = total as u32;
        self.send(&update);
        total
    }

    /// Sends a packet with as much of the data of `data` as `most` and the
    /// device's credit allow, waiting for credit if there is none. Returns how
    /// much that was.
    ///
    /// # Panics
    /// When the device does not grant any more, or sends data meanwhile.
    pub fn give(&mut self, request: &Packet, data: &Packet, most: usize) -> usize {
        let credit = self
            .credit
            .entry(request.src_port)
            .or_insert((u64::from(request.buf_alloc), 0));
        while credit.0 == credit.1 {
            let (head, len) = self.driver.wait_used(&mut self.rx);
            let span = self.buffers.remove(&head).unwrap();
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, span.address).unwrap();
            let head = self.rx.offer(&[], &[span]).unwrap();
            self.buffers.insert(head, span);
            self.driver.notify(0);
            let packet = Packet::decode(&bytes);
            assert_eq!(packet.op, CREDIT_UPDATE, "{packet:?}");
            // Both counters wrap at 32 bits; what is on its way never is that much.
            let way = (credit.1 as u32).wrapping_sub(packet.fwd_cnt);
            credit.0 = credit.1 + u64::from(packet.buf_alloc) - u64::from(way);
        }
        let room = usize::try_from(credit.0 - credit.1).unwrap();
        let len = data.payload.len().min(room).min(most);
        credit.1 += len as u64;
        if len == data.payload.len() {
            self.send(data);
        } else {
            let mut part = data.clone();
            part.payload.truncate(len);
            self.send(&part);
        }
        len
    }

    /// Waits for the end of a connection that the host has closed, and confirms it.
    ///
    /// # Panics
    /// When it does not end.
    pub fn closed(&mut self, request: &Packet) {
        loop {
            match self.receive().op {
                SHUTDOWN => self.send(&request.reply(RST)),
                RST => return,
                _ => continue,
            }
            if self.muxer.stats().connections == 0 {
                return;
            }
        }
    }
}
