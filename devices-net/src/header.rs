//! The header of each frame, `struct virtio_net_hdr` (virtio 1.3 section 5.1.6).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Length of the header in bytes. With VERSION_1 it always has the number of buffers.
pub const HEADER_LEN: u32 = 12;

/// Longest frame in bytes: an IP packet of 64 KiB behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: u32 = 65_535 + 14 + 4;

/// The kind of segments into which a frame has to be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GsoType {
    /// The frame is one packet.
    #[default]
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// A number that the device has not offered; from a guest only.
    Other(u8),
}

/// The header of a frame, without the number of buffers, which the device counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// The checksum from `csum_start` on is still to be computed, and stored `csum_offset`
    /// bytes behind that. There is the sum of the pseudo header.
    pub needs_csum: bool,
    /// The kind of segments.
    pub gso: GsoType,
    /// Length of all headers of a frame with segments, in bytes; a hint.
    pub hdr_len: u16,
    /// Payload of each segment in bytes.
    pub gso_size: u16,
    /// Start of the bytes to sum up, from the start of the frame.
    pub csum_start: u16,
    /// Position of the checksum behind `csum_start`.
    pub csum_offset: u16,
}

impl NetHeader {
    /// Decodes the header of a frame of the guest. Every value is possible: lengths and
    /// offsets are the guest's, and none is checked.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_LEN as usize]) -> Self {
        let [
            flags,
            gso,
            hdr_a,
            hdr_b,
            size_a,
            size_b,
            start_a,
            start_b,
            offset_a,
            offset_b,
            ..,
        ] = *bytes;
        Self {
            needs_csum: u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0,
            // Congestion marks are for the segments' TCP headers, which are copied anyway.
            gso: match u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN {
                VIRTIO_NET_HDR_GSO_NONE => GsoType::None,
                VIRTIO_NET_HDR_GSO_TCPV4 => GsoType::TcpV4,
                VIRTIO_NET_HDR_GSO_TCPV6 => GsoType::TcpV6,
                _ => GsoType::Other(gso),
            },
            hdr_len: u16::from_le_bytes([hdr_a, hdr_b]),
            gso_size: u16::from_le_bytes([size_a, size_b]),
            csum_start: u16::from_le_bytes([start_a, start_b]),
            csum_offset: u16::from_le_bytes([offset_a, offset_b]),
        }
    }

    /// Encodes the header of a frame for the guest, which is in `buffers` receive buffers.
    #[must_use]
    pub fn encode(&self, buffers: u16) -> [u8; HEADER_LEN as usize] {
        // The constants have eight bits.
        let byte = |value: u32| u8::try_from(value).unwrap_or(0);
        let flags = match self.needs_csum {
            true => byte(VIRTIO_NET_HDR_F_NEEDS_CSUM),
            false => 0,
        };
        let gso = match self.gso {
            GsoType::None => byte(VIRTIO_NET_HDR_GSO_NONE),
            GsoType::TcpV4 => byte(VIRTIO_NET_HDR_GSO_TCPV4),
            GsoType::TcpV6 => byte(VIRTIO_NET_HDR_GSO_TCPV6),
            GsoType::Other(number) => number,
        };
        let [hdr_a, hdr_b] = self.hdr_len.to_le_bytes();
        let [size_a, size_b] = self.gso_size.to_le_bytes();
        let [start_a, start_b] = self.csum_start.to_le_bytes();
        let [offset_a, offset_b] = self.csum_offset.to_le_bytes();
        let [buffers_a, buffers_b] = buffers.to_le_bytes();
        [
            flags, gso, hdr_a, hdr_b, size_a, size_b, start_a, start_b, offset_a, offset_b,
            buffers_a, buffers_b,
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_layout_is_that_of_the_specification() {
        let bytes = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 3, 0];
        let header = NetHeader {
            needs_csum: true,
            gso: GsoType::TcpV4,
            hdr_len: 54,
            gso_size: 1460,
            csum_start: 34,
            csum_offset: 16,
        };
        assert_eq!(NetHeader::decode(&bytes), header);
        assert_eq!(header.encode(3), bytes);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header(bytes: [u8; HEADER_LEN as usize]) {
            let header = NetHeader::decode(&bytes);
            prop_assert_eq!(NetHeader::decode(&header.encode(1)), header);
        }
    }
}
