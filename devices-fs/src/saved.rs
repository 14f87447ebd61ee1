//! The bytes of a session in the device's saved state, version 1: no bytes if the guest has
//! not mounted the file system; else the members of [`FsStateV1`] in their order. Numbers are
//! unsigned LEB128, lists and names begin with their length, and an absent number is 0, a
//! present one is stored plus 1.

use sm_fs_server::{FsStateV1, HandleStateV1, NodeStateV1, ShareStateV1};

/// Maximum length of the state in bytes.
const MAX_LEN: usize = 16 << 20;

/// Encodes a session; `None` if it takes more than [`MAX_LEN`].
pub(crate) fn encode(state: &FsStateV1) -> Option<Vec<u8>> {
    let bytes = encoded(state);
    (bytes.len() <= MAX_LEN).then_some(bytes)
}

fn encoded(state: &FsStateV1) -> Vec<u8> {
    let mut out = Encoder(Vec::new());
    out.number(state.flags);
    out.len(state.shares.len());
    for share in &state.shares {
        out.bytes(&share.name);
        out.number(share.device);
    }
    out.len(state.nodes.len());
    for node in &state.nodes {
        out.number(node.id);
        out.number(node.share.into());
        out.number(node.parent);
        out.bytes(&node.name);
        out.number(node.device);
        out.number(node.inode);
        out.number(node.born);
        out.number(node.kind.into());
        out.number(node.lookups);
    }
    out.len(state.handles.len());
    for handle in &state.handles {
        out.number(handle.number);
        out.number(handle.node);
        out.number(handle.flags.map_or(0, |flags| u64::from(flags) + 1));
    }
    out.0
}

/// Decodes a session; `None` if the bytes encode none, or more than that.
pub(crate) fn decode(bytes: &[u8]) -> Option<FsStateV1> {
    let mut input = Decoder(bytes);
    let flags = input.number()?;
    let shares = input.list(|input| {
        Some(ShareStateV1 {
            name: input.bytes()?,
            device: input.number()?,
        })
    })?;
    let nodes = input.list(|input| {
        Some(NodeStateV1 {
            id: input.number()?,
            share: input.number()?.try_into().ok()?,
            parent: input.number()?,
            name: input.bytes()?,
            device: input.number()?,
            inode: input.number()?,
            born: input.number()?,
            kind: input.number()?.try_into().ok()?,
            lookups: input.number()?,
        })
    })?;
    let handles = input.list(|input| {
        let (number, node) = (input.number()?, input.number()?);
        let flags = match input.number()? {
            0 => None,
            more => Some(u32::try_from(more - 1).ok()?),
        };
        Some(HandleStateV1 {
            number,
            node,
            flags,
        })
    })?;
    input.0.is_empty().then_some(FsStateV1 {
        flags,
        shares,
        nodes,
        handles,
    })
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn number(&mut self, mut value: u64) {
        loop {
            let [low, ..] = value.to_le_bytes();
            value >>= 7;
            if value == 0 {
                self.0.push(low & 0x7f);
                return;
            }
            self.0.push(low | 0x80);
        }
    }

    fn len(&mut self, len: usize) {
        // No list or name has 2^64 entries.
        self.number(u64::try_from(len).unwrap_or(u64::MAX));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.len(bytes.len());
        self.0.extend_from_slice(bytes);
    }
}

struct Decoder<'a>(&'a [u8]);

impl Decoder<'_> {
    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..u64::BITS).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
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

    fn bytes(&mut self) -> Option<Vec<u8>> {
        let len = usize::try_from(self.number()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes.to_vec())
    }

    fn list<T>(&mut self, mut entry: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let len = usize::try_from(self.number()?).ok()?;
        // Each entry has at least one byte.
        if len > self.0.len() {
            return None;
        }
        let mut entries = Vec::new();
        for _ in 0..len {
            entries.push(entry(self)?);
        }
        Some(entries)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state() -> FsStateV1 {
        FsStateV1 {
            flags: 1 << 36 | 7,
            shares: vec![ShareStateV1 {
                name: b"work".to_vec(),
                device: 0x803,
            }],
            nodes: vec![NodeStateV1 {
                id: 1 << 32 | 3,
                share: 0,
                parent: 2,
                name: b"f".to_vec(),
                device: 0x803,
                inode: 300,
                born: u64::MAX,
                kind: 0o100_000,
                lookups: 1,
            }],
            handles: vec![
                HandleStateV1 {
                    number: 0,
                    node: 2,
                    flags: None,
                },
                HandleStateV1 {
                    number: 1,
                    node: 1 << 32 | 3,
                    flags: Some(2),
                },
            ],
        }
    }

    /// Bytes of version 1, which later programs must be able to read.
    #[test]
    fn the_encoding_does_not_change() {
        let golden = [
            &[0x87, 0x80, 0x80, 0x80, 0x80, 2][..],
            &[1, 4, b'w', b'o', b'r', b'k', 0x83, 0x10],
            &[
                1, 0x83, 0x80, 0x80, 0x80, 0x10, 0, 2, 1, b'f', 0x83, 0x10, 0xac, 2,
            ],
            &[255, 255, 255, 255, 255, 255, 255, 255, 255, 1],
            &[0x80, 0x80, 2, 1],
            &[2, 0, 2, 0, 1, 0x83, 0x80, 0x80, 0x80, 0x10, 3],
        ]
        .concat();
        assert_eq!(encoded(&state()), golden);
        assert_eq!(decode(&golden), Some(state()));
    }

    #[test]
    fn a_session_of_too_many_long_names_is_none() {
        let mut state = state();
        let node = NodeStateV1 {
            name: vec![b'n'; 255],
            ..state.nodes[0].clone()
        };
        let each = encoded(&FsStateV1 {
            nodes: vec![node.clone(); 2],
            ..state.clone()
        })
        .len()
            - encoded(&FsStateV1 {
                nodes: vec![node.clone()],
                ..state.clone()
            })
            .len();
        let fit = MAX_LEN / each - 1;
        // The server's limit of nodes does not imply that of their names.
        assert!(fit < 262_144);
        state.nodes = vec![node; fit];
        let bytes = encode(&state).unwrap();
        assert_eq!(decode(&bytes), Some(state.clone()));
        let node = state.nodes[0].clone();
        state.nodes.extend([node.clone(), node]);
        assert_eq!(encode(&state), None);
    }

    #[test]
    fn malformed_bytes_are_refused() {
        let bytes = encoded(&state());
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), None, "{len} bytes");
        }
        assert_eq!(decode(&[&bytes[..], &[0]].concat()), None);
        // A list of 2^63 entries.
        let endless = [&[0][..], &[0x80; 8], &[0x80, 1]].concat();
        assert_eq!(decode(&endless), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            if let Some(state) = decode(&bytes) {
                prop_assert_eq!(decode(&encoded(&state)), Some(state));
            }
        }
    }
}
