//! The configuration of an interface as requests to rtnetlink(7).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sm_guest_proto::control::{GuestAddress, GuestNetwork};

use super::netlink::{Assigned, Attributes, Batch, CREATE, REPLACE, interface_address};

/// Maximum number of addresses.
const MAX_ADDRESSES: usize = 16;
/// Smallest MTU of IPv4 (RFC 791) and of IPv6 (RFC 8200 section 5).
const MIN_MTU: u16 = 68;
const MIN_MTU_V6: u16 = 1280;

/// Types of messages.
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Flags of an interface.
const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;

/// Attributes of interfaces, addresses, neighbours and routes.
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

/// The kernel makes no link-local address, for which it would search for duplicates.
const ADDR_GEN_MODE_NONE: u8 = 1;
/// The address is used without a search for duplicates.
const IFA_F_NODAD: u8 = 2;
const NUD_PERMANENT: u16 = 0x80;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const TABLE_MAIN: u8 = 254;
/// The route is set by the administrator, here the agent.
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// Parses a MAC address of an individual station.
pub(crate) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

/// A valid configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkConfig {
    /// Absent if it remains.
    mac: Option<[u8; 6]>,
    mtu: u16,
    addresses: Vec<GuestAddress>,
    gateway_mac: [u8; 6],
}

/// A request of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) operation: &'static str,
    pub(super) is_ipv6: bool,
    /// It does nothing if it fails.
    pub(super) may_fail: bool,
}

impl NetworkConfig {
    /// Checks a configuration; `None` if a part is malformed.
    pub(crate) fn new(network: &GuestNetwork, mac: Option<[u8; 6]>) -> Option<Self> {
        let minimum = match network.addresses.iter().any(|to| to.address.is_ipv6()) {
            true => MIN_MTU_V6,
            false => MIN_MTU,
        };
        let valid = network.mtu >= minimum
            && network.addresses.len() <= MAX_ADDRESSES
            && network.addresses.iter().all(is_valid);
        valid.then_some(())?;
        Some(Self {
            mac,
            mtu: network.mtu,
            addresses: network.addresses.clone(),
            gateway_mac: parse_mac(&network.gateway_mac)?,
        })
    }

    /// Returns the requests that configure interface `index`, which has the addresses `old`.
    pub(super) fn requests(&self, index: u32, old: &[Assigned]) -> (Batch, Vec<Step>) {
        let mut requests = Requests {
            index,
            batch: Batch::default(),
            steps: Vec::new(),
        };
        requests.reset_link(self);
        for old in old {
            requests.remove_address(old);
        }
        requests.generate_no_address();
        requests.link_up();
        for to in &self.addresses {
            requests.add_address(to.address, to.prefix, SCOPE_UNIVERSE);
        }
        let has_ipv6 = self.addresses.iter().any(|to| to.address.is_ipv6());
        if let (true, Some(mac)) = (has_ipv6, self.mac) {
            requests.add_address(link_local(mac).into(), 64, SCOPE_LINK);
        }
        for gateway in self.addresses.iter().filter_map(|to| to.gateway) {
            requests.add_neighbour(gateway, self.gateway_mac);
            requests.add_default_route(gateway);
        }
        (requests.batch, requests.steps)
    }
}

fn is_valid(to: &GuestAddress) -> bool {
    let unicast = |address: IpAddr| match address {
        IpAddr::V4(address) => {
            let special = address.is_unspecified() || address.is_loopback();
            !special && !address.is_multicast() && !address.is_broadcast()
        }
        IpAddr::V6(address) => {
            let special = address.is_unspecified() || address.is_loopback();
            !special && !address.is_multicast() && address.to_ipv4_mapped().is_none()
        }
    };
    let bits = match to.address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    };
    let reachable = |gateway: IpAddr| match (to.address, gateway) {
        (IpAddr::V4(address), IpAddr::V4(gateway)) => {
            let network = mask(u128::from(to.prefix) + 96);
            u128::from(address.to_bits()) & network == u128::from(gateway.to_bits()) & network
        }
        (IpAddr::V6(address), IpAddr::V6(gateway)) => {
            let network = mask(to.prefix.into());
            let same = address.to_bits() & network == gateway.to_bits() & network;
            same || gateway.is_unicast_link_local()
        }
        _ => false,
    };
    let gateway = |gateway| unicast(gateway) && gateway != to.address && reachable(gateway);
    (1..=bits).contains(&to.prefix) && unicast(to.address) && to.gateway.is_none_or(gateway)
}

/// Returns the mask of the upper `bits` bits, 1 to 128.
fn mask(bits: u128) -> u128 {
    let rest = u32::try_from(128_u128.saturating_sub(bits)).unwrap_or(0);
    u128::MAX.checked_shl(rest).unwrap_or(0)
}

