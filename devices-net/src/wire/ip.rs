//! IPv4 (RFC 791) and IPv6 (RFC 8200).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Checksum, EtherType, EthernetHeader, Head, MalformedFrame};

/// Maximum length of a packet whose length is a field of 16 bits.
pub const MAX_IP_PACKET: usize = 65_535;
/// Maximum number of IPv6 extension headers.
const MAX_EXTENSIONS: usize = 8;
/// Hops of packets to the guest.
const HOPS: u8 = 64;

/// The number of a transport or extension header (IANA protocol numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpProtocol(pub u8);

impl IpProtocol {
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);

    const HOP_BY_HOP: Self = Self(0);
    const ROUTING: Self = Self(43);
    const FRAGMENT: Self = Self(44);
    const DESTINATION_OPTIONS: Self = Self(60);
}

/// The header of an IPv4 packet, without options.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv4Header {
    version_and_len: u8,
    service: u8,
    total_len: U16,
    id: U16,
    /// Flags in the upper three bits, and the offset of a fragment in units of 8 bytes.
    fragment: U16,
    hops: u8,
    protocol: u8,
    checksum: U16,
    source: [u8; 4],
    destination: [u8; 4],
}

const DONT_FRAGMENT: u16 = 1 << 14;
const MORE_FRAGMENTS: u16 = 1 << 13;

/// The header of an IPv6 packet, without extensions.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv6Header {
    version_and_flow: U32,
    payload_len: U16,
    next: u8,
    hops: u8,
    source: [u8; 16],
    destination: [u8; 16],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FragmentHeader {
    next: u8,
    reserved: u8,
    /// The offset in units of 8 bytes in the upper 13 bits; the lowest means "more".
    offset: U16,
    id: U32,
}

/// The position of a fragment in its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The number that all fragments of one packet have.
    pub id: u32,
    /// Offset of the fragment's bytes, a multiple of 8.
    pub offset: u16,
    /// Others follow.
    pub more: bool,
}

/// An IP packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IpPacket {
    /// The sender, as it says.
    pub source: IpAddr,
    /// The receiver.
    pub destination: IpAddr,
    /// The transport.
    pub protocol: IpProtocol,
    /// The number of hops that it may still take.
    pub hops: u8,
    /// Offset of the transport header in the frame.
    pub offset: usize,
    /// Length of the transport header and all that follows it in the packet.
    pub len: usize,
    /// The packet is a fragment.
    pub fragment: Option<Fragment>,
    /// No router may cut it into fragments.
    pub dont_fragment: bool,
}

impl IpPacket {
    /// Parses a packet of the family that `ether_type` says; `None` for other types. `head`
    /// is the beginning of a frame of `frame_len` bytes, its Ethernet header included.
    ///
    /// # Errors
    /// The packet is malformed.
    pub fn parse(
        ether_type: EtherType,
        head: &[u8],
        frame_len: usize,
    ) -> Result<Option<Self>, MalformedFrame> {
        match ether_type {
            EtherType::IPV4 => Self::parse_v4(head, frame_len).map(Some),
            EtherType::IPV6 => Self::parse_v6(head, frame_len).map(Some),
            _ => Ok(None),
        }
    }

    fn parse_v4(head: &[u8], frame_len: usize) -> Result<Self, MalformedFrame> {
        let start = EthernetHeader::LEN;
        let (header, _) = Ipv4Header::read_from_prefix(head.get(start..).unwrap_or_default())
            .map_err(|_| MalformedFrame::Truncated)?;
        if header.version_and_len >> 4 != 4 {
            return Err(MalformedFrame::Version);
        }
        let header_len = usize::from(header.version_and_len & 15) * 4;
        let total = usize::from(header.total_len.get());
        // A frame may have padding.
        if header_len < size_of::<Ipv4Header>() || total < header_len || frame_len < start + total {
            return Err(MalformedFrame::Length);
        }
        let bits = header.fragment.get();
        let fragment = Fragment {
            id: header.id.get().into(),
            offset: bits << 3,
            more: bits & MORE_FRAGMENTS != 0,
        };
        Ok(Self {
            source: Ipv4Addr::from(header.source).into(),
            destination: Ipv4Addr::from(header.destination).into(),
            protocol: IpProtocol(header.protocol),
            hops: header.hops,
            offset: start + header_len,
            len: total - header_len,
            fragment: (fragment.more || fragment.offset > 0).then_some(fragment),
            dont_fragment: bits & DONT_FRAGMENT != 0,
        })
    }

