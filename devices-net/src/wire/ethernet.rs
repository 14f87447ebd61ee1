//! Ethernet II frames.

use std::fmt;

use zerocopy::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::MalformedFrame;

/// An Ethernet address.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The address of every station.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Returns true for addresses of one station.
    #[must_use]
    pub const fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The type of a frame's content (IEEE 802 numbers).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct EtherType(pub U16);

impl EtherType {
    /// IPv4.
    pub const IPV4: Self = Self(U16::new(0x0800));
    /// ARP.
    pub const ARP: Self = Self(U16::new(0x0806));
    /// IPv6.
    pub const IPV6: Self = Self(U16::new(0x86dd));
}

/// The header of a frame.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct EthernetHeader {
    /// The receiver.
    pub destination: MacAddress,
    /// The sender.
    pub source: MacAddress,
    /// The type of the content.
    pub ether_type: EtherType,
}

impl EthernetHeader {
    /// Length in bytes.
    pub const LEN: usize = 14;

    /// Returns the header, and the bytes that follow it.
    ///
    /// # Errors
    /// There are fewer bytes than a header has.
    pub fn parse(head: &[u8]) -> Result<(Self, &[u8]), MalformedFrame> {
        Self::read_from_prefix(head).map_err(|_| MalformedFrame::Truncated)
    }
}
