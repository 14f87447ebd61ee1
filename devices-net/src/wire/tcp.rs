//! TCP headers (RFC 9293).

use std::net::IpAddr;

use zerocopy::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Checksum, Head, IpProtocol, MalformedFrame};

const OPTION_END: u8 = 0;
const OPTION_NOTHING: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_SCALE: u8 = 3;
/// Maximum window scale (RFC 7323 2.3).
const MAX_SCALE: u8 = 14;

/// Flags of a segment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// The sender sends no more data.
    pub const FIN: Self = Self(1);
    /// The first segment.
    pub const SYN: Self = Self(2);
    /// The connection is reset.
    pub const RST: Self = Self(4);
    /// The receiver should not wait for more data.
    pub const PSH: Self = Self(8);
    /// The acknowledgment number is valid.
    pub const ACK: Self = Self(16);

    /// Returns true if all flags of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::fmt::Debug for TcpFlags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [
            (Self::SYN, "S"),
            (Self::FIN, "F"),
            (Self::RST, "R"),
            (Self::PSH, "P"),
            (Self::ACK, "."),
        ];
        let set = names.iter().filter(|(flag, _)| self.has(*flag));
        set.map(|(_, name)| name)
            .try_for_each(|name| f.write_str(name))
    }
}

/// A segment's header without options.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TcpHeader {
    source: U16,
    destination: U16,
    sequence: U32,
    acknowledgment: U32,
    /// Length of the header in words, in the upper four bits.
    len: u8,
    flags: u8,
    window: U16,
    checksum: U16,
    urgent: U16,
}

/// The options of a SYN that are understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SynOptions {
    /// Maximum payload of a segment that the sender accepts.
    pub mss: Option<u16>,
    /// Number of bits by which windows of the sender are shifted, at most 14.
    pub scale: Option<u8>,
}

impl SynOptions {
    fn parse(options: &[u8]) -> Self {
        let mut parsed = Self::default();
        let mut rest = options;
        loop {
            rest = match *rest {
                [] | [OPTION_END, ..] => return parsed,
                [OPTION_NOTHING, ref after @ ..] => after,
                [kind, len, ref after @ ..] => {
                    let len = usize::from(len).saturating_sub(2);
                    // A length without an end ends the list.
                    let Some((value, after)) = after.split_at_checked(len) else {
                        return parsed;
                    };
                    match (kind, value) {
                        (OPTION_MSS, &[high, low]) => {
                            parsed.mss = Some(u16::from_be_bytes([high, low]));
                        }
                        (OPTION_SCALE, &[scale]) => parsed.scale = Some(scale.min(MAX_SCALE)),
                        _ => {}
                    }
                    after
                }
                [_] => return parsed,
            };
        }
    }
}

/// A segment of the guest, or the header of one for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TcpSegment {
    /// Port of the sender.
    pub source: u16,
    /// Port of the receiver.
    pub destination: u16,
    /// Number of the first byte.
    pub sequence: u32,
    /// Number of the next byte that the sender expects.
    pub acknowledgment: u32,
    /// Flags.
    pub flags: TcpFlags,
    /// Window of the sender, not shifted.
    pub window: u16,
    /// Options, if it is a SYN.
    pub options: SynOptions,
    /// Length of header and options.
    pub header_len: usize,
    /// Length of the payload.
    pub payload: usize,
}

impl TcpSegment {
    /// Offset of the checksum in the header.
    pub const CHECKSUM: u16 = 16;

    /// Creates a segment without payload, options and window.
    #[must_use]
    pub const fn new(source: u16, destination: u16, flags: TcpFlags) -> Self {
        Self {
            source,
            destination,
            sequence: 0,
            acknowledgment: 0,
            flags,
            window: 0,
            options: SynOptions {
                mss: None,
                scale: None,
            },
            header_len: size_of::<TcpHeader>(),
            payload: 0,
        }
    }

    /// Parses a segment from the beginning of an IP packet's `len` bytes of content.
    ///
    /// # Errors
    /// The segment is truncated, or its header's length is wrong.
    pub fn parse(transport: &[u8], len: usize) -> Result<Self, MalformedFrame> {
        let (header, _) =
            TcpHeader::read_from_prefix(transport).map_err(|_| MalformedFrame::Truncated)?;
        let header_len = usize::from(header.len >> 4) * 4;
        if header_len < size_of::<TcpHeader>() {
            return Err(MalformedFrame::Length);
        }
        let payload = len.checked_sub(header_len).ok_or(MalformedFrame::Length)?;
        let options = transport.get(size_of::<TcpHeader>()..header_len);
        let flags = TcpFlags(header.flags);
        Ok(Self {
            source: header.source.get(),
            destination: header.destination.get(),
            sequence: header.sequence.get(),
            acknowledgment: header.acknowledgment.get(),
            flags,
            window: header.window.get(),
            options: match options {
                Some(options) if flags.has(TcpFlags::SYN) => SynOptions::parse(options),
                _ => SynOptions::default(),
            },
            header_len,
            payload,
        })
    }

    /// Number of sequence numbers that the segment takes.
    #[must_use]
    pub fn sequence_len(&self) -> u32 {
        let flags = [TcpFlags::SYN, TcpFlags::FIN];
        let flags = flags.into_iter().filter(|flag| self.flags.has(*flag));
        // A packet has fewer than 2^16 bytes.
        let len = self.payload + flags.count();
        u32::try_from(len).unwrap_or(0)
    }

    /// The length of the segment's header when it is built.
    #[must_use]
    pub fn built_len(&self) -> usize {
        let mss = self.options.mss.map_or(0, |_| 4);
        let scale = self.options.scale.map_or(0, |_| 4);
        size_of::<TcpHeader>() + mss + scale
    }
}

impl Head {
    /// Appends the header of a segment between two hosts, whose checksum is the sum of the
    /// pseudo header, for the receiver to complete.
    pub fn push_tcp(&mut self, source: IpAddr, destination: IpAddr, segment: &TcpSegment) {
        let header_len = segment.built_len();
        let total = u32::try_from(header_len + segment.payload).unwrap_or(u32::MAX);
        let sum = Checksum::pseudo(source, destination, IpProtocol::TCP, total);
        self.push(&TcpHeader {
            source: U16::new(segment.source),
            destination: U16::new(segment.destination),
            sequence: U32::new(segment.sequence),
            acknowledgment: U32::new(segment.acknowledgment),
            // 28 at most.
            len: u8::try_from(header_len / 4).unwrap_or(5) << 4,
            flags: segment.flags.0,
            window: U16::new(segment.window),
            checksum: U16::new(sum.folded()),
            urgent: U16::ZERO,
        });
        if let Some(mss) = segment.options.mss {
            let [high, low] = mss.to_be_bytes();
            self.extend(&[OPTION_MSS, 4, high, low]);
        }
        if let Some(scale) = segment.options.scale {
            self.extend(&[OPTION_NOTHING, OPTION_SCALE, 3, scale]);
        }
    }
}
