//! The device, accessed as by a driver.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use sm_devices_net::{
    GsoType, HEADER_LEN, MAX_FRAME, Net, NetBackend, NetConfig, NetCounts, NetFrame, NetHeader,
    ReceiveRing, ReserveError,
};
use sm_event_loop::{EventLoop, Readiness, Registry};
use sm_virtio::GuestMemory;
use sm_virtio::VirtioDevice;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY: usize = 16 << 20;
const BASE: u64 = 0x1_0000;
const TX_BUFFERS: u64 = 1 << 20;
const RX_BUFFERS: u64 = 8 << 20;
const MAC: [u8; 6] = [2, 0x73, 0x6d, 0, 0, 9];
/// Bits of features.
const MRG_RXBUF: u64 = 15;
const GUEST_CSUM: u64 = 1;
const NEEDS_RESET: u32 = 64;

/// The calls and frames of a backend, and frames to send.
#[derive(Default)]
struct Log {
    calls: Vec<&'static str>,
    features: u64,
    frames: Vec<(NetHeader, Vec<u8>)>,
    outgoing: VecDeque<(NetHeader, Vec<u8>)>,
    refused: Vec<ReserveError>,
    restored: Option<Vec<u8>>,
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Log>>);

impl NetBackend for Recorder {
    fn started(&mut self, features: u64, _registry: &mut dyn Registry) {
        let mut log = self.0.lock().unwrap();
        log.calls.push("started");
        log.features = features;
    }

    fn transmit(&mut self, frame: &NetFrame<'_>, _registry: &mut dyn Registry) {
        let mut bytes = vec![0; frame.bytes.len() as usize];
        assert!(frame.bytes.copy_out(frame.memory, &mut bytes));
        self.0.lock().unwrap().frames.push((frame.header, bytes));
    }

    fn receive(&mut self, ring: &mut ReceiveRing<'_>, _registry: &mut dyn Registry) {
        let mut log = self.0.lock().unwrap();
        while let Some((header, bytes)) = log.outgoing.front().cloned() {
            // More than it takes: what is not used returns to the ring.
            let reserved = u32::try_from(bytes.len()).unwrap() + 100;
            match ring.reserve(reserved) {
                Ok(buffers) => assert!(buffers.copy(&header, &bytes)),
                Err(error) => {
                    log.refused.push(error);
                    if error != ReserveError::TooLong {
                        return;
                    }
                }
            }
            log.outgoing.pop_front();
        }
    }

    fn host_ready(&mut self, _token: u64, _ready: Readiness, _registry: &mut dyn Registry) {}

    fn quiesce(&mut self, _registry: &mut dyn Registry) {
        self.0.lock().unwrap().calls.push("quiesce");
    }

    fn reset(&mut self, _registry: Option<&mut dyn Registry>) {
        self.0.lock().unwrap().calls.push("reset");
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        Ok(b"flows".to_vec())
    }

    fn check(&self, bytes: &[u8]) -> Result<(), String> {
        match bytes {
            b"" | b"flows" => Ok(()),
            _ => Err("these are no flows".to_owned()),
        }
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.0.lock().unwrap().restored = Some(bytes.to_vec());
        Ok(())
    }
}

struct Guest {
    memory: GuestMemory,
    device: Arc<Mutex<Net>>,
    driver: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    event_loop: EventLoop,
}

