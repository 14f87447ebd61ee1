//! The device's saved state. Version 2 is the guest's CID, then the host port at which the
//! search for a free one continues. Each is an unsigned LEB128 number, the encoding of
//! postcard, which earlier versions used.

/// Version of the state that [`Vsock`](crate::Vsock) saves and restores.
pub const STATE_VERSION: u32 = 2;

/// State of the device, version 2. The layout does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VsockStateV2 {
    pub(crate) guest_cid: u64,
    pub(crate) next_port: u32,
}

impl VsockStateV2 {
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for mut value in [self.guest_cid, u64::from(self.next_port)] {
            loop {
                let [low, ..] = value.to_le_bytes();
                value >>= 7;
                if value == 0 {
                    bytes.push(low & 0x7f);
                    break;
                }
                bytes.push(low | 0x80);
            }
        }
        bytes
    }

    /// Decodes the state; `None` if the bytes encode none, or more than that.
    pub(crate) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let guest_cid = number(&mut bytes)?;
        let next_port = u32::try_from(number(&mut bytes)?).ok()?;
        bytes.is_empty().then_some(Self {
            guest_cid,
            next_port,
        })
    }
}

/// Decodes and removes a number.
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let digit = u64::from(byte & 0x7f);
        let shifted = digit << shift;
        if shifted >> shift != digit {
            return None;
        }
        value |= shifted;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_encoding_is_that_of_earlier_versions() {
        // The pair as postcard 1.1 encodes it.
        let golden: [(u64, u32, &[u8]); 4] = [
            (3, 0, &[3, 0]),
            (3, 0x7f, &[3, 0x7f]),
            (0x80, 300, &[0x80, 1, 0xac, 2]),
            (
                u64::from(u32::MAX),
                u32::MAX,
                &[255, 255, 255, 255, 15, 255, 255, 255, 255, 15],
            ),
        ];
        for (guest_cid, next_port, bytes) in golden {
            let saved = VsockStateV2 {
                guest_cid,
                next_port,
            };
            assert_eq!(saved.encode(), bytes);
            assert_eq!(VsockStateV2::decode(bytes), Some(saved));
        }
    }

    #[test]
    fn malformed_state_is_refused() {
        let too_large = [3, 255, 255, 255, 255, 16];
        let endless = [0xff; 16];
        let broken: [&[u8]; 6] = [&[], &[3], &[3, 0x80], &[3, 0, 0], &too_large, &endless];
        for bytes in broken {
            assert_eq!(VsockStateV2::decode(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn a_state_survives(guest_cid: u64, next_port: u32) {
            let saved = VsockStateV2 { guest_cid, next_port };
            prop_assert_eq!(VsockStateV2::decode(&saved.encode()), Some(saved));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = VsockStateV2::decode(&bytes);
        }
    }
}
