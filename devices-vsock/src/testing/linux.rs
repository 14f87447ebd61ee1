//! A driver that behaves like Linux's, with sockets on top of it.
//!
//! Receive buffers have one descriptor. They are offered until the ring is full, and again
//! when half of them are used; a buffer stays with its socket until an application has read
//! it. Packets are sent as header and payload. The device is notified if it requested that,
//! and interrupts are requested only before the driver becomes idle. Credit is announced as
//! in `virtio_transport_stream_do_dequeue`: when a reader has read everything, or the
//! sender may assume that less than 64 KiB are free.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};

use sm_event_loop::EventLoop;
use sm_virtio::GuestMemory;
use sm_virtio::VirtioDevice;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

use super::{
    CREDIT_UPDATE, GUEST, HEADER, HOST, PACKET, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN,
};
use crate::{MuxerHandle, Vsock, VsockConfig};

const QUEUES: u64 = 0x1_0000;
const RING: u16 = 256;
const SEND_BASE: u64 = 0x10_0000;
/// A header, and one page later the payload.
const SEND_LEN: u64 = 0x1_1000;
/// Maximum number of packets in flight: two descriptors each.
const SEND_SLOTS: u16 = RING / 2;
const RECEIVE_BASE: u64 = SEND_BASE + SEND_SLOTS as u64 * SEND_LEN;

/// Socket parameters of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Length of a receive buffer in bytes, including its header.
    pub buffer: u32,
    /// Number of receive buffers in total: in the ring, and not read yet.
    pub buffers: u32,
    /// Receive buffers in the ring.
    pub posted: u16,
    /// Window of a socket in bytes.
    pub window: u32,
}

impl Profile {
    /// Linux 6.12: a page minus the kernel's own part, 256 KiB for a socket.
    pub const LINUX: Self = Self {
        buffer: 3776,
        buffers: 4096,
        posted: RING,
        window: 256 << 10,
    };

    /// As Linux, with room for `payload` bytes of data in each buffer, and no more memory
    /// in the ring than Linux offers, which is 1 MiB (but at least one buffer).
    #[must_use]
    pub const fn with_payload(payload: u32) -> Self {
        let memory = RING as u32 * 4096;
        let posted = match memory / payload {
            0 => 1,
            few if few < RING as u32 => few as u16,
            _ => RING,
        };
        Self {
            buffer: payload + HEADER as u32,
            buffers: 1024,
            posted,
            ..Self::LINUX
        }
    }
}

/// Identifies a socket of a [`LinuxGuest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(u32);