/// Returns the link-local address of an interface (RFC 4291 appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    let [a, b] = [
        u16::from_be_bytes([a ^ 2, b]),
        u16::from_be_bytes([c, 0xff]),
    ];
    let [c, d] = [u16::from_be_bytes([0xfe, d]), u16::from_be_bytes([e, f])];
    Ipv6Addr::new(0xfe80, 0, 0, 0, a, b, c, d)
}

/// Returns the broadcast address of a network; those of one or two addresses have none.
fn broadcast(address: Ipv4Addr, prefix: u8) -> Option<Ipv4Addr> {
    let hosts = u32::MAX
        .checked_shr(prefix.into())
        .filter(|hosts| *hosts > 1)?;
    Some(Ipv4Addr::from_bits(address.to_bits() | hosts))
}

/// Returns the family and the bytes of an address.
fn parts(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    }
}

/// A batch in the making.
struct Requests {
    index: u32,
    batch: Batch,
    steps: Vec<Step>,
}

impl Requests {
    fn add(&mut self, kind: u16, flags: u16, fixed: &[u8], attributes: &Attributes, step: Step) {
        self.batch.add(kind, flags, fixed, &attributes.0);
        self.steps.push(step);
    }

    /// Takes the interface down, which removes its routes, and sets what it has without
    /// addresses.
    fn reset_link(&mut self, config: &NetworkConfig) {
        let mut attributes = Attributes::default()
            .with(IFLA_MTU, &u32::from(config.mtu).to_ne_bytes())
            // It is no port of a bridge.
            .with(IFLA_MASTER, &0_u32.to_ne_bytes());
        if let Some(mac) = config.mac {
            attributes = attributes.with(IFLA_ADDRESS, &mac);
        }
        let link = link(AF_UNSPEC, self.index, 0, IFF_UP | IFF_NOARP);
        let step = required("set MAC address and MTU of the network interface");
        self.add(RTM_SETLINK, 0, &link, &attributes, step);
    }

    fn generate_no_address(&mut self) {
        let mode = Attributes::default().with(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]);
        let family = Attributes::default().with(AF_INET6.into(), &mode.0);
        let attributes = Attributes::default().with(IFLA_AF_SPEC, &family.0);
        let step = Step {
            // A kernel without IPv6 has no such mode.
            may_fail: true,
            ..required("set the mode of IPv6 addresses")
        };
        let link = link(AF_UNSPEC, self.index, 0, 0);
        self.add(RTM_SETLINK, 0, &link, &attributes, step);
    }

    fn link_up(&mut self) {
        let link = link(AF_UNSPEC, self.index, IFF_UP, IFF_UP);
        let step = required("bring the network interface up");
        self.add(RTM_SETLINK, 0, &link, &Attributes::default(), step);
    }

    fn remove_address(&mut self, old: &Assigned) {
        let (family, bytes) = parts(old.address);
        let fixed = interface_address(family, old.prefix, 0, 0, self.index);
        let attributes = Attributes::default().with(IFA_LOCAL, &bytes);
        let step = Step {
            // The kernel has removed it itself: with the address of which it was a
            // secondary one, or when the interface went down.
            may_fail: true,
            ..required("remove an address")
        };
        self.add(RTM_DELADDR, 0, &fixed, &attributes, step);
    }

    fn add_address(&mut self, address: IpAddr, prefix: u8, scope: u8) {
        let (family, bytes) = parts(address);
        let mut attributes = Attributes::default()
            .with(IFA_LOCAL, &bytes)
            .with(IFA_ADDRESS, &bytes);
        let mut flags = IFA_F_NODAD;
        if let IpAddr::V4(address) = address {
            flags = 0;
            if let Some(broadcast) = broadcast(address, prefix) {
                attributes = attributes.with(IFA_BROADCAST, &broadcast.octets());
            }
        }
        let fixed = interface_address(family, prefix, flags, scope, self.index);
        let step = Step {
            is_ipv6: address.is_ipv6(),
            ..required("add an address")
        };
        self.add(RTM_NEWADDR, CREATE | REPLACE, &fixed, &attributes, step);
    }

    /// Adds a neighbour (`struct ndmsg`) that never has to be resolved.
    fn add_neighbour(&mut self, address: IpAddr, mac: [u8; 6]) {
        let (family, bytes) = parts(address);
        let [a, b, c, d] = self.index.to_ne_bytes();
        let [low, high] = NUD_PERMANENT.to_ne_bytes();
        let fixed = [family, 0, 0, 0, a, b, c, d, low, high, 0, 0];
        let attributes = Attributes::default()
            .with(NDA_DST, &bytes)
            .with(NDA_LLADDR, &mac);
        let step = Step {
            is_ipv6: address.is_ipv6(),
            ..required("add the gateway's MAC address")
        };
        self.add(RTM_NEWNEIGH, CREATE | REPLACE, &fixed, &attributes, step);
    }

    /// Adds the default route (`struct rtmsg`), in place of another of the same priority.
    fn add_default_route(&mut self, gateway: IpAddr) {
        let (family, bytes) = parts(gateway);
        let (table, protocol, scope) = (TABLE_MAIN, RTPROT_BOOT, SCOPE_UNIVERSE);
        let fixed = [
            family,
            0,
            0,
            0,
            table,
            protocol,
            scope,
            RTN_UNICAST,
            0,
            0,
            0,
            0,
        ];
        let attributes = Attributes::default()
            .with(RTA_OIF, &self.index.to_ne_bytes())
            .with(RTA_GATEWAY, &bytes);
        let step = Step {
            is_ipv6: gateway.is_ipv6(),
            ..required("add the default route")
        };
        self.add(RTM_NEWROUTE, CREATE | REPLACE, &fixed, &attributes, step);
    }
}