    fn parse_v6(head: &[u8], frame_len: usize) -> Result<Self, MalformedFrame> {
        let start = EthernetHeader::LEN;
        let (header, _) = Ipv6Header::read_from_prefix(head.get(start..).unwrap_or_default())
            .map_err(|_| MalformedFrame::Truncated)?;
        if header.version_and_flow.get() >> 28 != 6 {
            return Err(MalformedFrame::Version);
        }
        let mut packet = Self {
            source: Ipv6Addr::from(header.source).into(),
            destination: Ipv6Addr::from(header.destination).into(),
            protocol: IpProtocol(header.next),
            hops: header.hops,
            offset: start + size_of::<Ipv6Header>(),
            len: usize::from(header.payload_len.get()),
            fragment: None,
            dont_fragment: true,
        };
        if frame_len < packet.offset + packet.len {
            return Err(MalformedFrame::Length);
        }
        for _ in 0..=MAX_EXTENSIONS {
            if !packet.skip_extension(head)? {
                return Ok(packet);
            }
        }
        Err(MalformedFrame::Extensions)
    }

    /// Skips the next extension header; returns false if there is none.
    fn skip_extension(&mut self, head: &[u8]) -> Result<bool, MalformedFrame> {
        let rest = head.get(self.offset..).unwrap_or_default();
        let len = match self.protocol {
            IpProtocol::HOP_BY_HOP | IpProtocol::ROUTING | IpProtocol::DESTINATION_OPTIONS => {
                // All that follows the first fragment's header is content of the others.
                if self.fragment.is_some_and(|fragment| fragment.offset > 0) {
                    return Ok(false);
                }
                let [next, len, _kind, left, ..] = *rest else {
                    return Err(MalformedFrame::Extensions);
                };
                // This is not a router of the guest's choice (RFC 5095).
                if self.protocol == IpProtocol::ROUTING && left != 0 {
                    return Err(MalformedFrame::Extensions);
                }
                self.protocol = IpProtocol(next);
                8 + 8 * usize::from(len)
            }
            IpProtocol::FRAGMENT => {
                let (header, _) = FragmentHeader::read_from_prefix(rest)
                    .map_err(|_| MalformedFrame::Extensions)?;
                if self.fragment.is_some() {
                    return Err(MalformedFrame::Extensions);
                }
                let bits = header.offset.get();
                self.fragment = Some(Fragment {
                    id: header.id.get(),
                    offset: bits & !7,
                    more: bits & 1 != 0,
                });
                self.protocol = IpProtocol(header.next);
                size_of::<FragmentHeader>()
            }
            _ => return Ok(false),
        };
        self.len = self.len.checked_sub(len).ok_or(MalformedFrame::Length)?;
        self.offset += len;
        // An atomic fragment (RFC 6946) is a whole packet.
        let whole = Fragment {
            id: 0,
            offset: 0,
            more: false,
        };
        if (self.fragment).is_some_and(|fragment| Fragment { id: 0, ..fragment } == whole) {
            self.fragment = None;
        }
        Ok(true)
    }
}

impl Head {
    /// Appends an IP header for a transport of `len` bytes, and a fragment's if `fragment` is
    /// one. Addresses must be of one family; lengths beyond 16 bits are truncated by callers.
    pub fn push_ip(
        &mut self,
        source: IpAddr,
        destination: IpAddr,
        protocol: IpProtocol,
        len: usize,
        fragment: Option<Fragment>,
    ) {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let bits = fragment.map_or(DONT_FRAGMENT, |fragment| {
                    let more = if fragment.more { MORE_FRAGMENTS } else { 0 };
                    fragment.offset >> 3 | more
                });
                let id = fragment.map_or(0, |fragment| fragment.id & 0xffff);
                let mut header = Ipv4Header {
                    version_and_len: 4 << 4 | 5,
                    service: 0,
                    total_len: length(len + size_of::<Ipv4Header>()),
                    id: U16::new(u16::try_from(id).unwrap_or(0)),
                    fragment: U16::new(bits),
                    hops: HOPS,
                    protocol: protocol.0,
                    checksum: U16::ZERO,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                let mut sum = Checksum::new();
                sum.add(header.as_bytes());
                header.checksum = U16::new(sum.complement());
                self.push(&header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.push_ip_v6(source, destination, protocol, len, fragment);
            }
            // The callers' addresses are those of one packet or flow.
            _ => {}
        }
    }

    fn push_ip_v6(
        &mut self,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        protocol: IpProtocol,
        len: usize,
        fragment: Option<Fragment>,
    ) {
        let extension = fragment.map(|fragment| FragmentHeader {
            next: protocol.0,
            reserved: 0,
            offset: U16::new(fragment.offset & !7 | u16::from(fragment.more)),
            id: U32::new(fragment.id),
        });
        let extension_len = extension.map_or(0, |_| size_of::<FragmentHeader>());
        self.push(&Ipv6Header {
            version_and_flow: U32::new(6 << 28),
            payload_len: length(len + extension_len),
            next: extension.map_or(protocol.0, |_| IpProtocol::FRAGMENT.0),
            // Neighbour discovery requires 255 (RFC 4861 7.1.2), which is right for others.
            hops: if protocol == IpProtocol::ICMPV6 {
                255
            } else {
                HOPS
            },
            source: source.octets(),
            destination: destination.octets(),
        });
        if let Some(extension) = extension {
            self.push(&extension);
        }
    }
}

fn length(len: usize) -> U16 {
    U16::new(u16::try_from(len).unwrap_or(u16::MAX))
}