impl SocketId {
    /// Returns a small number, from 0 on, which is reused.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A part of the data in a receive buffer.
#[derive(Clone, Copy, Debug)]
struct Piece {
    buffer: u32,
    start: u32,
    end: u32,
}

#[derive(Debug, Default)]
struct Socket {
    guest_port: u32,
    host_port: u32,
    established: bool,
    /// Ended by a reset.
    reset: bool,
    /// SHUTDOWN flags of the host, and of the guest.
    host_ends: u32,
    guest_ends: u32,
    received: VecDeque<Piece>,
    bytes: u32,
    forwarded: u32,
    announced: u32,
    sent: u32,
    host_window: u32,
    host_forwarded: u32,
    /// True if the socket is in the list of events.
    noted: bool,
}

/// Sockets on top of a driver on top of a device.
pub struct LinuxGuest {
    memory: GuestMemory,
    /// The transport, from the driver's side.
    pub driver: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    _event: DriverQueue,
    profile: Profile,
    free_buffers: Vec<u32>,
    /// Buffer of each chain in the receive queue.
    posted: Vec<u32>,
    in_ring: u16,
    free_slots: Vec<u16>,
    sending: Vec<u16>,
    sockets: Vec<Option<Socket>>,
    free_sockets: Vec<u32>,
    by_ports: HashMap<(u32, u32), u32>,
    /// Sockets with an event, in the order of events.
    events: VecDeque<u32>,
    /// Sockets that wait for room in the transmit queue.
    waiting: Vec<u32>,
    /// Packets without data that wait for room.
    outbox: VecDeque<Packet>,
    /// The host's side.
    pub muxer: MuxerHandle,
    _event_loop: EventLoop,
}

impl LinuxGuest {
    /// Creates a device, and a driver that has started it.
    ///
    /// # Panics
    /// If the system refuses.
    #[must_use]
    pub fn new(config: VsockConfig, profile: Profile) -> Self {
        let stride = u64::from(profile.buffer.next_multiple_of(4096));
        let end = RECEIVE_BASE + stride * u64::from(profile.buffers);
        let memory = GuestMemory::from_ranges(&[(
            GuestAddress(0),
            usize::try_from(end.next_multiple_of(4096)).unwrap(),
        )])
        .unwrap();
        let event_loop = EventLoop::spawn("test").unwrap();
        let (device, muxer) = Vsock::new(config).unwrap();
        let device: Arc<Mutex<dyn VirtioDevice>> = device;
        let driver = Driver::new(device, &memory, event_loop.handle());
        let mut queues = driver.start(QUEUES, &[RING, RING, 16]).into_iter();
        let mut guest = Self {
            memory,
            driver,
            rx: queues.next().unwrap(),
            tx: queues.next().unwrap(),
            _event: queues.next().unwrap(),
            profile,
            free_buffers: (0..profile.buffers).rev().collect(),
            posted: vec![0; usize::from(RING)],
            in_ring: 0,
            free_slots: (0..SEND_SLOTS).collect(),
            sending: vec![0; usize::from(RING)],
            sockets: Vec::new(),
            free_sockets: Vec::new(),
            by_ports: HashMap::new(),
            events: VecDeque::new(),
            waiting: Vec::new(),
            outbox: VecDeque::new(),
            muxer,
            _event_loop: event_loop,
        };
        guest.refill();
        guest.driver.notify(0);
        guest.rx.kicked();
        guest
    }

    fn buffer_address(&self, buffer: u32) -> u64 {
        let stride = u64::from(self.profile.buffer.next_multiple_of(4096));
        RECEIVE_BASE + stride * u64::from(buffer)
    }

    /// Offers receive buffers until the ring is full.
    fn refill(&mut self) {
        while self.in_ring < self.profile.posted
            && let Some(buffer) = self.free_buffers.pop()
        {
            let span = Span {
                address: GuestAddress(self.buffer_address(buffer)),
                len: self.profile.buffer,
            };
            let head = self.rx.offer(&[], &[span]).unwrap();
            self.posted[usize::from(head)] = buffer;
            self.in_ring += 1;
        }
    }

    /// Notifies the device of offered chains, if it wants to be notified.
    pub fn kick(&mut self) {
        for (index, queue) in [(0, &mut self.rx), (1, &mut self.tx)] {
            if queue.offered_since_kick() > 0 {
                fence(Ordering::SeqCst);
                if queue.needs_kick() {
                    self.driver.notify(index);
                }
                queue.kicked();
            }
        }
    }

    /// Takes the packets that have arrived, and sends waiting ones; returns true if any has
    /// arrived, or if the device has taken one that was sent.
    ///
    /// # Panics
    /// If the device violates the protocol.
    pub fn poll(&mut self) -> bool {
        let mut any = false;
        while let Some((head, _)) = self.tx.take_used() {
            self.free_slots.push(self.sending[usize::from(head)]);
            any = true;
        }
        if any {
            for index in std::mem::take(&mut self.waiting) {
                self.note(index);
            }
        }
        while let Some((head, len)) = self.rx.take_used() {
            self.in_ring -= 1;
            let buffer = self.posted[usize::from(head)];
            if !self.receive(buffer, len) {
                self.free_buffers.push(buffer);
            }
            any = true;
        }
        while let Some(packet) = self.outbox.pop_front() {
            if !self.transmit(&packet, &[]) {
                self.outbox.push_front(packet);
                break;
            }
        }
        if self.in_ring < self.profile.posted.div_ceil(2) {
            self.refill();
        }
        self.kick();
        any
    }

