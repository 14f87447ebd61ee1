//! The device against a model of the guest's driver: own queues in memory, no VM.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use sm_devices_vsock::{ConnectError, ConnectOptions, MuxerHandle, Vsock, VsockConfig};
use sm_vmm_core::GuestMemory;
use sm_vmm_core::event_loop::EventLoop;
use sm_vmm_core::virtio::queue::Span;
use sm_vmm_core::virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

const HEADER: usize = 44;
const RX_BUFFER: u64 = 4096;
const RX_BASE: u64 = 0x10_0000;
const TX_BASE: u64 = 0x20_0000;
const EVENT_BASE: u64 = 0x30_0000;
const GUEST: u64 = 3;
const HOST: u64 = 2;
const PORT: u32 = 7;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

/// A packet as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    /// What the header says, when that is not the payload's length.
    len: Option<u32>,
    payload: Vec<u8>,
}

impl Packet {
    fn from_guest(src_port: u32, dst_port: u32, op: u16) -> Self {
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
    fn reply(&self, op: u16) -> Self {
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
struct Guest {
    memory: GuestMemory,
    driver: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    buffers: HashMap<u16, Span>,
    muxer: MuxerHandle,
    _event_loop: EventLoop,
}

impl Guest {
    fn new(config: VsockConfig) -> Self {
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

    fn send(&mut self, packet: &Packet) {
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

    fn receive(&mut self) -> Packet {
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

    #[track_caller]
    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// A connection that the host opened and the guest accepted.
    fn connected(&mut self) -> (UnixStream, Packet) {
        let (ours, result) = connect(&self.muxer, ConnectOptions::default());
        let request = self.expect(REQUEST);
        assert_eq!(request.dst_port, PORT);
        self.send(&request.reply(RESPONSE));
        assert_eq!(result.recv().unwrap(), Ok(()));
        (ours, request)
    }
}

fn connect(
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

#[test]
fn bytes_flow_both_ways_and_each_end_is_told() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    host.write_all(b"to the guest").unwrap();
    assert_eq!(guest.expect(RW).payload, b"to the guest");
    let mut data = request.reply(RW);
    data.payload = b"to the host".to_vec();
    guest.send(&data);
    let mut seen = [0; 11];
    host.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"to the host");

    // Half-close from the host: the tail comes first, the guest may go on.
    host.write_all(b"tail").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(RW).payload, b"tail");
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
    data.payload = b"late".to_vec();
    guest.send(&data);
    let mut end = request.reply(SHUTDOWN);
    end.flags = 2;
    guest.send(&end);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"late");
    // Both directions are done: the connection is, too.
    guest.expect(RST);
    assert_eq!(guest.muxer.stats().connections, 0);
}

#[test]
fn a_refused_connection_is_reported_and_closed() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, result) = connect(&guest.muxer, ConnectOptions::default());
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RST));
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Refused));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_preamble_goes_first_and_a_status_is_not_data() {
    let mut guest = Guest::new(VsockConfig::default());
    let options = || ConnectOptions {
        preamble: b"header".to_vec(),
        status_reply: true,
        on_result: None,
    };
    let (mut host, result) = connect(&guest.muxer, options());
    host.write_all(b"+body").unwrap();
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    let mut got = Vec::new();
    while got.len() < 11 {
        got.extend(guest.expect(RW).payload);
    }
    assert_eq!(got, b"header+body");
    let mut answer = request.reply(RW);
    answer.payload = b"\0hello".to_vec();
    guest.send(&answer);
    assert_eq!(result.recv().unwrap(), Ok(()));
    let mut seen = [0; 5];
    host.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello");

    let (mut host, result) = connect(&guest.muxer, options());
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    guest.expect(RW);
    let mut answer = request.reply(RW);
    answer.payload = vec![1];
    guest.send(&answer);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Status(1)));
    guest.expect(RST);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_guest_opens_streams_to_ports_that_are_listened_on() {
    let mut guest = Guest::new(VsockConfig::default());
    let (send, accepted) = channel();
    guest.muxer.listen(
        1030,
        Box::new(move |request| {
            assert_eq!((request.guest_port, request.host_port), (555, 1030));
            let (ours, theirs) = UnixStream::pair().unwrap();
            send.send(ours).unwrap();
            Some(OwnedFd::from(theirs))
        }),
    );
    guest.send(&Packet::from_guest(555, 1030, REQUEST));
    guest.expect(RESPONSE);
    let mut host = accepted.recv().unwrap();
    let mut data = Packet::from_guest(555, 1030, RW);
    data.payload = b"ready".to_vec();
    guest.send(&data);
    let mut seen = [0; 5];
    host.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"ready");

    guest.send(&Packet::from_guest(556, 9999, REQUEST));
    let reset = guest.expect(RST);
    assert_eq!((reset.src_port, reset.dst_port), (9999, 556));
    assert_eq!(guest.muxer.stats().refused, 1);
}

#[test]
fn the_guests_window_is_never_exceeded() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, result) = connect(&guest.muxer, ConnectOptions::default());
    let request = guest.expect(REQUEST);
    let mut response = request.reply(RESPONSE);
    response.buf_alloc = 100;
    guest.send(&response);
    result.recv().unwrap().unwrap();
    host.write_all(&[7; 250]).unwrap();
    assert_eq!(guest.expect(RW).payload.len(), 100);
    for (forwarded, more) in [(60, 60), (100, 40), (200, 50)] {
        let mut update = request.reply(CREDIT_UPDATE);
        update.buf_alloc = 100;
        update.fwd_cnt = forwarded;
        guest.send(&update);
        assert_eq!(guest.expect(RW).payload.len(), more, "after {forwarded}");
    }
}

