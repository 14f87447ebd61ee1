//! Addresses that are free on this host.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Length of the prefix of the IPv4 network: a gateway and a guest.
pub(super) const PREFIX_V4: u8 = 30;
/// Networks for a guest, the first that is free. The first is of the range between a provider
/// and its customers (RFC 6598), which VPNs also use; the others are of little use in others.
const CANDIDATES: [Ipv4Addr; 5] = [
    Ipv4Addr::new(100, 96, 0, 0),
    Ipv4Addr::new(100, 112, 73, 108),
    Ipv4Addr::new(172, 30, 73, 108),
    Ipv4Addr::new(10, 173, 109, 0),
    Ipv4Addr::new(192, 168, 173, 108),
];
/// Shortest prefix of a route that takes a network: one to half of the Internet, as VPNs have
/// it, takes none.
const MIN_PREFIX: u8 = 5;

/// Returns the addresses of gateway and guest in a network of which the host has no other
/// addresses; the first candidate if all are taken.
pub(super) fn free_subnet() -> (Ipv4Addr, Ipv4Addr) {
    let tables = fs::read_to_string("/proc/thread-self/net/fib_trie").unwrap_or_default();
    let network = free(&parse_fib_trie(&tables)).unwrap_or_else(|| {
        tracing::warn!("all networks for guests are in use on this host");
        CANDIDATES[0].to_bits()
    });
    (
        Ipv4Addr::from_bits(network + 1),
        Ipv4Addr::from_bits(network + 2),
    )
}

/// Returns the first candidate that overlaps with no route.
fn free(routes: &[(Ipv4Addr, u8)]) -> Option<u32> {
    let candidates = CANDIDATES.iter().map(|it| it.to_bits());
    let mut free = candidates.filter(|candidate| {
        !routes.iter().any(|(address, prefix)| {
            let shorter = u32::from(32 - prefix.min(&PREFIX_V4));
            *prefix >= MIN_PREFIX && (address.to_bits() ^ candidate) >> shorter == 0
        })
    });
    free.next()
}

/// Parses the routing tables, all of them: a route is in two lines, "|-- ADDRESS" and
/// "/PREFIX SCOPE TYPE".
fn parse_fib_trie(text: &str) -> Vec<(Ipv4Addr, u8)> {
    let mut routes = Vec::new();
    let mut last: Option<Ipv4Addr> = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if let Some(route) = line.strip_prefix('/')
            && let Some(address) = last
        {
            let prefix = route.split(' ').next().unwrap_or_default();
            let prefix: Option<u8> = prefix.parse().ok().filter(|it| *it <= 32);
            routes.extend(prefix.map(|prefix| (address, prefix)));
        }
    }
    routes
}

/// Returns true if the host has a route to the IPv6 Internet. To connect a socket for datagrams
/// sends nothing.
pub(super) fn has_v6_route() -> bool {
    let target = Ipv6Addr::new(0x2001, 0x4860, 0x4860, 0, 0, 0, 0, 0x8888);
    let socket = UdpSocket::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)));
    socket.is_ok_and(|socket| socket.connect(SocketAddr::from((target, 53))).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_the_host_is_not_a_guests() {
        let first = Some(CANDIDATES[0].to_bits());
        assert_eq!(free(&[]), first);
        let route = |address: &str, prefix| (address.parse().unwrap(), prefix);
        // The Internet, half of it, and a network beside.
        for (address, prefix) in [("0.0.0.0", 0), ("0.0.0.0", 1), ("100.96.0.4", 30)] {
            assert_eq!(free(&[route(address, prefix)]), first, "{address}");
        }
        // A network that contains it, and an address in it.
        let second = Some(CANDIDATES[1].to_bits());
        for (address, prefix) in [("100.96.0.0", 16), ("100.96.0.2", 32), ("100.96.0.0", 30)] {
            assert_eq!(free(&[route(address, prefix)]), second, "{address}");
        }
        let third = Some(CANDIDATES[2].to_bits());
        assert_eq!(free(&[route("100.64.0.0", 10)]), third);
        let all = ["100.64.0.0", "172.16.0.0", "10.0.0.0", "192.168.0.0"];
        assert_eq!(free(&all.map(|address| route(address, 8))), None);
    }

    #[test]
    fn all_tables_are_read() {
        let text = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
                    Local:\n     +-- 192.0.2.0/24 2 0 2\n        |-- 192.0.2.0\n           \
                    /24 link UNICAST\n        |-- 192.0.2.2\n           /32 host LOCAL\n\
                    Id 52:\n     |-- 100.64.0.0\n        /10 link UNICAST\n        /x\n";
        let routes = parse_fib_trie(text);
        let expected = [
            ("0.0.0.0", 0),
            ("192.0.2.0", 24),
            ("192.0.2.2", 32),
            ("100.64.0.0", 10),
        ];
        assert_eq!(
            routes,
            expected.map(|(address, prefix)| (address.parse().unwrap(), prefix))
        );
        // This host has a loopback interface.
        let tables = fs::read_to_string("/proc/thread-self/net/fib_trie").unwrap();
        assert!(parse_fib_trie(&tables).contains(&(Ipv4Addr::LOCALHOST, 32)));
        let (gateway, guest) = free_subnet();
        assert_eq!(gateway.to_bits() + 1, guest.to_bits());
    }
}
