//! The engine as the backend of a device, with a model of a driver as its guest.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sm_devices_net::engine::{
    EgressRequest, EgressVerdict, EngineBackend, EngineConfig, NetEngine,
};
use sm_devices_net::wire::{
    EtherType, EthernetHeader, Head, IpPacket, IpProtocol, MacAddress, SynOptions, TcpFlags,
    TcpSegment,
};
use sm_devices_net::{HEADER_LEN, Net, NetConfig, NetHeader};
use sm_event_loop::EventLoop;
use sm_virtio::GuestMemory;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

const BASE: u64 = 0x1_0000;
const TX_BUFFER: u64 = 1 << 20;
const RX_BUFFERS: u64 = 8 << 20;
const RX_LEN: u32 = 4096;
const MAC: [u8; 6] = [2, 0x73, 0x6d, 0, 0, 9];
const GUEST: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 2);
/// Any address: the policy replaces it by that of this host.
const REMOTE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const PORT: u16 = 40_000;

fn device() -> Net {
    let local = |request: &EgressRequest| {
        EgressVerdict::Connect((Ipv4Addr::LOCALHOST, request.destination.port()).into())
    };
    let engine = NetEngine::new(EngineConfig::default(), Box::new(local));
    Net::with_backend(NetConfig::new(MAC), Box::new(EngineBackend::new(engine)))
}

struct Guest {
    memory: GuestMemory,
    driver: Driver,
    rx: DriverQueue,
    tx: DriverQueue,
    event_loop: EventLoop,
    /// Numbers of the connection.
    next: u32,
    expected: u32,
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let event_loop = EventLoop::spawn("devices").unwrap();
        let driver = Driver::new(Arc::new(Mutex::new(device())), &memory, event_loop.handle());
        let mut queues = driver.start_with(driver.offered(), BASE, &[256, 256]);
        let tx = queues.pop().unwrap();
        let rx = queues.pop().unwrap();
        let mut guest = Self {
            memory,
            driver,
            rx,
            tx,
            event_loop,
            next: 1000,
            expected: 0,
        };
        for number in 0..64 {
            guest.offer(number);
        }
        guest.driver.notify(0);
        guest
    }

    /// Offers a receive buffer. Its number is that of its descriptor.
    fn offer(&mut self, number: u16) {
        let address = GuestAddress(RX_BUFFERS + u64::from(number) * u64::from(RX_LEN));
        let head = self.rx.offer(
            &[],
            &[Span {
                address,
                len: RX_LEN,
            }],
        );
        assert_eq!(head, Some(number));
    }

    fn send(&mut self, flags: TcpFlags, payload: &[u8], to: u16) {
        let mut segment = TcpSegment::new(PORT, to, flags);
        (segment.sequence, segment.acknowledgment) = (self.next, self.expected);
        segment.window = 512;
        if flags.has(TcpFlags::SYN) {
            segment.options = SynOptions {
                mss: Some(1460),
                scale: Some(8),
            };
        }
        segment.payload = payload.len();
        let mut head = Head::new();
        head.extend(&NetHeader::default().encode(0));
        head.push(&EthernetHeader {
            destination: MacAddress([2, 0, 0, 0, 0, 1]),
            source: MacAddress(MAC),
            ether_type: EtherType::IPV4,
        });
        let (a, b): (IpAddr, IpAddr) = (GUEST.into(), REMOTE.into());
        head.push_ip(
            a,
            b,
            IpProtocol::TCP,
            segment.built_len() + payload.len(),
            None,
        );
        head.push_tcp(a, b, &segment);
        let bytes = [head.bytes(), payload].concat();
        let address = GuestAddress(TX_BUFFER);
        self.memory.write_slice(&bytes, address).unwrap();
        // In three pieces, as headers and fragments are.
        let len = u32::try_from(bytes.len()).unwrap();
        let at = |from: u32, to: u32| Span {
            address: GuestAddress(TX_BUFFER + u64::from(from)),
            len: to - from,
        };
        let spans = [at(0, HEADER_LEN), at(HEADER_LEN, 50), at(50, len)];
        self.tx.offer(&spans, &[]).unwrap();
        self.driver.notify(1);
        self.driver.wait_used(&mut self.tx);
        self.next = self.next.wrapping_add(segment.sequence_len());
    }

    /// Waits for a segment, which may be in several buffers.
    fn receive(&mut self) -> (TcpSegment, Vec<u8>) {
        let mut bytes = Vec::new();
        let mut buffers = 1;
        while buffers > 0 {
            let (head, len) = self.driver.wait_used(&mut self.rx);
            let mut part = vec![0; len as usize];
            let address = RX_BUFFERS + u64::from(head) * u64::from(RX_LEN);
            self.memory
                .read_slice(&mut part, GuestAddress(address))
                .unwrap();
            if bytes.is_empty() {
                buffers = u16::from_le_bytes([part[10], part[11]]);
            }
            bytes.extend(part);
            buffers -= 1;
            self.offer(head);
        }
        self.driver.notify(0);
        let frame = &bytes[HEADER_LEN as usize..];
        let (ethernet, _) = EthernetHeader::parse(frame).unwrap();
        assert_eq!(ethernet.destination, MacAddress(MAC));
        let packet = IpPacket::parse(EtherType::IPV4, frame, frame.len());
        let packet = packet.unwrap().unwrap();
        assert_eq!(packet.source, REMOTE);
        let segment = TcpSegment::parse(&frame[packet.offset..], packet.len).unwrap();
        self.expected = segment.sequence.wrapping_add(segment.sequence_len());
        let payload = frame[packet.offset + segment.header_len..].to_vec();
        assert_eq!(payload.len(), segment.payload);
        (segment, payload)
    }

    /// Connects to a listener.
    fn connect(&mut self, port: u16) {
        self.send(TcpFlags::SYN, &[], port);
        let (answer, _) = self.receive();
        assert_eq!(answer.flags, TcpFlags::SYN.and(TcpFlags::ACK));
        assert_eq!(answer.acknowledgment, self.next);
        self.send(TcpFlags::ACK, &[], port);
    }
}

