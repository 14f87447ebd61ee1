//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

use super::IpProtocol;

/// A sum of bytes that may be given in parts of any length.
///
/// ```
/// use sm_devices_net::wire::Checksum;
///
/// let mut whole = Checksum::new();
/// whole.add(&[0x12, 0x34, 0x56]);
/// let mut parts = Checksum::new();
/// parts.add(&[0x12]);
/// parts.add(&[0x34, 0x56]);
/// assert_eq!(whole.complement(), parts.complement());
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum {
    sum: u64,
    /// True after an odd number of bytes: the next one is the lower half of a word.
    odd: bool,
}

impl Checksum {
    /// The sum of no bytes.
    #[must_use]
    pub const fn new() -> Self {
        Self { sum: 0, odd: false }
    }

    /// The sum of the pseudo header of a transport of `len` bytes (RFC 9293 3.1, RFC 8200
    /// 8.1). Addresses of two families are summed as they are.
    #[must_use]
    pub fn pseudo(source: IpAddr, destination: IpAddr, protocol: IpProtocol, len: u32) -> Self {
        let mut sum = Self::new();
        for address in [source, destination] {
            match address {
                IpAddr::V4(address) => sum.add(&address.octets()),
                IpAddr::V6(address) => sum.add(&address.octets()),
            }
        }
        sum.add(&len.to_be_bytes());
        sum.add(&[0, protocol.0]);
        sum
    }

    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if self.odd
            && let Some((first, rest)) = bytes.split_first()
        {
            self.sum += u64::from(*first);
            self.odd = false;
            bytes = rest;
        }
        // 2^48 words, which no packet has, fit the sum.
        let (words, rest) = bytes.as_chunks::<2>();
        self.sum += words
            .iter()
            .map(|word| u64::from(u16::from_be_bytes(*word)))
            .sum::<u64>();
        if let [last] = rest {
            self.sum += u64::from(*last) << 8;
            self.odd = true;
        }
    }

    /// The sum in one word: the content of a checksum field that the receiver completes.
    #[must_use]
    pub fn folded(self) -> u16 {
        let mut sum = self.sum;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        // The loop ends with at most 16 bits.
        u16::try_from(sum).unwrap_or(u16::MAX)
    }

    /// The content of a complete checksum field.
    #[must_use]
    pub fn complement(self) -> u16 {
        !self.folded()
    }
}