impl Guest {
    fn with(device: Net, features: Option<u64>) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let event_loop = EventLoop::spawn("devices").unwrap();
        let device = Arc::new(Mutex::new(device));
        let driver = Driver::new(device.clone(), &memory, event_loop.handle());
        let features = features.unwrap_or_else(|| driver.offered());
        let mut queues = driver.start_with(features, BASE, &[256, 256]);
        let tx = queues.pop().unwrap();
        let rx = queues.pop().unwrap();
        Self {
            memory,
            device,
            driver,
            rx,
            tx,
            event_loop,
        }
    }

    fn connected(features: Option<u64>) -> (Self, Recorder) {
        let recorder = Recorder::default();
        let device = Net::with_backend(NetConfig::new(MAC), Box::new(recorder.clone()));
        (Self::with(device, features), recorder)
    }

    /// Waits until the event loop has done all work so far.
    fn settle(&self) {
        // `quiesce` serves the queues in turns of its own, and then waits for the loop.
        self.driver.transport.quiesce().unwrap();
        self.driver.transport.unquiesce();
    }

    fn transmit(&mut self, header: &NetHeader, frame: &[u8]) {
        let bytes = [&encode(header)[..], frame].concat();
        self.transmit_bytes(&bytes);
        self.driver.notify(1);
        self.driver.wait_used(&mut self.tx);
    }

    fn transmit_bytes(&mut self, bytes: &[u8]) {
        // In pieces, as a driver's header and fragments are.
        let spans: Vec<Span> = (0..bytes.len())
            .step_by(4000)
            .map(|at| Span {
                address: GuestAddress(TX_BUFFERS + 2 * at as u64),
                len: u32::try_from((bytes.len() - at).min(4000)).unwrap(),
            })
            .collect();
        assert!(Window::new(&spans, 0, u32::MAX).copy_in(&self.memory, bytes));
        self.tx.offer(&spans, &[]).unwrap();
    }

    fn offer(&mut self, number: u64, len: u32) -> u16 {
        let address = GuestAddress(RX_BUFFERS + number * 0x1_0000);
        self.rx.offer(&[], &[Span { address, len }]).unwrap()
    }

    fn received(&self, number: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let address = GuestAddress(RX_BUFFERS + number * 0x1_0000);
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }

    fn counts(&self) -> NetCounts {
        self.device.lock().unwrap().counters().read()
    }

    fn link_up(&self) -> bool {
        let mut status = [0xff; 2];
        self.driver.config(6, &mut status);
        u16::from_le_bytes(status) == 1
    }
}

/// The bytes of a header as a driver writes them.
fn encode(header: &NetHeader) -> [u8; HEADER_LEN as usize] {
    let mut bytes = [0; HEADER_LEN as usize];
    bytes[0] = header.needs_csum.into();
    bytes[1] = match header.gso {
        GsoType::TcpV4 => 1,
        _ => 0,
    };
    bytes[2..4].copy_from_slice(&header.hdr_len.to_le_bytes());
    bytes[4..6].copy_from_slice(&header.gso_size.to_le_bytes());
    bytes[6..8].copy_from_slice(&header.csum_start.to_le_bytes());
    bytes[8..10].copy_from_slice(&header.csum_offset.to_le_bytes());
    bytes
}

