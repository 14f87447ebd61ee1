//! smoltcp as the guest of an engine: another TCP than Linux', without offloads, on a link that
//! is short of room and loses frames.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sm_devices_net::NetHeader;
use sm_devices_net::engine::{
    EgressRequest, EgressVerdict, EngineConfig, EngineStats, GuestLink, LinkFull, LinkOffloads,
    NetEngine,
};
use sm_event_loop::testing::ManualLoop;
use sm_event_loop::{EventHandler, HandlerId, Readiness, Registry};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

/// Frames for which the link has room in each direction.
const ROOM: usize = 16;
const REMOTE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

/// Frames on their way, and the state of a generator that loses some.
#[derive(Default)]
struct Wire {
    to_guest: VecDeque<Vec<u8>>,
    from_guest: VecDeque<Vec<u8>>,
    /// One of so many frames for the guest is lost; zero for none.
    lose_one_of: u64,
    state: u64,
}

impl Wire {
    fn loses(&mut self) -> bool {
        self.state = (self.state.wrapping_mul(6_364_136_223_846_793_005)).wrapping_add(1);
        self.lose_one_of > 0 && (self.state >> 33).is_multiple_of(self.lose_one_of)
    }
}

impl GuestLink for Wire {
    fn offloads(&self) -> LinkOffloads {
        LinkOffloads::NONE
    }

