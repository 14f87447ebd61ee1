//! ICMP for IPv4 (RFC 792) and IPv6 (RFC 4443), with neighbour discovery (RFC 4861).

use std::net::{IpAddr, Ipv6Addr};

use super::{
    Checksum, EtherType, EthernetHeader, HEAD, Head, IpPacket, IpProtocol, MacAddress,
    MalformedFrame,
};

/// Bytes of a transport header that an error quotes.
pub const QUOTED_TRANSPORT: usize = 8;
/// Length of an IPv6 header without extensions.
const MAX_IP_HEADER: usize = 40;
/// Length of an ICMP header.
const HEADER: usize = 8;

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const TIME_EXCEEDED: u8 = 11;
const V6_UNREACHABLE: u8 = 1;
const V6_TOO_BIG: u8 = 2;
const V6_TIME_EXCEEDED: u8 = 3;
const V6_ECHO_REQUEST: u8 = 128;
const V6_ECHO_REPLY: u8 = 129;
const V6_SOLICITATION: u8 = 135;
const V6_ADVERTISEMENT: u8 = 136;
/// Options of neighbour discovery: the sender's or the target's Ethernet address.
const TARGET_ADDRESS: u8 = 2;

/// A request for an echo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IcmpEcho {
    /// The number of the requesting program.
    pub id: u16,
    /// The number of the request.
    pub sequence: u16,
    /// Length of the payload, which follows a header of eight bytes.
    pub payload: usize,
}

impl IcmpEcho {
    /// Length of the header in bytes.
    pub const LEN: usize = HEADER;

    /// Parses a request of the family of `protocol` from the beginning of an IP packet's `len`
    /// bytes of content; `None` for other messages.
    #[must_use]
    pub fn parse(protocol: IpProtocol, transport: &[u8], len: usize) -> Option<Self> {
        let expected = match protocol {
            IpProtocol::ICMP => ECHO_REQUEST,
            IpProtocol::ICMPV6 => V6_ECHO_REQUEST,
            _ => return None,
        };
        let &[kind, 0, _, _, a, b, c, d] = transport.first_chunk::<HEADER>()? else {
            return None;
        };
        (kind == expected).then_some(Self {
            id: u16::from_be_bytes([a, b]),
            sequence: u16::from_be_bytes([c, d]),
            payload: len.checked_sub(HEADER)?,
        })
    }

    /// Parses a reply that a host socket received; `None` for other messages.
    #[must_use]
    pub fn parse_reply(v6: bool, message: &[u8]) -> Option<(Self, &[u8])> {
        let expected = if v6 { V6_ECHO_REPLY } else { ECHO_REPLY };
        let (header, payload) = message.split_first_chunk::<HEADER>()?;
        let &[kind, 0, _, _, a, b, c, d] = header else {
            return None;
        };
        let echo = Self {
            id: u16::from_be_bytes([a, b]),
            sequence: u16::from_be_bytes([c, d]),
            payload: payload.len(),
        };
        (kind == expected).then_some((echo, payload))
    }

    /// Header of the request for a host socket, which completes the checksum of IPv6.
    #[must_use]
    pub fn request(&self, v6: bool, payload: &[u8]) -> [u8; HEADER] {
        let kind = if v6 { V6_ECHO_REQUEST } else { ECHO_REQUEST };
        let mut header = self.header(kind);
        if !v6 {
            let mut sum = Checksum::new();
            sum.add(&header);
            sum.add(payload);
            header[2..4].copy_from_slice(&sum.complement().to_be_bytes());
        }
        header
    }

    fn header(&self, kind: u8) -> [u8; HEADER] {
        let [a, b] = self.id.to_be_bytes();
        let [c, d] = self.sequence.to_be_bytes();
        [kind, 0, 0, 0, a, b, c, d]
    }

    /// Header of the reply to the guest with `payload`, its checksum included.
    #[must_use]
    pub fn reply(&self, source: IpAddr, destination: IpAddr, payload: &[u8]) -> [u8; HEADER] {
        let (kind, mut sum) = match source {
            IpAddr::V4(_) => (ECHO_REPLY, Checksum::new()),
            IpAddr::V6(_) => {
                let len = u32::try_from(HEADER + payload.len()).unwrap_or(u32::MAX);
                let sum = Checksum::pseudo(source, destination, IpProtocol::ICMPV6, len);
                (V6_ECHO_REPLY, sum)
            }
        };
        let mut header = self.header(kind);
        sum.add(&header);
        sum.add(payload);
        header[2..4].copy_from_slice(&sum.complement().to_be_bytes());
        header
    }
}

/// Reason why a packet of the guest does not reach its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IcmpUnreachable {
    /// There is no route to its network.
    Network,
    /// The host does not answer.
    Host,
    /// The host has no such port.
    Port,
    /// A rule prohibits it.
    Prohibited,
    /// It is larger than packets of this size, in bytes, which is the largest.
    TooBig(u16),
    /// It may take no more hops.
    HopLimit,
}

