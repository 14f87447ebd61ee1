//! Packets of established flows allocate nothing.
#![expect(unsafe_code, reason = "an allocator counts")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};

use sm_devices_net::NetHeader;
use sm_devices_net::engine::{
    EgressRequest, EgressVerdict, EngineConfig, GuestLink, LinkFull, LinkOffloads, NetEngine,
};
use sm_devices_net::wire::{
    EtherType, EthernetHeader, Fragment, HEAD, Head, IcmpEcho, IpPacket, IpProtocol, MacAddress,
    SynOptions, TcpFlags, TcpSegment, UdpHeader,
};
use sm_event_loop::testing::ManualLoop;
use sm_event_loop::{EventHandler, Readiness, Registry};

thread_local! {
    static COUNTED: Cell<Option<u64>> = const { Cell::new(None) };
}

struct Counting;

fn count() {
    let _ = COUNTED.try_with(|counted| counted.set(counted.get().map(|count| count + 1)));
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all calls go to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

const GUEST: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 1);
const GUEST_MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 9]);
const PORT: u16 = 40_000;

/// The last segment for the guest, and totals.
#[derive(Default)]
struct Inbox {
    segment: Option<TcpSegment>,
    payload: u64,
    datagrams: u64,
    echoes: u64,
}

impl GuestLink for Inbox {
    fn offloads(&self) -> LinkOffloads {
        LinkOffloads::ALL
    }

    fn transmit(&mut self, _header: &NetHeader, frame: &[IoSlice<'_>]) -> Result<(), LinkFull> {
        let len = frame.iter().map(|part| part.len()).sum();
        let mut head = [0; HEAD];
        let mut end = 0;
        for part in frame {
            let now = part.len().min(HEAD - end);
            head[end..end + now].copy_from_slice(&part[..now]);
            end += now;
        }
        let packet = IpPacket::parse(EtherType::IPV4, &head[..end], len).unwrap();
        let packet = packet.unwrap();
        let transport = &head[packet.offset.min(end)..end];
        match packet.protocol {
            IpProtocol::TCP => {
                let segment = TcpSegment::parse(transport, packet.len).unwrap();
                self.payload += segment.payload as u64;
                self.segment = Some(segment);
            }
            IpProtocol::UDP => self.datagrams += 1,
            _ => self.echoes += 1,
        }
        Ok(())
    }
}

struct Gateway {
    engine: NetEngine,
    inbox: Inbox,
    /// Allocations inside the engine.
    allocations: u64,
}

impl Gateway {
    fn counted(
        &mut self,
        registry: &mut dyn Registry,
        call: impl FnOnce(&mut NetEngine, &mut dyn Registry),
    ) {
        COUNTED.set(Some(0));
        call(&mut self.engine, registry);
        self.engine.serve(&mut self.inbox, registry);
        self.allocations += COUNTED.take().unwrap();
    }
}

impl EventHandler for Gateway {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        self.counted(registry, |engine, registry| {
            engine.host_ready(token, readiness, registry)
        });
    }
}

struct Guest {
    event_loop: ManualLoop,
    id: sm_event_loop::HandlerId,
    gateway: Arc<Mutex<Gateway>>,
    /// Numbers of the connection.
    next: u32,
    expected: u32,
}

impl Guest {
    fn send(&mut self, protocol: IpProtocol, fragment: Option<Fragment>, transport: &[u8]) {
        let mut head = Head::new();
        head.push(&EthernetHeader {
            destination: MacAddress([2, 0, 0, 0, 0, 1]),
            source: GUEST_MAC,
            ether_type: EtherType::IPV4,
        });
        let ends: [IpAddr; 2] = [GUEST.into(), GATEWAY.into()];
        head.push_ip(ends[0], ends[1], protocol, transport.len(), fragment);
        let frame = [head.bytes(), transport].concat();
        let gateway = Arc::clone(&self.gateway);
        self.event_loop.with(self.id, |registry| {
            let mut gateway = gateway.lock().unwrap();
            gateway.counted(registry, |engine, registry| {
                engine.guest_frame(&frame.as_slice(), registry);
            });
        });
        self.event_loop.settle();
    }

    fn segment(&mut self, to: u16, flags: TcpFlags, payload: &[u8]) {
        let mut segment = TcpSegment::new(PORT, to, flags);
        segment.sequence = self.next;
        segment.acknowledgment = self.expected;
        segment.window = 512;
        if flags.has(TcpFlags::SYN) {
            segment.options = SynOptions {
                mss: Some(1460),
                scale: Some(8),
            };
        }
        segment.payload = payload.len();
        let mut head = Head::new();
        head.push_tcp(GUEST.into(), GATEWAY.into(), &segment);
        self.send(IpProtocol::TCP, None, &[head.bytes(), payload].concat());
        self.next = self.next.wrapping_add(segment.sequence_len());
        let received = self.gateway.lock().unwrap().inbox.segment;
        if let Some(received) = received {
            self.expected = received.sequence.wrapping_add(received.sequence_len());
        }
    }