#[test]
fn a_guest_that_overruns_our_window_loses_that_connection_only() {
    let mut guest = Guest::new(VsockConfig {
        window: 4096,
        ..VsockConfig::default()
    });
    let (other, other_request) = guest.connected();
    let (mut slow, request) = guest.connected();
    // Fill the socket of a reader that does not read, then the window.
    let mut data = request.reply(RW);
    data.payload = vec![1; 2048];
    let mut sent = 0usize;
    loop {
        guest.send(&data);
        sent += 1;
        assert!(
            sent < 10_000,
            "memory of one connection grows without bound"
        );
        if guest.muxer.stats().connections == 1 {
            break;
        }
    }
    let reset = loop {
        let packet = guest.receive();
        if packet.op == RST {
            break packet;
        }
    };
    assert_eq!(reset.src_port, request.src_port);
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).unwrap();
    assert!(rest.iter().all(|&byte| byte == 1));
    // The neighbour does not notice.
    let mut data = other_request.reply(RW);
    data.payload = b"fine".to_vec();
    guest.send(&data);
    let mut seen = [0; 4];
    (&other).read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"fine");
}

#[test]
fn nonsense_is_answered_by_a_reset_and_counted() {
    let mut guest = Guest::new(VsockConfig::default());
    let base = || Packet::from_guest(5, 6, RW);
    let wrong = [
        Packet {
            src_cid: 9,
            ..base()
        },
        Packet {
            dst_cid: 9,
            ..base()
        },
        Packet { kind: 2, ..base() },
        Packet { op: 77, ..base() },
        Packet {
            len: Some(1000),
            ..base()
        },
    ];
    for (count, packet) in wrong.iter().enumerate() {
        guest.send(packet);
        let reset = guest.expect(RST);
        assert_eq!((reset.src_port, reset.dst_port), (6, 5));
        assert_eq!(guest.muxer.stats().malformed, count as u64 + 1);
    }
    // Data for no connection is no crime, but there is nobody to take it.
    guest.send(&base());
    guest.expect(RST);
    // A reset is not answered.
    guest.send(&Packet::from_guest(5, 6, RST));
    let (_host, _request) = guest.connected();
}

#[test]
fn a_large_stream_arrives_whole_in_both_directions() {
    let mut guest = Guest::new(VsockConfig {
        window: 16 << 10,
        ..VsockConfig::default()
    });
    let (host, request) = guest.connected();
    let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n * 7 + (n >> 8)) as u8).collect();
    std::thread::scope(|scope| {
        let (mut writer, mut reader) = (&host, &host);
        let input = &bytes;
        scope.spawn(move || writer.write_all(input).unwrap());
        let read = scope.spawn(move || {
            let mut seen = vec![0; input.len()];
            reader.read_exact(&mut seen).unwrap();
            seen
        });
        let (mut got, mut sent) = (Vec::<u8>::new(), 0);
        let mut granted = request.buf_alloc as usize;
        while got.len() < bytes.len() || sent < bytes.len() {
            // Send what the device granted, in packets of odd sizes.
            while sent < bytes.len() && sent < granted {
                let len = 3001.min(granted - sent).min(bytes.len() - sent);
                let mut data = request.reply(RW);
                data.fwd_cnt = got.len() as u32;
                data.payload = bytes[sent..sent + len].to_vec();
                guest.send(&data);
                sent += len;
            }
            if got.len() == bytes.len() && sent == bytes.len() {
                break;
            }
            let packet = guest.receive();
            granted = packet.buf_alloc as usize + packet.fwd_cnt as usize;
            got.extend(&packet.payload);
            let mut update = request.reply(CREDIT_UPDATE);
            update.fwd_cnt = got.len() as u32;
            guest.send(&update);
        }
        assert_eq!(got, bytes);
        assert_eq!(read.join().unwrap(), bytes);
    });
}

#[test]
fn connections_wait_until_a_restored_guest_has_handled_the_reset() {
    let mut guest = Guest::new(VsockConfig::default());
    let (old, _request) = guest.connected();
    guest.driver.transport.quiesce().unwrap();
    let state = guest.driver.transport.save();
    guest.driver.transport.restore(&state).unwrap();
    guest.driver.transport.unquiesce();
    let (head, len) = guest.driver.wait_used(&mut guest.event);
    assert_eq!(len, 4, "a transport reset event");
    // The old stream is gone on our side.
    old.set_nonblocking(true).unwrap();
    assert!(!matches!((&old).read(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock));
    let (_host, result) = connect(&guest.muxer, ConnectOptions::default());
    assert!(
        guest.rx.take_used().is_none(),
        "too early: it would be reset too"
    );
    let _ = head;
    let event = Span {
        address: GuestAddress(EVENT_BASE),
        len: 8,
    };
    guest.event.offer(&[], &[event]).unwrap();
    guest.driver.notify(2);
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    assert_eq!(result.recv().unwrap(), Ok(()));
}

#[test]
fn the_limit_of_connections_is_told() {
    let mut guest = Guest::new(VsockConfig {
        max_connections: 2,
        ..VsockConfig::default()
    });
    let (_a, _) = guest.connected();
    let (_b, _) = guest.connected();
    let (_c, result) = connect(&guest.muxer, ConnectOptions::default());
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Limit));
}
