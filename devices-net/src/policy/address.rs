//! Classes of addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Kind of an address, from the guest's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AddressClass {
    /// An address of the Internet.
    Public,
    /// An address of a private network (RFC 1918, 6598, 4193).
    Private,
    /// An address of the host, by which its own services are reached.
    Host,
    /// An address of a metadata service, or link-local.
    Metadata,
    /// A group, a broadcast or a reserved address.
    NotUnicast,
}

/// Metadata services outside the link-local ranges: AWS (IPv6), Azure, Alibaba.
const METADATA: [IpAddr; 3] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
];

/// Returns the address that is reached by `address`: that of an IPv4 host if it is in a form
/// for IPv6: mapped (RFC 4291), translated (RFC 6052), 6to4 (RFC 3056) or Teredo (RFC 4380).
#[must_use]
pub fn effective_address(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    let [a, b, c, d, e, f, g, h] = v6.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match [a, b, c, d, e, f] {
        // Unspecified and loopback are of IPv6; other compatible addresses are not used.
        [0, 0, 0, 0, 0, 0] if g != 0 || h > 1 => v4(g, h),
        [0, 0, 0, 0, 0, 0xffff] | [0, 0, 0, 0, 0xffff, 0] | [0x64, 0xff9b, 0, 0, 0, 0] => v4(g, h),
        [0x2002, high, low, ..] => v4(high, low),
        // The bits of the client's address are inverted.
        [0x2001, 0, ..] => v4(!g, !h),
        _ => address,
    }
}

/// Addresses of the host's interfaces, and of gateways that stand for the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostAddresses {
    addresses: Vec<IpAddr>,
}

impl HostAddresses {
    /// Creates the list.
    #[must_use]
    pub fn new(mut addresses: Vec<IpAddr>) -> Self {
        addresses.sort_unstable();
        addresses.dedup();
        Self { addresses }
    }

    /// Returns the class of an address, which is an
    /// [effective](effective_address) one.
    #[must_use]
    pub fn classify(&self, address: IpAddr) -> AddressClass {
        let is_own = self.addresses.binary_search(&address).is_ok();
        match address {
            // Connecting to the unspecified address reaches the loopback interface.
            _ if address.is_loopback() || address.is_unspecified() || is_own => AddressClass::Host,
            _ if address.is_multicast() => AddressClass::NotUnicast,
            _ if METADATA.contains(&address) => AddressClass::Metadata,
            IpAddr::V4(address) => class_v4(address),
            IpAddr::V6(address) => class_v6(address),
        }
    }
}

fn class_v4(address: Ipv4Addr) -> AddressClass {
    match address.octets() {
        // "This network" (RFC 1122): the host itself.
        [0, ..] => AddressClass::Host,
        [169, 254, ..] => AddressClass::Metadata,
        [10, ..]
        | [172, 16..=31, ..]
        | [192, 168, ..]
        | [100, 64..=127, ..]
        | [192, 0, 0, _]
        | [198, 18..=19, ..] => AddressClass::Private,
        [240..=255, ..] => AddressClass::NotUnicast,
        _ => AddressClass::Public,
    }
}

fn class_v6(address: Ipv6Addr) -> AddressClass {
    match address.segments() {
        [0xfe80..=0xfebf, ..] => AddressClass::Metadata,
        // Unique local, site-local (deprecated), and local translation (RFC 8215).
        [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] | [0x64, 0xff9b, 1, ..] => {
            AddressClass::Private
        }
        [0x2000..=0x3fff, ..] => AddressClass::Public,
        _ => AddressClass::NotUnicast,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_class_of_what_they_reach() {
        let host = HostAddresses::new(vec![
            "203.0.113.9".parse().unwrap(),
            "2001:db8::9".parse().unwrap(),
            "192.168.1.9".parse().unwrap(),
        ]);
        for (class, addresses) in [
            (
                AddressClass::Host,
                "127.0.0.1 127.255.255.255 0.0.0.0 0.1.2.3 ::1 :: 203.0.113.9 2001:db8::9 \
                 192.168.1.9 ::ffff:127.0.0.1 ::ffff:0.0.0.0 ::ffff:203.0.113.9 ::127.0.0.1 \
                 64:ff9b::127.0.0.1 64:ff9b::203.0.113.9 2002:7f00:1:: 2002:7f00:1:1::1 \
                 2002:cb00:7109::1 ::ffff:0:127.0.0.1 2001::80ff:fffe",
            ),
            (
                AddressClass::Metadata,
                "169.254.169.254 169.254.0.1 fe80::1 febf::1 fd00:ec2::254 168.63.129.16 \
                 100.100.100.200 ::ffff:169.254.169.254 64:ff9b::a9fe:a9fe 2002:a9fe:a9fe::",
            ),
            (
                AddressClass::Private,
                "10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 100.64.0.1 \
                 100.127.255.255 192.0.0.8 198.18.0.1 198.19.255.255 fc00::1 fd12::1 fec0::1 \
                 64:ff9b:1::1 ::ffff:10.0.0.1 64:ff9b::10.0.0.1 2002:a00:1::",
            ),
            (
                AddressClass::NotUnicast,
                "224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 ff02::1 ff0e::1 \
                 ::ffff:224.0.0.1 4000::1 100::1 2002:e000:1::",
            ),
            (
                AddressClass::Public,
                "1.1.1.1 9.255.255.255 11.0.0.0 126.0.0.1 128.0.0.1 172.15.0.1 172.32.0.1 \
                 192.167.0.1 192.169.0.1 192.0.2.1 100.63.0.1 100.128.0.1 169.253.0.1 \
                 169.255.0.1 198.17.0.1 198.20.0.1 223.255.255.255 203.0.113.8 2600::1 \
                 2001:db8::8 ::ffff:1.1.1.1 64:ff9b::1.1.1.1 2002:101:101::",
            ),
        ] {
            for text in addresses.split_whitespace() {
                let address = effective_address(text.parse().unwrap());
                assert_eq!(host.classify(address), class, "{text}");
            }
        }
    }
}
