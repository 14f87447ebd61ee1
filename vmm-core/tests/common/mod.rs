//! Helpers of tests of machines.

use std::fs::File;
use std::io::Write as _;

/// The kernel's entry point.
pub(crate) const ENTRY: u32 = 0x10_0000;

/// Returns an ELF file with a PVH note whose only segment is `code` at [`ENTRY`].
pub(crate) fn kernel(code: &[u8]) -> File {
    let mut elf = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let len = code.len() as u64;
    for (at, kind, values) in [
        (64, 1u32, [0x1000, 0, u64::from(ENTRY), len, len, 0x1000]),
        (120, 4, [0x300, 0, 0, 20, 20, 4]),
    ] {
        put(at, &kind.to_le_bytes());
        for (index, value) in values.into_iter().enumerate() {
            put(at + 8 + index * 8, &u64::to_le_bytes(value));
        }
    }
    put(0x300, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x30c, b"Xen\0");
    put(0x310, &ENTRY.to_le_bytes());
    elf.extend_from_slice(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file
}
