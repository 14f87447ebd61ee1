//! Addresses, name servers and limits of an engine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::wire::MacAddress;

/// Addresses of a network with one guest, and its limits.
///
/// The default is `100.96.0.2/30` and `fd73:6d00::2/64` for the guest, and the first address of
/// both for the gateway.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct EngineConfig {
    /// Ethernet address of the gateway.
    pub gateway_mac: MacAddress,
    /// Ethernet address of the guest until it has sent a frame; it gets all of them.
    pub guest_mac: MacAddress,
    /// IPv4 address of the gateway.
    pub gateway_v4: Ipv4Addr,
    /// IPv4 address of the guest: packets with another source are dropped.
    pub guest_v4: Ipv4Addr,
    /// IPv6 address of the gateway.
    pub gateway_v6: Ipv6Addr,
    /// IPv6 address of the guest: packets with another source are dropped, but for neighbour
    /// discovery.
    pub guest_v6: Ipv6Addr,
    /// Maximum length of an IP packet, from 1280 bytes (RFC 8200 5) on.
    pub mtu: u16,
    /// Limits.
    pub limits: EngineLimits,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            gateway_mac: MacAddress([0x02, 0x73, 0x6d, 0, 0, 1]),
            guest_mac: MacAddress::BROADCAST,
            gateway_v4: Ipv4Addr::new(100, 96, 0, 1),
            guest_v4: Ipv4Addr::new(100, 96, 0, 2),
            gateway_v6: Ipv6Addr::new(0xfd73, 0x6d00, 0, 0, 0, 0, 0, 1),
            guest_v6: Ipv6Addr::new(0xfd73, 0x6d00, 0, 0, 0, 0, 0, 2),
            mtu: 1500,
            limits: EngineLimits::default(),
        }
    }
}

impl EngineConfig {
    /// Returns true for an address of the gateway.
    #[must_use]
    pub fn is_gateway(&self, address: IpAddr) -> bool {
        address == self.gateway_v4 || address == self.gateway_v6
    }

    /// Returns true for an address of the guest.
    #[must_use]
    pub fn is_guest(&self, address: IpAddr) -> bool {
        address == self.guest_v4 || address == self.guest_v6
    }

    /// The guest's address of the family of `address`.
    #[must_use]
    pub fn guest(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(_) => self.guest_v4.into(),
            IpAddr::V6(_) => self.guest_v6.into(),
        }
    }

    /// The gateway's address of the family of `address`.
    #[must_use]
    pub fn gateway(&self, address: IpAddr) -> IpAddr {
        match address {
            IpAddr::V4(_) => self.gateway_v4.into(),
            IpAddr::V6(_) => self.gateway_v6.into(),
        }
    }
}

/// The name servers of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameServers {
    /// These.
    Fixed(Vec<SocketAddr>),
    /// Those of a file in the format of `resolv.conf`, which is read again when it changes.
    File(PathBuf),
}

/// Limits of an engine, whatever its guest and the guest's peers do.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct EngineLimits {
    /// TCP flows. At the limit a SYN is not answered, and the guest repeats it.
    pub tcp_flows: usize,
    /// TCP flows whose host sockets are connecting.
    pub tcp_connecting: usize,
    /// Bytes that a TCP flow may store in each direction.
    pub tcp_stored: u32,
    /// Bytes that all TCP flows store together.
    pub stored: usize,
    /// UDP flows. At the limit the one that was unused longest ends.
    pub udp_flows: usize,
    /// Time without a datagram after which a UDP flow ends that had only one direction.
    pub udp_first: Duration,
    /// Time without a datagram after which another UDP flow ends.
    pub udp_idle: Duration,
    /// Echo requests that wait for a reply; at the limit the oldest is forgotten.
    pub echoes: usize,
    /// Time that an echo request waits for its reply.
    pub echo_timeout: Duration,
    /// Questions to name servers that wait for an answer; at the limit the oldest fails.
    pub lookups: usize,
    /// Answers of name servers that are stored.
    pub stored_answers: usize,
    /// Bytes of these answers together.
    pub stored_answers_bytes: usize,
    /// Packets of which some fragments are missing.
    pub reassembled: usize,
    /// Bytes of these packets together.
    pub reassembled_bytes: usize,
    /// Time that fragments wait for the others.
    pub reassembly_timeout: Duration,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            tcp_flows: 4096,
            tcp_connecting: 1024,
            tcp_stored: 256 << 10,
            stored: 16 << 20,
            udp_flows: 1024,
            udp_first: Duration::from_secs(30),
            udp_idle: Duration::from_secs(180),
            echoes: 64,
            echo_timeout: Duration::from_secs(5),
            lookups: 256,
            stored_answers: 2048,
            stored_answers_bytes: 512 << 10,
            reassembled: 64,
            reassembled_bytes: 1 << 20,
            reassembly_timeout: Duration::from_secs(10),
        }
    }
}