    fn transmit(&mut self, header: &NetHeader, frame: &[IoSlice<'_>]) -> Result<(), LinkFull> {
        assert_eq!(*header, NetHeader::default());
        if self.to_guest.len() >= ROOM {
            return Err(LinkFull);
        }
        let frame: Vec<u8> = frame.iter().flat_map(|part| part.iter().copied()).collect();
        assert!(frame.len() <= 1514);
        if !self.loses() {
            self.to_guest.push_back(frame);
        }
        Ok(())
    }
}

struct Received(Vec<u8>);
struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sent<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Received(frame), Sent(&mut self.from_guest)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sent<'_>> {
        (self.from_guest.len() < ROOM).then_some(Sent(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

struct Gateway {
    engine: NetEngine,
    wire: Wire,
}

impl EventHandler for Gateway {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        self.engine.host_ready(token, readiness, registry);
        self.engine.serve(&mut self.wire, registry);
    }
}

/// A guest with one connection, and its peer.
struct Guest {
    event_loop: ManualLoop,
    id: HandlerId,
    gateway: Arc<Mutex<Gateway>>,
    interface: Interface,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    now: Instant,
}

impl Guest {
    /// Connects with buffers of `buffer` bytes.
    fn connect(port: u16, buffer: usize) -> Self {
        let local = |request: &EgressRequest| {
            EgressVerdict::Connect((Ipv4Addr::LOCALHOST, request.destination.port()).into())
        };
        let mut wire = Wire::default();
        let mac = HardwareAddress::Ethernet(EthernetAddress([2, 0, 0, 0, 0, 9]));
        let now = Instant::ZERO;
        let mut interface = Interface::new(Config::new(mac), &mut wire, now);
        interface.update_ip_addrs(|addresses| {
            let own = IpCidr::new(IpAddress::v4(100, 96, 0, 2), 30);
            addresses.push(own).unwrap();
        });
        let gateway = Ipv4Addr::new(100, 96, 0, 1);
        interface
            .routes_mut()
            .add_default_ipv4_route(gateway)
            .unwrap();
        let buffers = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut sockets = SocketSet::new(Vec::new());
        let socket = sockets.add(tcp::Socket::new(buffers(), buffers()));
        let context = interface.context();
        let remote = (IpAddress::from(REMOTE), port);
        sockets
            .get_mut::<tcp::Socket<'_>>(socket)
            .connect(context, remote, 40_000)
            .unwrap();

        let engine = NetEngine::new(EngineConfig::default(), Box::new(local));
        let gateway = Arc::new(Mutex::new(Gateway { engine, wire }));
        let mut event_loop = ManualLoop::new();
        let id = event_loop.add_handler(gateway.clone()).unwrap();
        Self {
            event_loop,
            id,
            gateway,
            interface,
            sockets,
            socket,
            now,
        }
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.socket)
    }

    /// Both sides do what they can, then a millisecond passes.
    fn step(&mut self) {
        let gateway = Arc::clone(&self.gateway);
        let (interface, sockets, now) = (&mut self.interface, &mut self.sockets, self.now);
        self.event_loop.with(self.id, |registry| {
            let mut gateway = gateway.lock().unwrap();
            let Gateway { engine, wire } = &mut *gateway;
            interface.poll(now, wire, sockets);
            while let Some(frame) = wire.from_guest.pop_front() {
                engine.guest_frame(&frame.as_slice(), registry);
            }
            engine.serve(wire, registry);
        });
        for _ in 0..4 {
            self.event_loop.turn();
        }
        self.event_loop.advance(Duration::from_millis(1));
        self.now += smoltcp::time::Duration::from_millis(1);
    }

    fn lose_one_of(&mut self, count: u64) {
        self.gateway.lock().unwrap().wire.lose_one_of = count;
    }

    fn stats(&self) -> EngineStats {
        self.gateway.lock().unwrap().engine.stats()
    }
}

fn pattern(seed: usize, at: usize, len: usize) -> Vec<u8> {
    let byte = |index: usize| u8::try_from((index * 31 + index / 251 + seed) % 256).unwrap();
    (at..at + len).map(byte).collect()
}

/// Sends `total` bytes each way at once, and ends both directions.
fn exchange(guest: &mut Guest, mut peer: &TcpStream, total: usize) {
    peer.set_nonblocking(true).unwrap();
    let (mut guest_sent, mut guest_got, mut peer_sent, mut peer_got) = (0, 0, 0, 0);
    let mut buffer = vec![0; 32 << 10];
    let mut ends = 0;
    for step in 0.. {
        assert!(
            step < 2_000_000,
            "{guest_sent} {guest_got} {peer_sent} {peer_got}"
        );
        let socket = guest.socket();
        if socket.can_send() && guest_sent < total {
            let some = pattern(1, guest_sent, (total - guest_sent).min(3000));
            guest_sent += socket.send_slice(&some).unwrap();
            if guest_sent == total {
                socket.close();
            }
        }
        if socket.can_recv() {
            let len = socket.recv_slice(&mut buffer[..5000]).unwrap();
            assert!(
                buffer[..len] == pattern(2, guest_got, len),
                "at {guest_got}"
            );
            guest_got += len;
        }
        if peer_sent < total {
            match peer.write(&pattern(2, peer_sent, (total - peer_sent).min(20_000))) {
                Ok(len) => peer_sent += len,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            if peer_sent == total {
                peer.shutdown(Shutdown::Write).unwrap();
            }
        }
        match peer.read(&mut buffer) {
            Ok(0) => ends += 1,
            Ok(len) => {
                assert!(buffer[..len] == pattern(1, peer_got, len), "at {peer_got}");
                peer_got += len;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.step();
        if peer_got == total && guest_got == total && ends > 0 && !guest.socket().may_recv() {
            return;
        }
    }
}

/// Connects, and accepts the connection.
fn pair(buffer: usize) -> (Guest, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut guest = Guest::connect(listener.local_addr().unwrap().port(), buffer);
    for _ in 0..1000 {
        guest.step();
        if guest.socket().state() == tcp::State::Established
            && let Ok((peer, _)) = listener.accept()
        {
            return (guest, peer);
        }
    }
    panic!("no connection: {:?}", guest.stats());
}

#[test]
fn bytes_pass_in_both_directions_whatever_the_buffers() {
    for buffer in [1000, 10_000, 65_535, 200_000] {
        let (mut guest, peer) = pair(buffer);
        exchange(&mut guest, &peer, 300_000);
        for _ in 0..3000 {
            guest.step();
        }
        let stats = guest.stats();
        assert_eq!((stats.tcp_flows, stats.malformed), (0, 0), "{buffer}");
    }
}

#[test]
fn losses_are_made_up_for() {
    for lose in [3, 10, 50] {
        let (mut guest, peer) = pair(32_000);
        guest.lose_one_of(lose);
        exchange(&mut guest, &peer, 200_000);
        let stats = guest.stats();
        assert!(stats.tcp_retransmissions > 0, "{stats:?}");
    }
}

#[test]
fn a_peer_that_is_not_there_refuses() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut guest = Guest::connect(port, 1000);
    for _ in 0..100 {
        guest.step();
    }
    assert_eq!(guest.socket().state(), tcp::State::Closed);
    assert_eq!(guest.stats().tcp_failed, 1);
}

#[test]
fn an_abort_of_the_guest_resets_the_peer() {
    let (mut guest, mut peer) = pair(1000);
    guest.socket().abort();
    for _ in 0..10 {
        guest.step();
    }
    let error = peer.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(guest.stats().tcp_flows, 0);
}

#[test]
fn a_connection_that_the_guest_has_forgotten_ends() {
    let (mut guest, mut peer) = pair(1000);
    // The peer never ends its side.
    guest.socket().close();
    let buffers = || tcp::SocketBuffer::new(vec![0; 100]);
    let other = guest.sockets.add(tcp::Socket::new(buffers(), buffers()));
    let minutes = |guest: &mut Guest, count: u64| {
        for _ in 0..count {
            // Attempts that are refused preserve the gateway's entry in the guest's table of
            // neighbours: smoltcp drops a packet for one that is not there.
            let context = guest.interface.context();
            let socket: &mut tcp::Socket<'_> = guest.sockets.get_mut(other);
            let port = 40_001 + u16::try_from(guest.now.secs() / 50).unwrap();
            socket
                .connect(context, (IpAddress::from(REMOTE), 1), port)
                .unwrap();
            for _ in 0..10 {
                guest.step();
            }
            guest.event_loop.advance(Duration::from_secs(50));
            guest.now += smoltcp::time::Duration::from_secs(50);
            for _ in 0..10 {
                guest.step();
            }
        }
    };
    minutes(&mut guest, 10);
    assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(guest.socket().state(), tcp::State::FinWait2);
    assert_eq!(guest.stats().tcp_flows, 1, "the guest may be waiting");
    // Bytes still pass.
    peer.write_all(b"late").unwrap();
    minutes(&mut guest, 1);
    assert_eq!(guest.socket().recv_queue(), 4);
    let socket = guest.socket;
    guest.sockets.remove(socket);
    minutes(&mut guest, 3);
    assert_eq!(guest.stats().tcp_flows, 0);
}

#[test]
fn a_lost_end_is_sent_again_also_if_the_guest_has_ended_first() {
    let (mut guest, peer) = pair(1000);
    guest.socket().close();
    for _ in 0..50 {
        guest.step();
    }
    // The end of the peer is lost once.
    guest.lose_one_of(1);
    peer.shutdown(Shutdown::Write).unwrap();
    for _ in 0..50 {
        guest.step();
    }
    guest.lose_one_of(0);
    for _ in 0..1000 {
        guest.step();
    }
    assert_eq!(guest.stats().tcp_flows, 0);
}
