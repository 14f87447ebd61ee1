//! The memory map for the kernel (E820).

use crate::acpi::TABLES;
use crate::memory::ram_regions;

/// End of conventional memory: firmware data would follow.
const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Start of extended memory.
const EXTENDED_START: u64 = 0x10_0000;

/// Type of a range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapKind {
    /// Memory for the kernel to use.
    Ram,
    /// Memory with tables, or registers: not usable as memory.
    Reserved,
}

impl MapKind {
    /// Returns the number of the type in E820 and PVH memory maps.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// The type of the range.
    pub kind: MapKind,
}

/// Returns the memory map of a machine with `bytes` of memory, by ascending address.
#[must_use]
pub fn memory_map(bytes: u64) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry {
            start: 0,
            len: CONVENTIONAL_END,
            kind: MapKind::Ram,
        },
        MapEntry {
            start: TABLES.start,
            len: TABLES.end - TABLES.start,
            kind: MapKind::Reserved,
        },
    ];
    for region in ram_regions(bytes) {
        let end = region.guest_address + region.len;
        let start = region.guest_address.max(EXTENDED_START);
        if start < end {
            map.push(MapEntry {
                start,
                len: end - start,
                kind: MapKind::Ram,
            });
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{HOLE_END, HOLE_START};

    #[test]
    fn entries_are_sorted_disjoint_and_cover_all_high_memory() {
        for mib in [64u64, 256, 3071, 3072, 3073, 6144, 65536] {
            let map = memory_map(mib << 20);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].len <= pair[1].start);
            }
            for entry in &map {
                let end = entry.start + entry.len;
                assert!(end <= HOLE_START || entry.start >= HOLE_END);
            }
            let high: u64 = map
                .iter()
                .filter(|e| e.kind == MapKind::Ram && e.start >= EXTENDED_START)
                .map(|e| e.len)
                .sum();
            assert_eq!(high, (mib << 20) - EXTENDED_START);
        }
    }
}
