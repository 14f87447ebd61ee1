//! UDP (RFC 768).

use std::net::IpAddr;

use zerocopy::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Checksum, IpProtocol, MalformedFrame};

/// The header of a datagram.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct UdpHeader {
    /// Port of the sender.
    pub source: U16,
    /// Port of the receiver.
    pub destination: U16,
    /// Length of header and payload.
    pub len: U16,
    /// Checksum, or a part of it.
    pub checksum: U16,
}

impl UdpHeader {
    /// Length in bytes.
    pub const LEN: usize = 8;
    /// Offset of the checksum.
    pub const CHECKSUM: u16 = 6;

    /// Parses a header from the beginning of an IP packet's `len` bytes of content; returns it
    /// with the length of the payload.
    ///
    /// # Errors
    /// The datagram is truncated, or its length is wrong.
    pub fn parse(transport: &[u8], len: usize) -> Result<(Self, usize), MalformedFrame> {
        let (header, _) =
            Self::read_from_prefix(transport).map_err(|_| MalformedFrame::Truncated)?;
        let total = usize::from(header.len.get());
        if total > len {
            return Err(MalformedFrame::Length);
        }
        let payload = total.checked_sub(Self::LEN);
        Ok((header, payload.ok_or(MalformedFrame::Length)?))
    }

    /// Creates the header of a datagram with `payload` bytes; its checksum is the sum of the
    /// pseudo header, for the receiver to complete.
    #[must_use]
    pub fn new(source: (IpAddr, u16), destination: (IpAddr, u16), payload: usize) -> Self {
        let len = u16::try_from(payload + Self::LEN).unwrap_or(u16::MAX);
        let sum = Checksum::pseudo(source.0, destination.0, IpProtocol::UDP, len.into());
        Self {
            source: U16::new(source.1),
            destination: U16::new(destination.1),
            len: U16::new(len),
            checksum: U16::new(sum.folded()),
        }
    }

    /// Completes the checksum by the header and `payload`.
    pub fn complete(&mut self, payload: &[u8]) {
        let mut sum = Checksum::new();
        sum.add(self.as_bytes());
        sum.add(payload);
        // Zero means "no checksum".
        let sum = match sum.complement() {
            0 => u16::MAX,
            sum => sum,
        };
        self.checksum = U16::new(sum);
    }
}
