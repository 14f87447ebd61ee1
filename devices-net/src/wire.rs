//! Headers of packets: Ethernet, ARP, IPv4, IPv6, ICMP, UDP, TCP.
//!
//! A parser gets the first [`HEAD`] bytes of a frame, copied out of the guest's memory, and
//! the length of the whole frame; payload is never looked at. It returns offsets into the
//! frame, all of them checked against that length. Builders write into a [`Head`] of fixed
//! size.
//!
//! Architecture invariants: no parser allocates, panics or loops more often than there are
//! bytes; an offset and a length that one returns lie inside the frame.

mod arp;
mod checksum;
mod ethernet;
mod head;
mod icmp;
mod ip;
mod tcp;
mod udp;

pub use self::arp::ArpRequest;
pub use self::checksum::Checksum;
pub use self::ethernet::{EtherType, EthernetHeader, MacAddress};
pub use self::head::Head;
pub use self::icmp::{
    IcmpEcho, IcmpUnreachable, NeighbourSolicitation, QUOTED_TRANSPORT, neighbour_advertisement,
};
pub use self::ip::{Fragment, IpPacket, IpProtocol, Ipv4Header, Ipv6Header, MAX_IP_PACKET};
pub use self::tcp::{SynOptions, TcpFlags, TcpHeader, TcpSegment};
pub use self::udp::UdpHeader;

/// Number of bytes of a frame that parsers need: headers of all layers. IPv4 and TCP with all
/// their options have 134; the rest is for extension headers of IPv6.
pub const HEAD: usize = 192;

/// Reason why a frame was not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MalformedFrame {
    /// The frame ends within a header.
    #[error("the frame ends within a header")]
    Truncated,
    /// A field of a header contradicts another, or the length of the frame.
    #[error("a length in a header is wrong")]
    Length,
    /// An IP version other than that of the Ethernet header.
    #[error("the IP version is wrong")]
    Version,
    /// More, or other, IPv6 extension headers than are supported.
    #[error("its extension headers are not supported")]
    Extensions,
}

#[cfg(test)]
mod tests;
