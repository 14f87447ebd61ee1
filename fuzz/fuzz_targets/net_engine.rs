//! Arbitrary frames of a guest for the engine: its limits hold, and its answers are frames.
#![no_main]

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use sm_devices_net::NetHeader;
use sm_devices_net::engine::{
    EgressPolicy, EgressRequest, EgressVerdict, EngineConfig, FlowProtocol, GuestLink, LinkFull,
    LinkOffloads, NameServers, NetEngine, RefusalReason, event_channel,
};
use sm_devices_net::wire::{
    EtherType, EthernetHeader, Fragment, HEAD, Head, IpPacket, IpProtocol, MacAddress,
};
use sm_event_loop::testing::ManualLoop;
use sm_event_loop::{EventHandler, Readiness, Registry};

/// Frames of one input.
const MAX_FRAMES: usize = 60;
/// Accepts connections in its queue, and drops them after each input.
static LISTENER: LazyLock<TcpListener> = LazyLock::new(|| {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a socket");
    listener
});

struct Link {
    full: bool,
}

impl GuestLink for Link {
    fn offloads(&self) -> LinkOffloads {
        LinkOffloads::ALL
    }

    fn transmit(&mut self, _header: &NetHeader, frame: &[IoSlice<'_>]) -> Result<(), LinkFull> {
        if self.full {
            return Err(LinkFull);
        }
        let frame: Vec<u8> = frame.iter().flat_map(|part| part.iter().copied()).collect();
        let (ethernet, _) = EthernetHeader::parse(&frame).expect("a frame");
        let head = &frame[..frame.len().min(HEAD)];
        let packet = IpPacket::parse(ethernet.ether_type, head, frame.len());
        assert!(packet.is_ok(), "{packet:?}");
        Ok(())
    }
}

struct Gateway {
    engine: NetEngine,
    link: Link,
}

impl EventHandler for Gateway {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        self.engine.host_ready(token, readiness, registry);
        self.engine.serve(&mut self.link, registry);
    }
}

/// Every port but those of the listener and of nobody is prohibited.
fn judge(request: &EgressRequest) -> EgressVerdict {
    let local = |port| EgressVerdict::Connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    match (request.protocol, request.destination.port()) {
        (FlowProtocol::Tcp, 0..0x8000) => LISTENER
            .local_addr()
            .map_or(EgressVerdict::Prohibit, |it| local(it.port())),
        (FlowProtocol::Udp, 0..0x8000) => local(9),
        _ => EgressVerdict::Prohibit,
    }
}

/// The same, under rules about names: flows to ports below 256 have to prove one.
struct Named;

impl EgressPolicy for Named {
    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict {
        match (judge(request), request.destination.port()) {
            (EgressVerdict::Connect(address), 0..256) => EgressVerdict::ConnectNamed(address),
            (verdict, _) => verdict,
        }
    }

    fn may_name(
        &mut self,
        _request: &EgressRequest,
        name: Option<&str>,
    ) -> Result<(), RefusalReason> {
        name.map(drop).ok_or_else(RefusalReason::default)
    }

    fn restricts_names(&self) -> bool {
        true
    }
}

/// A frame with headers around `bytes`, so that they reach the transports.
fn frame(kind: u8, bytes: &[u8]) -> Vec<u8> {
    if kind & 7 == 0 {
        return bytes.to_vec();
    }
    let v6 = kind & 8 != 0;
    let config = EngineConfig::default();
    let (guest, remote): (IpAddr, IpAddr) = match v6 {
        true => (config.guest_v6.into(), config.gateway_v6.into()),
        false => (config.guest_v4.into(), config.gateway_v4.into()),
    };
    let protocol = match kind & 7 {
        1..=3 => IpProtocol::TCP,
        4 | 5 => IpProtocol::UDP,
        _ if v6 => IpProtocol::ICMPV6,
        _ => IpProtocol::ICMP,
    };
    let fragment = (kind & 16 != 0).then_some(Fragment {
        id: u32::from(kind >> 6),
        offset: u16::from(kind & 96),
        more: kind & 128 != 0,
    });
    let mut head = Head::new();
    head.push(&EthernetHeader {
        destination: config.gateway_mac,
        source: MacAddress([2; 6]),
        ether_type: if v6 { EtherType::IPV6 } else { EtherType::IPV4 },
    });
    head.push_ip(guest, remote, protocol, bytes.len(), fragment);
    [head.bytes(), bytes].concat()
}

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else {
        return;
    };
    let policy: Box<dyn EgressPolicy> = match first & 1 {
        0 => Box::new(judge),
        _ => Box::new(Named),
    };
    let mut engine = NetEngine::new(EngineConfig::default(), policy);
    let (sink, events) = event_channel(16);
    engine.set_event_sink(sink);
    engine.set_name_servers(NameServers::Fixed(vec![SocketAddr::from((
        [127, 0, 0, 1],
        9,
    ))]));
    let link = Link { full: false };
    let gateway = Arc::new(Mutex::new(Gateway { engine, link }));
    let mut event_loop = ManualLoop::new();
    let id = event_loop.add_handler(gateway.clone()).expect("a handler");
    // Each frame: kind, length, bytes. A kind of 255 fills or empties the link.
    let mut rest = data;
    for _ in 0..MAX_FRAMES {
        let [kind, len, bytes @ ..] = rest else { break };
        let (bytes, after) = bytes.split_at(usize::from(*len).min(bytes.len()));
        event_loop.with(id, |registry| {
            let mut gateway = gateway.lock().expect("no panic");
            if *kind == 255 {
                gateway.link.full ^= true;
            }
            if *kind == 254 {
                gateway.engine.handle().judge_again();
            }
            gateway
                .engine
                .guest_frame(&frame(*kind, bytes).as_slice(), registry);
            let Gateway { engine, link } = &mut *gateway;
            engine.serve(link, registry);
        });
        event_loop.turn();
        event_loop.advance(std::time::Duration::from_millis(100));
        rest = after;
    }
    let mut gateway = gateway.lock().expect("no panic");
    let stats = gateway.engine.stats();
    assert!(stats.tcp_flows <= MAX_FRAMES as u64 && stats.udp_flows <= MAX_FRAMES as u64);
    event_loop.with(id, |registry| gateway.engine.reset(Some(registry)));
    let stats = gateway.engine.stats();
    assert_eq!((stats.tcp_flows, stats.udp_flows), (0, 0));
    assert!(events.try_iter().count() <= 16);
    while LISTENER.accept().is_ok() {}
});