fn required(operation: &'static str) -> Step {
    Step {
        operation,
        is_ipv6: false,
        may_fail: false,
    }
}

/// Returns a `struct ifinfomsg` that sets those of the flags that are in `change`.
fn link(family: u8, index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut fixed = vec![family, 0, 0, 0];
    for word in [index, flags, change] {
        fixed.extend(word.to_ne_bytes());
    }
    fixed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(address: &str, prefix: u8, gateway: &str) -> GuestAddress {
        GuestAddress {
            address: address.parse().unwrap(),
            prefix,
            gateway: (!gateway.is_empty()).then(|| gateway.parse().unwrap()),
        }
    }

    fn checked(mtu: u16, addresses: Vec<GuestAddress>, gateway_mac: &str) -> Option<NetworkConfig> {
        let network = GuestNetwork {
            mtu,
            addresses,
            gateway_mac: gateway_mac.into(),
        };
        NetworkConfig::new(&network, Some([2, 0, 0, 0, 0, 2]))
    }

    #[test]
    fn networks_are_checked() {
        const MAC: &str = "02:00:00:00:00:01";
        let valid = |to| checked(1500, vec![to], MAC).is_some();
        assert!(valid(to("100.96.0.2", 30, "100.96.0.1")));
        assert!(valid(to("100.96.0.2", 30, "")));
        assert!(valid(to("fd73:6d00::2", 64, "fd73:6d00::1")));
        assert!(valid(to("fd73:6d00::2", 128, "fe80::1")));
        for (address, prefix, gateway) in [
            ("100.96.0.2", 30, "100.96.0.5"),
            ("100.96.0.2", 30, "100.96.0.2"),
            ("100.96.0.2", 30, "fd73:6d00::1"),
            ("100.96.0.2", 33, ""),
            ("100.96.0.2", 0, ""),
            ("127.0.0.2", 8, ""),
            ("0.0.0.0", 8, ""),
            ("224.0.0.1", 8, ""),
            ("255.255.255.255", 8, ""),
            ("fd73:6d00::2", 64, "fd73:6d00:0:1::1"),
            ("fd73:6d00::2", 129, ""),
            ("::1", 64, ""),
            ("::ffff:10.0.0.1", 96, ""),
            ("ff02::1", 64, ""),
        ] {
            assert!(
                !valid(to(address, prefix, gateway)),
                "{address}/{prefix} {gateway}"
            );
        }
        let (v4, v6) = (to("100.96.0.2", 30, ""), to("fd73:6d00::2", 64, ""));
        assert!(checked(68, vec![v4.clone()], MAC).is_some());
        assert!(checked(67, vec![v4.clone()], MAC).is_none());
        assert!(checked(1279, vec![v4.clone(), v6], MAC).is_none());
        assert!(checked(1500, vec![v4.clone()], "02:00").is_none());
        assert!(checked(1500, vec![v4; MAX_ADDRESSES + 1], MAC).is_none());
    }

    #[test]
    fn macs_are_unicast_and_complete() {
        assert_eq!(parse_mac("02:00:00:00:0a:ff"), Some([2, 0, 0, 0, 10, 255]));
        for bad in [
            "",
            "02:00:00:00:0a",
            "02:00:00:00:0a:ff:00",
            "2:0:0:0:a:f",
            "zz:00:00:00:00:00",
            "01:00:5e:00:00:01",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn addresses_are_derived() {
        let link_local = link_local([0x02, 0xfc, 0, 0x12, 0x34, 0x56]);
        assert_eq!(
            link_local,
            "fe80::fc:ff:fe12:3456".parse::<Ipv6Addr>().unwrap()
        );
        let address = Ipv4Addr::new(100, 96, 0, 2);
        assert_eq!(broadcast(address, 30), Some(Ipv4Addr::new(100, 96, 0, 3)));
        assert_eq!(broadcast(address, 31), None);
        assert_eq!(broadcast(address, 32), None);
        assert_eq!(
            broadcast(address, 1),
            Some(Ipv4Addr::new(127, 255, 255, 255))
        );
    }
}
