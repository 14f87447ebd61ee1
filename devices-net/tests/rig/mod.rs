//! An engine between two network namespaces: Linux as its guest behind a TAP, and an
//! "internet" with servers of the test.
#![expect(
    unsafe_code,
    reason = "namespaces and a TAP are created by system calls"
)]
#![allow(dead_code, reason = "each test program uses a part")]

#[path = "../../examples/tap/device.rs"]
mod device;

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use sm_devices_net::engine::{
    EgressPolicy, EgressRequest, EgressVerdict, EngineConfig, EngineHandle, EngineStats,
    FlowProtocol, NameServers, NetEngine, NetEvent, event_channel,
};
use sm_devices_net::policy::local_addresses;
use sm_event_loop::EventLoop;

use self::device::TapGateway;

/// Addresses of the internet's host.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// An address that the policy prohibits.
pub(crate) const PROHIBITED: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 99);
/// A port from which the policy permits nothing else: the gateway is the server there.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 1);
pub(crate) const MIB: usize = 1 << 20;
/// Time in which everything but a bulk transfer is done.
pub(crate) const SOON: Duration = Duration::from_secs(20);

const INTERNET: [&str; 5] = [
    "link set lo up",
    "address add 198.51.100.1/32 dev lo",
    "address add 198.51.100.2/32 dev lo",
    "address add 2001:db8::1/128 dev lo",
    // Packets for it would have to leave: there is no route for any other address.
    "route add prohibit 203.0.113.0/24",
];
const GUEST: [&str; 6] = [
    "link set lo up",
    "address add 100.96.0.2/30 dev eth0",
    "address add fd73:6d00::2/64 dev eth0 nodad",
    "link set eth0 up",
    "route add default via 100.96.0.1",
    "-6 route add default via fd73:6d00::1",
];

/// Creates an interface in the namespace of the thread; nobody reads its packets.
pub(crate) fn create_interface(name: &str) -> File {
    device::create(name, false).unwrap()
}

pub(crate) struct Rig {
    internet: File,
    guest: File,
    gateway: Arc<Mutex<TapGateway>>,
    _event_loop: EventLoop,
}

/// Runs `task` on a thread of its own.
fn thread<R: Send>(task: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| scope.spawn(task).join().unwrap())
}

/// Creates a network namespace, configures it after `prepare`, and returns it.
fn namespace<R: Send>(commands: &[&str], prepare: impl FnOnce() -> R + Send) -> (File, R) {
    thread(|| {
        // SAFETY: of a thread's own resources, only its network namespace is replaced.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET).unwrap() };
        let prepared = prepare();
        for arguments in commands {
            let status = Command::new("ip").args(arguments.split(' ')).status();
            assert!(status.unwrap().success(), "ip {arguments}");
        }
        (File::open("/proc/thread-self/ns/net").unwrap(), prepared)
    })
}

fn inside<R: Send>(namespace: &File, task: impl FnOnce() -> R + Send) -> R {
    thread(|| {
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), kind).unwrap();
        task()
    })
}

fn judge(request: &EgressRequest) -> EgressVerdict {
    let mut destination = request.destination;
    if destination.ip() == PROHIBITED {
        return EgressVerdict::Prohibit;
    }
    if destination.ip() == GATEWAY && request.protocol != FlowProtocol::Echo {
        destination.set_ip(SERVER.into());
    }
    EgressVerdict::Connect(destination)
}

impl Rig {
    /// Creates both sides; `None` without the privileges.
    pub(crate) fn new() -> Option<Self> {
        Self::with(EngineConfig::default(), true)
    }

    pub(crate) fn with(config: EngineConfig, offloads: bool) -> Option<Self> {
        Self::with_policy(config, offloads, |_| Box::new(judge))
    }