    /// Takes the packets that have arrived, and requests an interrupt (see
    /// [`Driver::line`]) for later ones.
    ///
    /// # Panics
    /// If the device violates the protocol.
    pub fn serve(&mut self) {
        self.driver.acknowledge();
        loop {
            self.rx.set_used_event();
            self.tx.set_used_event();
            fence(Ordering::SeqCst);
            if !self.poll() {
                return;
            }
        }
    }

    /// Waits until a packet arrives, and takes it.
    ///
    /// # Panics
    /// If none arrives for a minute.
    pub fn wait(&mut self) {
        loop {
            let seen = self.driver.line.pulses();
            self.rx.set_used_event();
            self.tx.set_used_event();
            fence(Ordering::SeqCst);
            if self.poll() {
                return;
            }
            self.driver.line.wait_for_pulse_after(seen);
            self.driver.acknowledge();
        }
    }

    /// Handles a packet; returns true if its buffer stays in use.
    fn receive(&mut self, buffer: u32, len: u32) -> bool {
        let address = self.buffer_address(buffer);
        let mut header = [0; HEADER];
        self.memory
            .read_slice(&mut header, GuestAddress(address))
            .unwrap();
        let packet = Packet::read(&header);
        assert_eq!((packet.src_cid, packet.dst_cid), (HOST, GUEST));
        assert_eq!(packet.len, Some(len - HEADER as u32), "length field");
        let ports = (packet.dst_port, packet.src_port);
        let index = match (self.by_ports.get(&ports), packet.op) {
            (Some(&index), _) => index,
            (None, REQUEST) => self.insert(ports),
            (None, RST) => return false,
            (None, _) => {
                self.outbox.push_back(packet.reply(RST));
                return false;
            }
        };
        let socket = self.sockets[index as usize].as_mut().unwrap();
        socket.host_window = packet.buf_alloc;
        socket.host_forwarded = packet.fwd_cnt;
        let mut keep = false;
        let mut answer = None;
        match packet.op {
            REQUEST => {
                assert!(!socket.established, "a second request");
                socket.established = true;
                answer = Some(RESPONSE);
            }
            RESPONSE => socket.established = true,
            RST => {
                socket.reset = true;
                self.by_ports.remove(&ports);
            }
            SHUTDOWN => socket.host_ends |= packet.flags,
            RW => {
                let data = len - HEADER as u32;
                assert!(socket.host_ends & 2 == 0, "data after its end");
                socket.bytes += data;
                assert!(socket.bytes <= self.profile.window, "more than was granted");
                keep = data > 0;
                if keep {
                    socket.received.push_back(Piece {
                        buffer,
                        start: HEADER as u32,
                        end: len,
                    });
                }
            }
            _ => {}
        }
        self.note(index);
        if let Some(op) = answer {
            self.control(SocketId(index), op, 0);
        }
        keep
    }

    fn insert(&mut self, ports: (u32, u32)) -> u32 {
        let index = self.free_sockets.pop().unwrap_or_else(|| {
            self.sockets.push(None);
            self.sockets.len() as u32 - 1
        });
        self.sockets[index as usize] = Some(Socket {
            guest_port: ports.0,
            host_port: ports.1,
            ..Socket::default()
        });
        self.by_ports.insert(ports, index);
        index
    }

    fn note(&mut self, index: u32) {
        if let Some(socket) = &mut self.sockets[index as usize]
            && !std::mem::replace(&mut socket.noted, true)
        {
            self.events.push_back(index);
        }
    }

