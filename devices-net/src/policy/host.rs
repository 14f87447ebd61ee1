//! The addresses of the host that the engine runs on.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// Groups of notifications about addresses (linux/rtnetlink.h).
const RTMGRP_IPV4_IFADDR: u32 = 0x10;
const RTMGRP_IPV6_IFADDR: u32 = 0x100;
/// Types of messages (linux/netlink.h, linux/rtnetlink.h).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// A request for all entries.
const REQUEST_DUMP: u16 = 0x301;
/// Attributes of an address (linux/if_addr.h).
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const INET: u8 = 2;
const INET6: u8 = 10;
/// Longest message of a list that is asked for.
const MAX_MESSAGE: usize = 32 << 10;
/// Messages that are read at most before the list itself is read.
const MAX_MESSAGES: usize = 1024;

/// Notices changes of the addresses of a network namespace.
#[derive(Debug)]
pub(super) struct HostWatch {
    socket: OwnedFd,
}

impl HostWatch {
    /// Watches the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let socket = open()?;
        let groups = RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR;
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket })
    }

    /// Returns true if addresses have changed since the last call: one system call if not.
    pub(super) fn has_changed(&self) -> bool {
        let mut changed = false;
        for _ in 0..MAX_MESSAGES {
            // The messages themselves do not matter.
            match recv(&self.socket, &mut [0; 16][..], RecvFlags::empty()) {
                // Messages were lost because there were many.
                Ok(_) | Err(Errno::NOBUFS) => changed = true,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        changed
    }
}

fn open() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // Protocol zero is NETLINK_ROUTE.
    socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
}

/// Returns the addresses of the network interfaces in the calling thread's network namespace,
/// as far as the kernel says.
#[must_use]
pub fn local_addresses() -> Vec<IpAddr> {
    // The kernel adds an address to the routing tables after it has notified of it.
    let mut addresses = dump().unwrap_or_default();
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    addresses.extend(parse_fib_trie(&read("/proc/thread-self/net/fib_trie")));
    addresses.extend(parse_if_inet6(&read("/proc/thread-self/net/if_inet6")));
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Asks the kernel for the addresses of all interfaces (rtnetlink(7)).
fn dump() -> io::Result<Vec<IpAddr>> {
    let socket = open()?;
    let [len_a, len_b, len_c, len_d] = 20u32.to_ne_bytes();
    let [kind_a, kind_b] = RTM_GETADDR.to_ne_bytes();
    let [flags_a, flags_b] = REQUEST_DUMP.to_ne_bytes();
    let mut request = [0; 20];
    request[..8].copy_from_slice(&[len_a, len_b, len_c, len_d, kind_a, kind_b, flags_a, flags_b]);
    send(&socket, &request, SendFlags::empty())?;
    let mut addresses = Vec::new();
    let mut buffer = vec![0; MAX_MESSAGE];
    for _ in 0..MAX_MESSAGES {
        // Each read has the kernel continue: it never waits.
        let read = || recv(&socket, buffer.as_mut_slice(), RecvFlags::empty());
        let (len, _) = rustix::io::retry_on_intr(read)?;
        if parse_messages(buffer.get(..len).unwrap_or_default(), &mut addresses) {
            break;
        }
    }
    Ok(addresses)
}

/// Parses messages about addresses; returns true behind the last one.
fn parse_messages(mut bytes: &[u8], addresses: &mut Vec<IpAddr>) -> bool {
    loop {
        let Some((len, kind)) = header(bytes) else {
            return bytes.is_empty();
        };
        let Some(message) = bytes.get(16..len) else {
            return true;
        };
        match kind {
            NLMSG_DONE | NLMSG_ERROR => return true,
            RTM_NEWADDR => addresses.extend(parse_address(message)),
            _ => {}
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        if bytes.is_empty() {
            return false;
        }
    }
}

/// Returns the length and the type of a message.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let (len, rest) = bytes.split_first_chunk()?;
    let kind = u16::from_ne_bytes(*rest.first_chunk()?);
    Some((usize::try_from(u32::from_ne_bytes(*len)).ok()?, kind))
}

/// Parses `struct ifaddrmsg` and its attributes.
fn parse_address(message: &[u8]) -> Option<IpAddr> {
    let family = *message.first()?;
    let mut rest = message.get(8..)?;
    let mut found = None;
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let &[a, b, c, d] = head;
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let kind = u16::from_ne_bytes([c, d]);
        let value = rest.get(4..len)?;
        let address = match family {
            INET => (value.first_chunk()).map(|it: &[u8; 4]| Ipv4Addr::from(*it).into()),
            INET6 => (value.first_chunk()).map(|it: &[u8; 16]| Ipv6Addr::from(*it).into()),
            _ => None,
        };
        match kind {
            // The other one is that of the peer, on links between two hosts.
            IFA_LOCAL => return address,
            IFA_ADDRESS => found = address,
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Parses the routing tables: a local address is in two lines, "|-- ADDRESS" and
/// "/32 host LOCAL".
fn parse_fib_trie(text: &str) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut last: Option<IpAddr> = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            addresses.extend(last);
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Parses the list of IPv6 addresses, each in 32 digits at the beginning of a line.
fn parse_if_inet6(text: &str) -> Vec<IpAddr> {
    let words = text.lines().filter_map(|line| line.split(' ').next());
    let words = words.filter(|word| word.len() == 32);
    let numbers = words.filter_map(|word| u128::from_str_radix(word, 16).ok());
    numbers
        .map(|number| Ipv6Addr::from(number).into())
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_of_interfaces_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
                    Local:\n     +-- 192.0.2.0/24 2 0 2\n        |-- 192.0.2.0\n           \
                    /24 link UNICAST\n        |-- 192.0.2.2\n           /32 host LOCAL\n        \
                    |-- 192.0.2.255\n           /32 link BROADCAST\n     |-- 127.0.0.1\n        \
                    /32 host LOCAL\n     |-- 192.0.2.2\n           /32 host LOCAL\n";
        let expected = ["127.0.0.1", "192.0.2.2"].map(|it| it.parse::<IpAddr>().unwrap());
        assert_eq!(parse_fib_trie(trie), expected);
        let inet6 = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fd000000000000000000000000000002 02 40 00 82     eth0\nx\n";
        let expected = ["::1", "fd00::2"].map(|it| it.parse::<IpAddr>().unwrap());
        assert_eq!(parse_if_inet6(inet6), expected);
    }

    #[test]
    fn the_kernel_says_what_the_files_say() {
        let dumped = dump().unwrap();
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let v4 = parse_fib_trie(&read("/proc/thread-self/net/fib_trie"));
        let v6 = parse_if_inet6(&read("/proc/thread-self/net/if_inet6"));
        assert!(!v4.is_empty());
        for address in v4.iter().chain(&v6) {
            assert!(dumped.contains(address), "{address}: {dumped:?}");
        }
        assert!(!HostWatch::open().unwrap().has_changed());
    }

    proptest! {
        #[test]
        fn any_messages_are_read(bytes: Vec<u8>, kind in 0u16..30, len in 0u32..80) {
            let mut addresses = Vec::new();
            parse_messages(&bytes, &mut addresses);
            let head = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]].concat();
            parse_messages(&[&head[..], &bytes].concat(), &mut addresses);
            parse_address(&[&[2, 0, 0, 0, 0, 0, 0, 0][..], &bytes].concat());
        }
    }
}