    /// Creates both sides; the policy gets the addresses of the internet's host.
    pub(crate) fn with_policy(
        config: EngineConfig,
        offloads: bool,
        policy: impl FnOnce(Vec<IpAddr>) -> Box<dyn EgressPolicy> + Send,
    ) -> Option<Self> {
        let tun = File::open("/dev/net/tun")
            .err()
            .map(|_| "it needs /dev/net/tun");
        if !sm_test_needs::root() || !sm_test_needs::met("tun", tun) {
            return None;
        }
        if !sm_test_needs::programs(&["ip"]) {
            return None;
        }
        let (internet, ()) = namespace(&INTERNET, || {});
        let (guest, tap) = namespace(&GUEST, || device::create("eth0", offloads).unwrap());
        let (event_loop, addresses) = inside(&internet, || {
            // Unprivileged sockets for echo requests.
            std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
            (EventLoop::spawn("network").unwrap(), local_addresses())
        });
        let engine = inside(&internet, || NetEngine::new(config, policy(addresses)));
        let gateway = Arc::new(Mutex::new(TapGateway::new(engine, tap, offloads)));
        event_loop.handle().add_handler(gateway.clone()).unwrap();
        Some(Self {
            internet,
            guest,
            gateway,
            _event_loop: event_loop,
        })
    }

    pub(crate) fn internet<R: Send>(&self, task: impl FnOnce() -> R + Send) -> R {
        inside(&self.internet, task)
    }

    pub(crate) fn guest<R: Send>(&self, task: impl FnOnce() -> R + Send) -> R {
        inside(&self.guest, task)
    }

    pub(crate) fn stats(&self) -> EngineStats {
        self.gateway.lock().unwrap().engine.stats()
    }

    /// Makes the gateway a name server.
    pub(crate) fn name_servers(&self, servers: NameServers) {
        self.gateway
            .lock()
            .unwrap()
            .engine
            .set_name_servers(servers);
    }

    /// Returns a handle of the engine.
    pub(crate) fn handle(&self) -> EngineHandle {
        self.gateway.lock().unwrap().engine.handle()
    }

    /// Returns the events of the engine from now on.
    pub(crate) fn events(&self) -> Receiver<NetEvent> {
        let (sink, events) = event_channel(10_000);
        self.gateway.lock().unwrap().engine.set_event_sink(sink);
        events
    }

    /// Loses one of `to_guest` and one of `from_guest` frames from now on; zero for none.
    pub(crate) fn lose(&self, to_guest: u64, from_guest: u64) {
        let mut gateway = self.gateway.lock().unwrap();
        gateway.loss.one_of = to_guest;
        gateway.lost_from_guest.one_of = from_guest;
    }

    /// Waits for a state of the counters.
    pub(crate) fn settle(&self, reached: impl Fn(&EngineStats) -> bool) -> EngineStats {
        let start = Instant::now();
        loop {
            let stats = self.stats();
            if reached(&stats) {
                return stats;
            }
            assert!(start.elapsed() < SOON, "{stats:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Connects from the guest to a listener in the internet; returns both sockets.
    pub(crate) fn pair(&self, server: IpAddr) -> (TcpStream, TcpStream) {
        let listener = self.internet(|| std::net::TcpListener::bind((server, 0)).unwrap());
        let address = listener.local_addr().unwrap();
        let guest = self.guest(|| connect(address).unwrap());
        let (peer, _) = listener.accept().unwrap();
        for socket in [&guest, &peer] {
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket.set_write_timeout(Some(SOON)).unwrap();
        }
        (guest, peer)
    }
}

pub(crate) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&address, SOON)
}

/// Bytes that do not repeat soon.
pub(crate) struct Pattern(u64);

impl Pattern {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            // A linear congruential generator (Knuth).
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Sends a pattern of `len` bytes, a multiple of 64 KiB.
pub(crate) fn send(mut to: impl Write, seed: u64, len: usize) {
    let mut pattern = Pattern::new(seed);
    let mut block = vec![0; 64 << 10];
    for _ in 0..len / block.len() {
        pattern.fill(&mut block);
        to.write_all(&block).unwrap();
    }
}

/// Receives that pattern.
pub(crate) fn receive(mut from: impl Read, seed: u64, len: usize) {
    let mut pattern = Pattern::new(seed);
    let (mut block, mut expected) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    for number in 0..len / block.len() {
        pattern.fill(&mut expected);
        from.read_exact(&mut block).unwrap();
        assert!(block == expected, "block {number}");
    }
}

/// Sends both ways at once.
pub(crate) fn exchange(guest: &TcpStream, peer: &TcpStream, len: usize) {
    std::thread::scope(|scope| {
        scope.spawn(|| send(guest, 1, len));
        scope.spawn(|| send(peer, 2, len));
        scope.spawn(|| receive(guest, 2, len));
        scope.spawn(|| receive(peer, 1, len));
    });
}

/// Receives a datagram; a debugger or a stop interrupts the call.
pub(crate) fn recv(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