    /// Returns a socket with an event since it was returned last: it can be read or
    /// written, or has ended.
    pub fn next_event(&mut self) -> Option<SocketId> {
        while let Some(index) = self.events.pop_front() {
            if let Some(socket) = &mut self.sockets[index as usize] {
                socket.noted = false;
                return Some(SocketId(index));
            }
        }
        None
    }

    /// Makes [`Self::next_event`] return the socket again once the transmit queue has room,
    /// or at its next event.
    pub fn retry(&mut self, id: SocketId) {
        self.waiting.push(id.0);
    }

    fn socket(&self, id: SocketId) -> &Socket {
        self.sockets[id.index()].as_ref().unwrap()
    }

    fn socket_mut(&mut self, id: SocketId) -> &mut Socket {
        self.sockets[id.index()].as_mut().unwrap()
    }

    /// Requests a connection to a port of the host.
    ///
    /// # Panics
    /// If that connection exists.
    pub fn connect(&mut self, guest_port: u32, host_port: u32) -> SocketId {
        assert!(!self.by_ports.contains_key(&(guest_port, host_port)));
        let id = SocketId(self.insert((guest_port, host_port)));
        self.control(id, REQUEST, 0);
        id
    }

    /// Returns the ports of a socket: the guest's and the host's.
    #[must_use]
    pub fn ports(&self, id: SocketId) -> (u32, u32) {
        let socket = self.socket(id);
        (socket.guest_port, socket.host_port)
    }

    /// Returns true if both sides have accepted.
    #[must_use]
    pub fn is_established(&self, id: SocketId) -> bool {
        self.socket(id).established
    }

    /// Returns true if the host has reset the connection.
    #[must_use]
    pub fn is_reset(&self, id: SocketId) -> bool {
        self.socket(id).reset
    }

    /// Returns the number of bytes that can be read now.
    #[must_use]
    pub fn readable(&self, id: SocketId) -> usize {
        self.socket(id).bytes as usize
    }

    /// Returns true if the host will send no more, and all data were read.
    #[must_use]
    pub fn is_at_end(&self, id: SocketId) -> bool {
        let socket = self.socket(id);
        socket.bytes == 0 && (socket.reset || socket.host_ends & 2 != 0)
    }

    /// Returns true if the host accepts no more data.
    #[must_use]
    pub fn is_refused(&self, id: SocketId) -> bool {
        let socket = self.socket(id);
        socket.reset || socket.host_ends & 1 != 0
    }

    /// Returns the number of bytes that may be sent now.
    #[must_use]
    pub fn credit(&self, id: SocketId) -> usize {
        let socket = self.socket(id);
        if !socket.established || self.is_refused(id) || socket.guest_ends & 2 != 0 {
            return 0;
        }
        let way = socket.sent.wrapping_sub(socket.host_forwarded);
        socket.host_window.saturating_sub(way) as usize
    }

    /// Reads received data, as far as there is room; returns the number of bytes.
    ///
    /// # Panics
    /// If the socket does not exist.
    pub fn read(&mut self, id: SocketId, room: &mut [u8]) -> usize {
        let mut done = 0;
        while done < room.len()
            && let Some(piece) = self.socket(id).received.front().copied()
        {
            let len = (room.len() - done).min((piece.end - piece.start) as usize);
            let from = self.buffer_address(piece.buffer) + u64::from(piece.start);
            self.memory
                .read_slice(&mut room[done..done + len], GuestAddress(from))
                .unwrap();
            done += len;
            let socket = self.socket_mut(id);
            if piece.start + len as u32 == piece.end {
                socket.received.pop_front();
                self.free_buffers.push(piece.buffer);
            } else {
                socket.received[0].start += len as u32;
            }
        }
        let window = self.profile.window;
        let socket = self.socket_mut(id);
        socket.bytes -= done as u32;
        socket.forwarded = socket.forwarded.wrapping_add(done as u32);
        let unadvertised = socket.forwarded.wrapping_sub(socket.announced);
        let free = window - unadvertised.min(window);
        if unadvertised > 0 && !socket.reset && (free < PACKET as u32 || socket.bytes == 0) {
            self.control(id, CREDIT_UPDATE, 0);
        }
        done
    }