#[test]
fn a_connection_passes_the_rings() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new();
    guest.connect(port);
    let (mut peer, _) = listener.accept().unwrap();
    guest.send(TcpFlags::ACK, b"hello", port);
    let mut word = [0; 5];
    peer.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello");
    let (acknowledgment, _) = guest.receive();
    assert_eq!(acknowledgment.acknowledgment, guest.next);

    // More than a packet, in one frame of several buffers if it is read at once.
    let sent: Vec<u8> = (0..=250).cycle().take(20_000).collect();
    peer.write_all(&sent).unwrap();
    let mut received = Vec::new();
    while received.len() < sent.len() {
        received.extend(guest.receive().1);
    }
    assert!(received == sent);
    guest.send(TcpFlags::ACK.and(TcpFlags::FIN), &[], port);
    assert_eq!(peer.read(&mut word).unwrap(), 0);
    drop(peer);
    let end = loop {
        let (segment, _) = guest.receive();
        if segment.flags.has(TcpFlags::FIN) {
            break segment;
        }
    };
    assert_eq!(end.acknowledgment, guest.next);
}

#[test]
fn connections_of_a_clone_are_reset_and_those_of_the_original_go_on() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new();
    guest.connect(port);
    let (mut peer, _) = listener.accept().unwrap();
    let timeout = Some(Duration::from_secs(20));
    peer.set_read_timeout(timeout).unwrap();
    guest.send(TcpFlags::ACK, b"hello", port);
    let _ = guest.receive();
    let expected = guest.expected;

    guest.driver.transport.quiesce().unwrap();
    let state = guest.driver.transport.save().unwrap();
    // The clone has a copy of the memory.
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
    let mut bytes = vec![0; 16 << 20];
    guest
        .memory
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    guest.driver.transport.unquiesce();
    // The original goes on.
    guest.send(TcpFlags::ACK, b"again", port);
    let mut words = [0; 10];
    peer.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"helloagain");

    let other = Driver::new(
        Arc::new(Mutex::new(device())),
        &memory,
        guest.event_loop.handle(),
    );
    other.transport.restore(&state).unwrap();
    other.transport.quiesce().unwrap();
    other.transport.unquiesce();
    // The reset is in one of the buffers that the guest had offered.
    let found = (0..64u64).find_map(|number| {
        let mut frame = [0; 66];
        let address = GuestAddress(RX_BUFFERS + number * u64::from(RX_LEN));
        memory.read_slice(&mut frame, address).unwrap();
        let frame = &frame[HEADER_LEN as usize..];
        let packet = IpPacket::parse(EtherType::IPV4, frame, frame.len()).ok()??;
        let segment = TcpSegment::parse(&frame[packet.offset..], packet.len).ok()?;
        segment.flags.has(TcpFlags::RST).then_some(segment)
    });
    let reset = found.expect("a reset");
    assert_eq!(reset.sequence, expected);
    assert_eq!((reset.source, reset.destination), (port, PORT));
}
