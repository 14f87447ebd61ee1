//! The device's saved state, version 1: the MAC address and the MTU that the driver has read,
//! a byte that is 1 if it was notified that the link is up, and the bytes of the backend.

/// State of the device, version 1. The layout does not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetStateV1 {
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u16,
    pub(crate) link_up: bool,
    pub(crate) backend: Vec<u8>,
}

/// Maximum length of a backend's state in bytes.
pub(crate) const MAX_BACKEND: usize = 1 << 20;

impl NetStateV1 {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mtu = self.mtu.to_le_bytes();
        [&self.mac[..], &mtu, &[self.link_up.into()], &self.backend].concat()
    }

    /// Decodes the state; `None` if the bytes encode none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (mac, rest) = bytes.split_first_chunk()?;
        let (mtu, rest) = rest.split_first_chunk()?;
        let (link, backend) = rest.split_first()?;
        let sound = *link <= 1 && backend.len() <= MAX_BACKEND;
        sound.then(|| Self {
            mac: *mac,
            mtu: u16::from_le_bytes(*mtu),
            link_up: *link == 1,
            backend: backend.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes of version 1, which later programs must be able to read.
    #[test]
    fn the_encoding_does_not_change() {
        let state = NetStateV1 {
            mac: [2, 0x73, 0x6d, 0, 0, 1],
            mtu: 1500,
            link_up: true,
            backend: vec![7, 8],
        };
        let golden = [2, 0x73, 0x6d, 0, 0, 1, 0xdc, 5, 1, 7, 8];
        assert_eq!(state.encode(), golden);
        assert_eq!(NetStateV1::decode(&golden), Some(state));
    }

    #[test]
    fn malformed_state_is_refused() {
        let golden = [2, 0x73, 0x6d, 0, 0, 1, 0xdc, 5, 0];
        for len in 0..golden.len() {
            assert_eq!(NetStateV1::decode(&golden[..len]), None, "{len} bytes");
        }
        let mut link = golden;
        link[8] = 2;
        assert_eq!(NetStateV1::decode(&link), None);
        let long = [&golden[..], &vec![0; MAX_BACKEND + 1]].concat();
        assert_eq!(NetStateV1::decode(&long), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            if let Some(state) = NetStateV1::decode(&bytes) {
                prop_assert_eq!(state.encode(), bytes);
            }
        }
    }
}