    fn datagram(&mut self, to: u16, payload: &[u8], fragments: bool) {
        let udp = UdpHeader::new((GUEST.into(), PORT), (GATEWAY.into(), to), payload.len());
        let mut head = Head::new();
        head.push(&udp);
        let whole = [head.bytes(), payload].concat();
        if !fragments {
            return self.send(IpProtocol::UDP, None, &whole);
        }
        for (index, part) in whole.chunks(1024).enumerate() {
            let fragment = Fragment {
                id: 7,
                offset: u16::try_from(index * 1024).unwrap(),
                more: (index + 1) * 1024 < whole.len(),
            };
            self.send(IpProtocol::UDP, Some(fragment), part);
        }
    }

    fn echo(&mut self) {
        let payload = [7; 500];
        let header = [8, 0, 0, 0, 0, 1, 0, 2];
        assert_eq!(header.len(), IcmpEcho::LEN);
        self.send(IpProtocol::ICMP, None, &[&header[..], &payload].concat());
    }
}

#[test]
fn packets_of_established_flows_allocate_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = listener.local_addr().unwrap().port();
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let udp = peer.local_addr().unwrap().port();
    let local = |request: &EgressRequest| {
        EgressVerdict::Connect((Ipv4Addr::LOCALHOST, request.destination.port()).into())
    };
    let gateway = Arc::new(Mutex::new(Gateway {
        engine: NetEngine::new(EngineConfig::default(), Box::new(local)),
        inbox: Inbox::default(),
        allocations: 0,
    }));
    let mut event_loop = ManualLoop::new();
    let id = event_loop.add_handler(gateway.clone()).unwrap();
    let mut guest = Guest {
        event_loop,
        id,
        gateway: gateway.clone(),
        next: 1000,
        expected: 0,
    };
    guest.segment(tcp, TcpFlags::SYN, &[]);
    guest.next = 1001;
    let (mut socket, _) = listener.accept().unwrap();
    guest.event_loop.settle();
    let answer = gateway.lock().unwrap().inbox.segment.unwrap();
    assert!(answer.flags.has(TcpFlags::SYN.and(TcpFlags::ACK)));
    guest.expected = answer.sequence.wrapping_add(1);
    guest.segment(tcp, TcpFlags::ACK, &[]);

    let payload = [5; 1460];
    let mut buffer = vec![0; 200_000];
    let mut round = |guest: &mut Guest, number: usize| {
        // To the host and back, in sizes from a byte to many segments.
        guest.segment(tcp, TcpFlags::ACK, &payload);
        socket.read_exact(&mut buffer[..payload.len()]).unwrap();
        let len = [1, 1460, 60_000, 100_000][number % 4];
        socket.write_all(&buffer[..len]).unwrap();
        guest.event_loop.settle();
        guest.segment(tcp, TcpFlags::ACK, &[]);
        guest.event_loop.settle();
        guest.segment(tcp, TcpFlags::ACK, &[]);
        guest.datagram(udp, &payload[..100], false);
        let (len, from) = peer.recv_from(&mut buffer).unwrap();
        peer.send_to(&buffer[..len], from).unwrap();
        guest.datagram(udp, &[6; 9000], true);
        let (len, from) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!(len, 9000);
        peer.send_to(&buffer[..len], from).unwrap();
        guest.event_loop.settle();
        guest.echo();
    };
    for number in 0..50 {
        round(&mut guest, number);
    }
    let before = {
        let mut gateway = gateway.lock().unwrap();
        assert!(gateway.allocations > 0, "the flows themselves do");
        gateway.allocations = 0;
        gateway.engine.stats()
    };
    for number in 0..1000 {
        round(&mut guest, number);
    }
    let gateway = gateway.lock().unwrap();
    let after = gateway.engine.stats();
    assert_eq!(gateway.allocations, 0);
    assert!(after.frames_from_guest - before.frames_from_guest > 10_000);
    assert_eq!(
        after.tcp_bytes_from_guest - before.tcp_bytes_from_guest,
        1000 * 1460
    );
    assert_eq!(after.udp_from_guest - before.udp_from_guest, 2000);
    assert_eq!(after.malformed, 0);
    assert!(gateway.inbox.payload > 1000 * 40_000 && gateway.inbox.datagrams > 1000);
    assert_eq!(gateway.inbox.echoes, 1050);
}