fn segments() -> NetHeader {
    NetHeader {
        needs_csum: true,
        gso: GsoType::TcpV4,
        hdr_len: 54,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

#[test]
fn a_device_without_a_backend_has_no_link_and_discards_frames() {
    let mut guest = Guest::with(Net::new(NetConfig::new(MAC).mtu(65_535)), None);
    let mut config = [0; 12];
    guest.driver.config(0, &mut config);
    assert_eq!(&config[..6], MAC);
    assert_eq!(config[6..8], [0, 0]);
    assert_eq!(config[10..], [255, 255]);
    guest.offer(0, 2048);
    for _ in 0..3 {
        guest.transmit(&NetHeader::default(), b"lost");
    }
    guest.settle();
    let counts = guest.counts();
    assert_eq!((counts.dropped, counts.transmitted), (3, 0));
    // The receive buffer is the guest's.
    assert_eq!(guest.rx.take_used(), None);
    assert_eq!(guest.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn a_frame_and_its_header_reach_the_backend() {
    let (mut guest, recorder) = Guest::connected(None);
    assert!(guest.link_up());
    let frame = pattern(60_000);
    guest.transmit(&segments(), &frame);
    guest.transmit(&NetHeader::default(), b"");
    let log = recorder.0.lock().unwrap();
    assert_eq!(log.calls, ["started"]);
    let sent = [(segments(), frame), (NetHeader::default(), Vec::new())];
    assert_eq!(log.frames, sent);
    drop(log);
    let counts = guest.counts();
    assert_eq!((counts.transmitted, counts.transmitted_bytes), (2, 60_000));
}

#[test]
fn malformed_frames_are_discarded() {
    let (mut guest, recorder) = Guest::connected(None);
    guest.transmit_bytes(&[0; 11]);
    guest.transmit_bytes(&vec![0; (HEADER_LEN + MAX_FRAME + 1) as usize]);
    guest.transmit(&NetHeader::default(), b"fine");
    guest.settle();
    assert_eq!(recorder.0.lock().unwrap().frames.len(), 1);
    assert_eq!(guest.counts().malformed, 2);
    assert_eq!(guest.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn more_frames_than_a_turn_takes_all_arrive() {
    let (mut guest, recorder) = Guest::connected(None);
    for _ in 0..200 {
        guest.transmit_bytes(&[0; 13]);
    }
    guest.driver.notify(1);
    for _ in 0..200 {
        guest.driver.wait_used(&mut guest.tx);
    }
    assert_eq!(recorder.0.lock().unwrap().frames.len(), 200);
}

#[test]
fn a_frame_is_merged_from_several_buffers() {
    let (mut guest, recorder) = Guest::connected(None);
    let frame = pattern(3000);
    let mut log = recorder.0.lock().unwrap();
    log.outgoing.push_back((segments(), frame.clone()));
    log.outgoing
        .push_back((NetHeader::default(), b"next".to_vec()));
    drop(log);
    // Two are too few.
    let heads: Vec<u16> = (0..2).map(|n| guest.offer(n, 1524)).collect();
    guest.driver.notify(0);
    guest.settle();
    assert_eq!(guest.rx.take_used(), None);
    assert!(
        recorder
            .0
            .lock()
            .unwrap()
            .refused
            .iter()
            .all(|&error| error == ReserveError::NoBuffers)
    );
    let third = guest.offer(2, 1524);
    let fourth = guest.offer(3, 1524);
    guest.driver.notify(0);
    // The frame and its header take two buffers; the third was reserved and not needed.
    assert_eq!(guest.driver.wait_used(&mut guest.rx), (heads[0], 1524));
    assert_eq!(guest.driver.wait_used(&mut guest.rx), (heads[1], 1488));
    assert_eq!(guest.driver.wait_used(&mut guest.rx), (third, 16));
    assert_eq!(guest.rx.take_used(), None);
    let first = guest.received(0, 1524);
    let mut header = encode(&segments());
    header[10] = 2;
    assert_eq!(first[..12], header);
    let received = [&first[12..], &guest.received(1, 1488)].concat();
    assert_eq!(received, frame);
    assert_eq!(guest.received(2, 16)[12..], *b"next");
    let counts = guest.counts();
    assert_eq!((counts.received, counts.received_bytes), (2, 3004));
    // The fourth is still there.
    let mut log = recorder.0.lock().unwrap();
    log.outgoing
        .push_back((NetHeader::default(), b"last".to_vec()));
    drop(log);
    guest.settle();
    assert_eq!(guest.driver.wait_used(&mut guest.rx), (fourth, 16));
}

#[test]
fn without_merging_a_frame_is_in_one_buffer_or_discarded() {
    let (mut guest, recorder) = Guest::connected(Some(1 << GUEST_CSUM));
    let mut log = recorder.0.lock().unwrap();
    log.outgoing
        .push_back((NetHeader::default(), pattern(2000)));
    log.outgoing
        .push_back((NetHeader::default(), b"short".to_vec()));
    drop(log);
    let first = guest.offer(0, 1526);
    guest.offer(1, 1526);
    guest.driver.notify(0);
    assert_eq!(guest.driver.wait_used(&mut guest.rx), (first, 17));
    assert_eq!(recorder.0.lock().unwrap().refused, [ReserveError::TooLong]);
    assert_eq!(guest.received(0, 17)[10..], *b"\x01\0short");
}

#[test]
fn a_frame_that_the_whole_ring_cannot_hold_is_discarded() {
    let (mut guest, recorder) = Guest::connected(None);
    let mut log = recorder.0.lock().unwrap();
    log.outgoing
        .push_back((NetHeader::default(), pattern(60_000)));
    drop(log);
    for number in 0..64 {
        for part in 0..4u64 {
            let address = GuestAddress(RX_BUFFERS + number * 0x1_0000 + part * 64);
            guest.rx.offer(&[], &[Span { address, len: 64 }]).unwrap();
        }
    }
    guest.driver.notify(0);
    guest.settle();
    let log = recorder.0.lock().unwrap();
    assert!(
        log.refused.contains(&ReserveError::TooLong),
        "{:?}",
        log.refused
    );
    assert!(log.outgoing.is_empty());
}

#[test]
fn a_receive_buffer_without_room_for_a_header_breaks_the_ring() {
    let (mut guest, recorder) = Guest::connected(None);
    let mut log = recorder.0.lock().unwrap();
    log.outgoing
        .push_back((NetHeader::default(), b"frame".to_vec()));
    drop(log);
    guest.offer(0, 11);
    guest.driver.notify(0);
    guest.settle();
    assert_ne!(guest.driver.status() & NEEDS_RESET, 0);
    assert_eq!(recorder.0.lock().unwrap().refused, [ReserveError::Broken]);
    // After a reset it works again.
    guest.driver.reset();
    let mut queues = guest.driver.start(BASE, &[256, 256]);
    guest.rx = queues.remove(0);
    let head = guest.offer(0, 2048);
    guest.driver.notify(0);
    assert_eq!(guest.driver.wait_used(&mut guest.rx).0, head);
}

#[test]
fn segments_need_checksums() {
    let tso = 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
    let (mut guest, recorder) = Guest::connected(Some(tso | 1 << MRG_RXBUF));
    let features = || recorder.0.lock().unwrap().features;
    // The backend has started when it has taken a frame.
    guest.transmit(&NetHeader::default(), b"frame");
    assert_eq!(features() & tso, 0);
    assert_ne!(features() & 1 << MRG_RXBUF, 0);
}

/// A driver of a device of which `saved` is the state, with the queues of the saved one.
fn restored(guest: &Guest, device: Net) -> (Driver, Arc<Mutex<Net>>) {
    guest.driver.transport.quiesce().unwrap();
    let state = guest.driver.transport.save().unwrap();
    let device = Arc::new(Mutex::new(device));
    let driver = Driver::new(device.clone(), &guest.memory, guest.event_loop.handle());
    driver.transport.restore(&state).unwrap();
    driver.transport.quiesce().unwrap();
    driver.transport.unquiesce();
    (driver, device)
}

#[test]
fn a_clone_with_a_network_is_notified_of_its_link() {
    let guest = Guest::with(Net::new(NetConfig::new(MAC)), None);
    let recorder = Recorder::default();
    let connected = Net::with_backend(NetConfig::new(MAC), Box::new(recorder.clone()));
    let (driver, device) = restored(&guest, connected);
    driver.line.wait_for_pulse_after(0);
    assert_eq!(driver.acknowledge() & 2, 2, "no change of configuration");
    assert_eq!(
        recorder.0.lock().unwrap().restored.as_deref(),
        Some(&b""[..])
    );

    // A clone of that one without a network is notified, too, and one with a network is not.
    let guest = Guest {
        driver,
        device,
        ..guest
    };
    let (down, _) = restored(&guest, Net::new(NetConfig::new(MAC)));
    down.line.wait_for_pulse_after(0);
    assert_eq!(down.acknowledge() & 2, 2);
    let again = Recorder::default();
    let connected = Net::with_backend(NetConfig::new(MAC), Box::new(again.clone()));
    let (same, _) = restored(&guest, connected);
    same.transport.quiesce().unwrap();
    assert_eq!(same.line.pulses(), 0);
    let log = again.0.lock().unwrap();
    assert_eq!(log.restored.as_deref(), Some(&b"flows"[..]));
    assert!(log.calls.contains(&"started"));
}

#[test]
fn state_that_the_backend_refuses_is_refused() {
    let mut payload = Net::new(NetConfig::new(MAC)).save().unwrap();
    payload.bytes.extend(b"other");
    let device = Net::with_backend(NetConfig::new(MAC), Box::new(Recorder::default()));
    assert!(device.check(&payload).is_err());
    // Without a backend there is nothing that could use them.
    assert!(Net::new(NetConfig::new(MAC)).check(&payload).is_ok());
}
