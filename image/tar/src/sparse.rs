//! Sparse files in tar archives: maps of the parts with data. The formats are described
//! in GNU tar's manual, "Storing Sparse Files": old GNU headers and the versions 0.0, 0.1
//! and 1.0 in pax headers.

use std::io::Read;

use super::{BLOCK, TarError, field, invalid, number};

/// Maximum number of parts of a sparse file.
const MAX_EXTENTS: usize = 1 << 18;

/// A sparse file: its length, and offset and length of each part with data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SparseMap {
    pub(crate) size: u64,
    pub(crate) extents: Vec<(u64, u64)>,
}

impl SparseMap {
    /// Checks that the parts are in order, inside the file, and together as long as the
    /// data.
    pub(super) fn check(self, data: u64) -> Result<Self, TarError> {
        let mut end = 0;
        let mut sum = 0u64;
        for (offset, len) in &self.extents {
            if *offset < end {
                return Err(malformed());
            }
            end = offset.checked_add(*len).ok_or_else(malformed)?;
            sum = sum.checked_add(*len).ok_or_else(malformed)?;
        }
        match end <= self.size && sum == data {
            true => Ok(self),
            false => Err(malformed()),
        }
    }

    fn push(&mut self, extent: (u64, u64)) -> Result<(), TarError> {
        if self.extents.len() >= MAX_EXTENTS {
            return Err(invalid("a sparse file has too many parts"));
        }
        self.extents.push(extent);
        Ok(())
    }
}

fn malformed() -> TarError {
    invalid("its map of a sparse file is malformed")
}

/// Pax records about a sparse file.
#[derive(Clone, Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    size: Option<u64>,
    major: Option<u64>,
    offset: Option<u64>,
    extents: Vec<(u64, u64)>,
}

impl PaxSparse {
    /// Applies the record `GNU.sparse.{key}`.
    pub(super) fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"major" => self.major = Some(decimal(value)?),
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or_else(malformed)?;
                self.extents.push((offset, decimal(value)?));
            }
            // The file has no parts.
            b"map" if value.is_empty() => self.extents.clear(),
            b"map" => {
                let numbers = value
                    .split(|byte| *byte == b',')
                    .map(decimal)
                    .collect::<Result<Vec<_>, _>>()?;
                let (pairs, rest) = numbers.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err(malformed());
                }
                self.extents = pairs.iter().map(|[offset, len]| (*offset, *len)).collect();
            }
            // The minor version, and the count, which the map repeats.
            _ => {}
        }
        Ok(())
    }

    /// Returns the map, if there is one. In version 1.0 it is read from the start of the
    /// data; the second value is its length there.
    pub(super) fn map(self, data: &mut impl Read) -> Result<Option<(SparseMap, u64)>, TarError> {
        let Some(size) = self.size else {
            return match self.extents.is_empty() && self.major.is_none() {
                true => Ok(None),
                false => Err(malformed()),
            };
        };
        let map = SparseMap {
            size,
            extents: self.extents,
        };
        match self.major {
            Some(1) => read_map(map, data).map(Some),
            Some(0) | None => Ok(Some((map, 0))),
            Some(_) => Err(invalid("its version of sparse files is not known")),
        }
    }
}

/// Reads lines of decimal numbers: the number of parts, then offset and length of each.
fn read_map(mut map: SparseMap, data: &mut impl Read) -> Result<(SparseMap, u64), TarError> {
    let mut lines = Lines {
        data,
        block: [0; BLOCK],
        at: BLOCK,
        read: 0,
    };
    map.extents.clear();
    for _ in 0..lines.number()? {
        let extent = (lines.number()?, lines.number()?);
        map.push(extent)?;
    }
    Ok((map, lines.read))
}

struct Lines<'a, R> {
    data: &'a mut R,
    block: [u8; BLOCK],
    at: usize,
    read: u64,
}

impl<R: Read> Lines<'_, R> {
    fn byte(&mut self) -> Result<u8, TarError> {
        if self.at == BLOCK {
            self.data.read_exact(&mut self.block)?;
            self.at = 0;
            self.read += BLOCK as u64;
        }
        let byte = self.block[self.at];
        self.at += 1;
        Ok(byte)
    }

    fn number(&mut self) -> Result<u64, TarError> {
        let mut digits = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => return decimal(&digits),
                _ if digits.len() >= 20 => return Err(malformed()),
                digit => digits.push(digit),
            }
        }
    }
}

/// Reads the map in an old GNU header, and in the blocks after it.
pub(super) fn old_gnu(header: &[u8; BLOCK], data: &mut impl Read) -> Result<SparseMap, TarError> {
    let mut map = SparseMap {
        size: number(field(header, 483, 12))?,
        extents: Vec::new(),
    };
    take_pairs(&mut map, field(header, 386, 96))?;
    let mut more = header[482] != 0;
    while more {
        let mut block = [0; BLOCK];
        data.read_exact(&mut block)?;
        take_pairs(&mut map, field(&block, 0, 504))?;
        more = block[504] != 0;
    }
    Ok(map)
}

fn take_pairs(map: &mut SparseMap, bytes: &[u8]) -> Result<(), TarError> {
    for pair in bytes.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        let (offset, len) = pair.split_at(12);
        map.push((number(offset)?, number(len)?))?;
    }
    Ok(())
}

fn decimal(bytes: &[u8]) -> Result<u64, TarError> {
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(malformed)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn inconsistent_maps_are_refused() {
        let map = |extents: &[(u64, u64)]| SparseMap {
            size: 100,
            extents: extents.to_vec(),
        };
        assert!(map(&[(0, 10), (50, 50)]).check(60).is_ok());
        assert!(map(&[(100, 0)]).check(0).is_ok());
        for (extents, data) in [
            (&[(0, 10)][..], 11),
            (&[(0, 10), (5, 10)], 20),
            (&[(50, 51)], 51),
            (&[(u64::MAX, 2)], 2),
        ] {
            assert!(map(extents).check(data).is_err(), "{extents:?}");
        }
    }

    #[test]
    fn version_1_precedes_the_data() {
        let mut pax = PaxSparse::default();
        pax.apply(b"major", b"1").unwrap();
        pax.apply(b"realsize", b"5000").unwrap();
        let mut data = b"2\n0\n10\n4990\n10\n".to_vec();
        data.resize(512 + 20, 1);
        let (map, len) = pax.map(&mut data.as_slice()).unwrap().unwrap();
        assert_eq!(len, 512);
        assert_eq!(map.extents, [(0, 10), (4990, 10)]);
        assert!(map.check(20).is_ok());
    }

    #[test]
    fn an_empty_map_describes_a_hole() {
        let mut pax = PaxSparse::default();
        pax.apply(b"size", b"700").unwrap();
        pax.apply(b"map", b"").unwrap();
        let (map, _) = pax.map(&mut io::empty()).unwrap().unwrap();
        let map = map.check(0).unwrap();
        assert_eq!((map.size, map.extents), (700, vec![]));
    }

    #[test]
    fn a_map_is_not_allocated_by_its_announced_size() {
        let mut pax = PaxSparse::default();
        pax.apply(b"major", b"1").unwrap();
        pax.apply(b"realsize", b"5000").unwrap();
        let data = b"18446744073709551615\n".to_vec();
        assert!(pax.map(&mut data.as_slice()).is_err());
    }
}