impl IcmpUnreachable {
    /// Type, code, and the last two bytes of the header.
    fn numbers(self, v6: bool) -> (u8, u8, u16) {
        match (self, v6) {
            (Self::Network, false) => (UNREACHABLE, 0, 0),
            (Self::Host, false) => (UNREACHABLE, 1, 0),
            (Self::Port, false) => (UNREACHABLE, 3, 0),
            (Self::Prohibited, false) => (UNREACHABLE, 13, 0),
            (Self::TooBig(mtu), false) => (UNREACHABLE, 4, mtu),
            (Self::HopLimit, false) => (TIME_EXCEEDED, 0, 0),
            (Self::Network, true) => (V6_UNREACHABLE, 0, 0),
            (Self::Host, true) => (V6_UNREACHABLE, 3, 0),
            (Self::Port, true) => (V6_UNREACHABLE, 4, 0),
            (Self::Prohibited, true) => (V6_UNREACHABLE, 1, 0),
            (Self::TooBig(mtu), true) => (V6_TOO_BIG, 0, mtu),
            (Self::HopLimit, true) => (V6_TIME_EXCEEDED, 0, 0),
        }
    }

    /// Appends an error of `gateway` about the packet that `quoted` begins with: its IP header
    /// and at least [`QUOTED_TRANSPORT`] bytes; as much of it is quoted as `head` has room for.
    pub fn push(self, head: &mut Head, gateway: IpAddr, guest: IpAddr, quoted: &[u8]) {
        let v6 = gateway.is_ipv6();
        let (kind, code, info) = self.numbers(v6);
        let room = HEAD.saturating_sub(head.len() + MAX_IP_HEADER + HEADER);
        let quoted = quoted.get(..room).unwrap_or(quoted);
        let len = HEADER + quoted.len();
        let protocol = if v6 {
            IpProtocol::ICMPV6
        } else {
            IpProtocol::ICMP
        };
        let mut sum = if v6 {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            Checksum::pseudo(gateway, guest, protocol, len)
        } else {
            Checksum::new()
        };
        let [high, low] = info.to_be_bytes();
        let mut header = [kind, code, 0, 0, 0, 0, high, low];
        sum.add(&header);
        sum.add(quoted);
        header[2..4].copy_from_slice(&sum.complement().to_be_bytes());
        head.push_ip(gateway, guest, protocol, len, None);
        head.extend(&header);
        head.extend(quoted);
    }
}

/// The question for the owner of an IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NeighbourSolicitation {
    /// The address in question.
    pub target: Ipv6Addr,
}

impl NeighbourSolicitation {
    /// Parses a solicitation from the content of `packet`; `None` for other messages.
    ///
    /// # Errors
    /// The solicitation is truncated.
    pub fn parse(packet: &IpPacket, transport: &[u8]) -> Result<Option<Self>, MalformedFrame> {
        // Others may have passed a router (RFC 4861 7.1.1).
        if packet.protocol != IpProtocol::ICMPV6 || packet.hops != 255 {
            return Ok(None);
        }
        let content = transport.get(..packet.len).unwrap_or(transport);
        let Some((&[V6_SOLICITATION, 0, ..], rest)) = content.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let target = rest.first_chunk::<16>().ok_or(MalformedFrame::Truncated)?;
        Ok(Some(Self {
            target: (*target).into(),
        }))
    }
}

/// Returns the frame of an advertisement that `owner` has the address `target`.
#[must_use]
pub fn neighbour_advertisement(
    owner: MacAddress,
    target: Ipv6Addr,
    receiver: MacAddress,
    destination: Ipv6Addr,
) -> Head {
    const LEN: usize = HEADER + 16 + 8;
    // A router, which replaces earlier entries; solicited, unless all hosts are to know of a
    // duplicate (RFC 4861 7.2.4).
    let flags = if destination.is_multicast() {
        0xa0
    } else {
        0xe0
    };
    let mut head = Head::new();
    head.push(&EthernetHeader {
        destination: receiver,
        source: owner,
        ether_type: EtherType::IPV6,
    });
    let (source, destination) = (IpAddr::V6(target), IpAddr::V6(destination));
    head.push_ip(source, destination, IpProtocol::ICMPV6, LEN, None);
    let start = head.len();
    head.extend(&[V6_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0]);
    head.extend(&target.octets());
    head.extend(&[TARGET_ADDRESS, 1]);
    head.extend(&owner.0);
    let mut sum = Checksum::pseudo(source, destination, IpProtocol::ICMPV6, 32);
    sum.add(head.bytes().get(start..).unwrap_or_default());
    head.set_u16(start + 2, sum.complement());
    head
}