    /// Sends as much of `data` as one packet, credit and the queue allow; returns the
    /// number of bytes.
    ///
    /// # Panics
    /// If the socket does not exist.
    pub fn write(&mut self, id: SocketId, data: &[u8]) -> usize {
        let len = self.credit(id).min(data.len()).min(PACKET);
        if len == 0 || !self.packet(id, RW, 0, &data[..len]) {
            return 0;
        }
        let socket = self.socket_mut(id);
        socket.sent = socket.sent.wrapping_add(len as u32);
        len
    }

    /// Sends any packet of a socket, including data without credit; returns false if the
    /// queue is full.
    pub fn packet(&mut self, id: SocketId, op: u16, flags: u32, data: &[u8]) -> bool {
        let packet = self.prepare(id, op, flags);
        // In order.
        let sent = self.outbox.is_empty() && self.transmit(&packet, data);
        if sent {
            self.socket_mut(id).announced = packet.fwd_cnt;
        }
        sent
    }

    fn prepare(&self, id: SocketId, op: u16, flags: u32) -> Packet {
        let socket = self.socket(id);
        let mut packet = Packet::from_guest(socket.guest_port, socket.host_port, op);
        packet.flags = flags;
        packet.buf_alloc = self.profile.window;
        packet.fwd_cnt = socket.forwarded;
        packet
    }

    /// Sends a packet without data, as soon as there is room.
    fn control(&mut self, id: SocketId, op: u16, flags: u32) {
        if !self.packet(id, op, flags, &[]) {
            let packet = self.prepare(id, op, flags);
            self.socket_mut(id).announced = packet.fwd_cnt;
            self.outbox.push_back(packet);
        }
    }

    /// Ends the guest's side: 1 reads no more, 2 writes no more, 3 is closed.
    pub fn shut_down(&mut self, id: SocketId, flags: u32) {
        let socket = self.socket_mut(id);
        socket.guest_ends |= flags;
        let all = socket.guest_ends;
        if !socket.reset {
            self.control(id, SHUTDOWN, all);
        }
    }

    /// Removes a socket; the host gets a reset unless it has sent one.
    ///
    /// # Panics
    /// If it does not exist.
    pub fn remove(&mut self, id: SocketId) {
        if !self.socket(id).reset {
            self.control(id, RST, 0);
        }
        let socket = self.sockets[id.index()].take().unwrap();
        self.free_buffers
            .extend(socket.received.iter().map(|piece| piece.buffer));
        let ports = (socket.guest_port, socket.host_port);
        if self.by_ports.get(&ports) == Some(&id.0) {
            self.by_ports.remove(&ports);
        }
        self.free_sockets.push(id.0);
    }

    /// Adds a packet to the queue; returns false if that is full.
    fn transmit(&mut self, packet: &Packet, data: &[u8]) -> bool {
        let Some(slot) = self.free_slots.pop() else {
            return false;
        };
        let address = SEND_BASE + u64::from(slot) * SEND_LEN;
        let header = packet.header(data.len() as u32);
        self.memory
            .write_slice(&header, GuestAddress(address))
            .unwrap();
        let head = Span {
            address: GuestAddress(address),
            len: HEADER as u32,
        };
        let body = Span {
            address: GuestAddress(address + 4096),
            len: data.len() as u32,
        };
        self.memory.write_slice(data, body.address).unwrap();
        let spans = [head, body];
        let spans = if data.is_empty() { &spans[..1] } else { &spans };
        let head = self.tx.offer(spans, &[]).unwrap();
        self.sending[usize::from(head)] = slot;
        true
    }
}
