//! Encoding of the header and of the fixed part of a record, without padding.

use super::Totals;

pub(super) const HEADER_BYTES: usize = 64;
pub(super) const FIXED_LEN: usize = 56;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IndexHeader {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    /// The layer contains whiteouts or opaque directories. Readers of earlier versions
    /// used this to decide about a second pass.
    pub(super) hides: u32,
    pub(super) records_len: u64,
    pub(super) totals: Totals,
}

impl IndexHeader {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&self.magic);
        for number in [self.version, self.hides] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let Totals {
            entries,
            blob_len,
            small_len,
            tar_len,
        } = self.totals;
        for number in [entries, self.records_len, blob_len, small_len, tar_len] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.resize(HEADER_BYTES, 0);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut fields = Fields(bytes);
        let (magic, version, hides) = (fields.take(), fields.u32(), fields.u32());
        let (entries, records_len) = (fields.u64(), fields.u64());
        Self {
            magic,
            version,
            hides,
            records_len,
            totals: Totals {
                entries,
                blob_len: fields.u64(),
                small_len: fields.u64(),
                tar_len: fields.u64(),
            },
        }
    }
}

/// The fixed part of a record. `a` and `b` are offset and size of a file, or major and
/// minor number of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fixed {
    /// Length of the whole record.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
    pub(super) xattrs_len: u32,
    pub(super) path_len: u16,
    pub(super) link_len: u16,
    pub(super) a: u64,
    pub(super) b: u64,
}

impl Fixed {
    /// Appends the encoded record to `out`.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.len.to_le_bytes());
        for number in [self.kind, self.mode] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [self.uid, self.gid] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.seconds.to_le_bytes());
        for number in [self.nanoseconds, self.xattrs_len] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [self.path_len, self.link_len, 0, 0] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [self.a, self.b] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }

    pub(super) fn decode(bytes: &[u8; FIXED_LEN]) -> Self {
        let mut fields = Fields(bytes);
        // The fields are read in the order in which they are written here.
        Self {
            len: fields.u32(),
            kind: fields.u16(),
            mode: fields.u16(),
            uid: fields.u32(),
            gid: fields.u32(),
            seconds: i64::from_le_bytes(fields.take()),
            nanoseconds: fields.u32(),
            xattrs_len: fields.u32(),
            path_len: fields.u16(),
            link_len: fields.u16(),
            a: {
                let _reserved = fields.u32();
                fields.u64()
            },
            b: fields.u64(),
        }
    }
}

/// The rest of the bytes of a structure.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// Takes the next bytes. After the end, which no structure here exceeds, they are 0.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.0.split_first_chunk() else {
            return [0; N];
        };
        self.0 = rest;
        *field
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that are all different.
    fn sample<const N: usize>() -> [u8; N] {
        std::array::from_fn(|at| u8::try_from(at + 1).unwrap())
    }

    #[test]
    fn every_byte_of_a_record_is_a_field() {
        let mut bytes: [u8; FIXED_LEN] = sample();
        bytes[36..40].fill(0);
        let record = Fixed::decode(&bytes);
        assert_eq!(record.len, 0x0403_0201);
        assert_eq!((record.kind, record.mode), (0x0605, 0x0807));
        assert_eq!((record.uid, record.gid), (0x0c0b_0a09, 0x100f_0e0d));
        assert_eq!(record.seconds, 0x1817_1615_1413_1211);
        assert_eq!(record.nanoseconds, 0x1c1b_1a19);
        assert_eq!(record.xattrs_len, 0x201f_1e1d);
        assert_eq!((record.path_len, record.link_len), (0x2221, 0x2423));
        assert_eq!(record.a, 0x302f_2e2d_2c2b_2a29);
        assert_eq!(record.b, 0x3837_3635_3433_3231);
        let mut encoded = vec![0xff];
        record.encode(&mut encoded);
        assert_eq!(encoded[1..], bytes);
    }

    #[test]
    fn every_byte_of_a_header_is_a_field() {
        let mut bytes: [u8; HEADER_BYTES] = sample();
        bytes[56..].fill(0);
        let header = IndexHeader::decode(&bytes);
        assert_eq!(header.version, 0x0c0b_0a09);
        assert_eq!(header.totals.entries, 0x1817_1615_1413_1211);
        assert_eq!(header.records_len, 0x201f_1e1d_1c1b_1a19);
        assert_eq!(header.encode(), bytes);
    }
}
