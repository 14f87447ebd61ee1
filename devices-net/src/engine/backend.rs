//! An engine as the backend of a virtio-net device.

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};

use sm_event_loop::{Readiness, Registry};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::flow::{FlowKey, TokenKind, token};
use super::link::{GuestLink as _, LinkOffloads, RingLink};
use super::{EngineHandle, EngineStats, NetEngine};
use crate::backend::{NetBackend, NetFrame};
use crate::header::NetHeader;
use crate::receive::ReceiveRing;
use crate::wire::{MacAddress, TcpFlags, TcpSegment};

/// Version of the saved state: its first byte.
const VERSION: u8 = 1;
/// Length of a saved flow: two addresses of 16 bytes, their ports, and a number.
const FLOW: usize = 2 * 18 + 4;

/// A [`NetEngine`] behind a device.
///
/// The saved state has the ends of TCP connections. They end where the state is restored: the
/// guest gets a reset for each of them.
#[derive(Debug)]
pub struct EngineBackend {
    engine: NetEngine,
    offloads: LinkOffloads,
    paused: bool,
    /// Connections of the guest of which this one is a copy, the last first.
    old: Vec<(FlowKey, u32)>,
}

impl EngineBackend {
    /// Creates a backend.
    #[must_use]
    pub fn new(engine: NetEngine) -> Self {
        Self {
            engine,
            offloads: LinkOffloads::NONE,
            paused: false,
            old: Vec::new(),
        }
    }

    /// Returns a handle that changes the engine while it runs.
    #[must_use]
    pub fn handle(&self) -> EngineHandle {
        self.engine.handle()
    }

    /// Returns the counters of the engine.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// Sends resets for old connections as long as there is room.
    fn end_old(&mut self, link: &mut RingLink<'_, '_>) -> Result<(), super::LinkFull> {
        while let Some((key, number)) = self.old.last() {
            let flags = TcpFlags::RST.and(TcpFlags::ACK);
            let mut reset = TcpSegment::new(key.remote().port(), key.guest().port(), flags);
            reset.sequence = *number;
            let head = self.engine.stray(key, &reset);
            link.transmit(&NetHeader::default(), &[IoSlice::new(head.bytes())])?;
            self.old.pop();
        }
        Ok(())
    }
}

impl NetBackend for EngineBackend {
    fn started(&mut self, features: u64, registry: &mut dyn Registry) {
        let has = |bit: u32| features & 1 << bit != 0;
        self.offloads = LinkOffloads {
            checksum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso_v4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso_v6: has(VIRTIO_NET_F_GUEST_TSO6),
        };
        self.paused = false;
        self.engine.started(registry);
        // Events may have come during the pause.
        registry.call_again(token(TokenKind::Serve, 0));
    }

    fn transmit(&mut self, frame: &NetFrame<'_>, registry: &mut dyn Registry) {
        self.engine.guest_frame(frame, registry);
    }

    fn receive(&mut self, ring: &mut ReceiveRing<'_>, registry: &mut dyn Registry) {
        if self.paused {
            return;
        }
        let mut link = RingLink {
            ring,
            offloads: self.offloads,
        };
        if self.end_old(&mut link).is_ok() {
            self.engine.serve(&mut link, registry);
        }
    }

    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        self.engine.host_ready(token, readiness, registry);
    }

    fn quiesce(&mut self, _registry: &mut dyn Registry) {
        self.paused = true;
    }

    fn reset(&mut self, registry: Option<&mut dyn Registry>) {
        self.old.clear();
        self.engine.reset(registry);
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        let known = self.engine.tcp.known().chain(self.old.iter().copied());
        let mut bytes = vec![VERSION];
        bytes.extend(self.engine.guest.0);
        for (key, number) in known {
            for end in [key.guest(), key.remote()] {
                let address = match end.ip() {
                    IpAddr::V4(address) => address.to_ipv6_mapped(),
                    IpAddr::V6(address) => address,
                };
                bytes.extend(address.octets());
                bytes.extend(end.port().to_le_bytes());
            }
            bytes.extend(number.to_le_bytes());
        }
        Ok(bytes)
    }

    fn check(&self, bytes: &[u8]) -> Result<(), String> {
        decode(bytes, self.engine.config.limits.tcp_flows).map(drop)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        let saved = decode(bytes, self.engine.config.limits.tcp_flows)?;
        self.engine.guest = saved.guest;
        self.old = saved.flows;
        Ok(())
    }
}

/// A saved state.
struct Saved {
    guest: MacAddress,
    /// The ends of connections, and the numbers of the next bytes for the guest.
    flows: Vec<(FlowKey, u32)>,
}

/// Decodes a saved state; no bytes are one without connections.
fn decode(bytes: &[u8], most: usize) -> Result<Saved, String> {
    let malformed = || "the network's state is malformed".to_owned();
    let Some((version, bytes)) = bytes.split_first() else {
        return Ok(Saved {
            guest: MacAddress::BROADCAST,
            flows: Vec::new(),
        });
    };
    if *version != VERSION {
        return Err(format!(
            "version {version} of the network's state is unknown"
        ));
    }
    let (guest, bytes) = bytes.split_first_chunk().ok_or_else(malformed)?;
    let (flows, rest) = bytes.as_chunks::<FLOW>();
    // Twice: a restored guest may be saved before its old connections have ended.
    if !rest.is_empty() || flows.len() > 2 * most {
        return Err(malformed());
    }
    let flow = |bytes: &[u8; FLOW]| {
        let guest = end(bytes.first_chunk()?)?;
        let remote = end(bytes.get(18..)?.first_chunk()?)?;
        let number = u32::from_le_bytes(*bytes.last_chunk()?);
        let same = guest.is_ipv4() == remote.is_ipv4();
        same.then_some((
            FlowKey::new((guest.ip(), guest.port()), (remote.ip(), remote.port())),
            number,
        ))
    };
    let flows: Option<Vec<_>> = flows.iter().map(flow).collect();
    Ok(Saved {
        guest: MacAddress(*guest),
        flows: flows.ok_or_else(malformed)?,
    })
}

fn end(bytes: &[u8; 18]) -> Option<SocketAddr> {
    let (address, port) = bytes.split_first_chunk::<16>()?;
    let address = std::net::Ipv6Addr::from(*address).to_canonical();
    Some((address, u16::from_le_bytes(*port.first_chunk()?)).into())
}
