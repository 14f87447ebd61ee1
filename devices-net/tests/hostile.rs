//! Packets of a guest and answers of servers that try to reach more than a policy allows.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::{Arc, Mutex};

use sm_devices_net::NetHeader;
use sm_devices_net::engine::{
    EgressPolicy, EgressRequest, EgressVerdict, EngineConfig, GuestLink, LinkFull, LinkOffloads,
    NameServers, NetEngine,
};
use sm_devices_net::wire::{
    EtherType, EthernetHeader, Head, IpProtocol, MacAddress, TcpFlags, TcpSegment, UdpHeader,
};
use sm_event_loop::testing::ManualLoop;
use sm_event_loop::{EventHandler, HandlerId, Readiness, Registry};

/// Notes all that it is asked, and allows it.
#[derive(Clone, Default)]
struct Asked {
    flows: Arc<Mutex<Vec<EgressRequest>>>,
    resolved: Arc<Mutex<Vec<IpAddr>>>,
    others: Arc<Mutex<Vec<IpAddr>>>,
}

impl EgressPolicy for Asked {
    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict {
        self.flows.lock().unwrap().push(*request);
        EgressVerdict::Connect((Ipv4Addr::LOCALHOST, 9).into())
    }

    fn resolved(&mut self, _name: &str, address: IpAddr, _ttl: u32) -> bool {
        self.resolved.lock().unwrap().push(address);
        true
    }

    fn may_answer(&mut self, address: IpAddr) -> bool {
        self.others.lock().unwrap().push(address);
        address != Ipv4Addr::new(10, 0, 0, 1)
    }
}

/// Frames for the guest.
struct Frames(Vec<Vec<u8>>);

impl GuestLink for Frames {
    fn offloads(&self) -> LinkOffloads {
        LinkOffloads::ALL
    }

    fn transmit(&mut self, _header: &NetHeader, frame: &[IoSlice<'_>]) -> Result<(), LinkFull> {
        let bytes = frame.iter().flat_map(|part| part.iter().copied());
        self.0.push(bytes.collect());
        Ok(())
    }
}

struct Gateway {
    engine: NetEngine,
    frames: Frames,
}

impl EventHandler for Gateway {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        self.engine.host_ready(token, readiness, registry);
        self.engine.serve(&mut self.frames, registry);
    }
}

struct Guest {
    event_loop: ManualLoop,
    id: HandlerId,
    gateway: Arc<Mutex<Gateway>>,
    asked: Asked,
}

impl Guest {
    fn new(servers: Option<NameServers>) -> Self {
        let asked = Asked::default();
        let mut engine = NetEngine::new(EngineConfig::default(), Box::new(asked.clone()));
        if let Some(servers) = servers {
            engine.set_name_servers(servers);
        }
        let frames = Frames(Vec::new());
        let gateway = Arc::new(Mutex::new(Gateway { engine, frames }));
        let mut event_loop = ManualLoop::new();
        let id = event_loop.add_handler(gateway.clone()).unwrap();
        Self {
            event_loop,
            id,
            gateway,
            asked,
        }
    }

    fn send(&mut self, to: IpAddr, protocol: IpProtocol, transport: &[u8]) {
        let config = EngineConfig::default();
        let mut head = Head::new();
        head.push(&EthernetHeader {
            destination: config.gateway_mac,
            source: MacAddress([2, 0, 0, 0, 0, 9]),
            ether_type: match to {
                IpAddr::V4(_) => EtherType::IPV4,
                IpAddr::V6(_) => EtherType::IPV6,
            },
        });
        head.push_ip(config.guest(to), to, protocol, transport.len(), None);
        let frame = [head.bytes(), transport].concat();
        let gateway = Arc::clone(&self.gateway);
        self.event_loop.with(self.id, |registry| {
            let Gateway { engine, frames } = &mut *gateway.lock().unwrap();
            engine.guest_frame(&frame.as_slice(), registry);
            engine.serve(frames, registry);
        });
        self.event_loop.settle();
    }

    fn send_datagram(&mut self, to: IpAddr, port: u16, payload: &[u8]) {
        let guest = EngineConfig::default().guest(to);
        let mut head = Head::new();
        head.push(&UdpHeader::new((guest, 4000), (to, port), payload.len()));
        self.send(to, IpProtocol::UDP, &[head.bytes(), payload].concat());
    }
}

/// Such a flow would be one of IPv4 on the host, and of IPv6 in a saved state, which could not
/// be restored.
#[test]
fn a_mapped_address_is_no_destination_of_ipv6() {
    let mut guest = Guest::new(None);
    let to: IpAddr = "::ffff:198.51.100.1".parse().unwrap();
    let source = EngineConfig::default().guest_v6.into();
    let mut head = Head::new();
    head.push_tcp(source, to, &TcpSegment::new(4000, 80, TcpFlags::SYN));
    guest.send(to, IpProtocol::TCP, head.bytes());
    guest.send_datagram(to, 53, b"x");
    assert_eq!(*guest.asked.flows.lock().unwrap(), []);
    let stats = guest.gateway.lock().unwrap().engine.stats();
    assert_eq!((stats.misaddressed, stats.tcp_flows), (2, 0));
    // Other forms are for the policy.
    guest.send_datagram(Ipv6Addr::LOCALHOST.into(), 53, b"x");
    assert_eq!(guest.asked.flows.lock().unwrap().len(), 1);
}

#[test]
fn a_policy_is_told_which_addresses_are_not_those_of_the_name() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let servers = NameServers::Fixed(vec![server.local_addr().unwrap()]);
    let mut guest = Guest::new(Some(servers));
    let gateway: IpAddr = EngineConfig::default().gateway_v4.into();
    for (other, code) in [([192, 0, 2, 9], 0), ([10, 0, 0, 1], 3)] {
        // The mail servers of a.b, with the address of one that is called c.b.
        let question = b"\x00\x07\x01\x00\x00\x01\0\0\0\0\0\0\x01a\x01b\0\x00\x0f\x00\x01";
        guest.send_datagram(gateway, 53, question);
        let mut response = [0; 512];
        let (len, from) = server.recv_from(&mut response).unwrap();
        let mut response = response[..len].to_vec();
        response[2] = 0x81;
        response[11] = 2;
        for (owner, address) in [(b'a', [192, 0, 2, 1]), (b'c', other)] {
            response.extend([1, owner, 0xc0, 14, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            response.extend(address);
        }
        server.send_to(&response, from).unwrap();
        guest.event_loop.settle();
        let frame = guest.gateway.lock().unwrap().frames.0.pop().unwrap();
        // Behind the headers of Ethernet, IPv4 and UDP.
        assert_eq!(frame[42 + 3] & 15, code);
    }
    let own = IpAddr::from([192, 0, 2, 1]);
    assert_eq!(*guest.asked.resolved.lock().unwrap(), [own, own]);
    let others = [[192, 0, 2, 9], [10, 0, 0, 1]].map(IpAddr::from);
    assert_eq!(*guest.asked.others.lock().unwrap(), others);
}
