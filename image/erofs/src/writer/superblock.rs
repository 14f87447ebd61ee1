//! The superblock, with checksum and UUID.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::{BLOCK_BYTES, SUPER_AT, SUPER_OFFSET};

const MAGIC: u32 = 0xe0f5_e1e2;
/// Compatible features: the superblock has a checksum; inode times are modification
/// times.
const FEATURES: u32 = 1 | 2;
const BLOCK_BITS: u8 = 12;

/// Variable contents of a superblock.
pub(super) struct Contents {
    pub(super) uuid: [u8; 16],
    /// Inode number of the root.
    pub(super) root: u32,
    pub(super) inodes: usize,
    /// Number of blocks of the whole disk.
    pub(super) blocks: u32,
    /// First block of the shared attributes.
    pub(super) xattr_block: u32,
}

/// Writes the superblock of an image that is otherwise complete, because its checksum
/// covers the whole first block.
pub(super) fn complete(file: &File, contents: &Contents) -> io::Result<()> {
    let mut block = [0; BLOCK_BYTES];
    file.read_exact_at(&mut block, 0)?;
    let mut put = |at: usize, bytes: &[u8]| {
        // The offsets are constant and within the block.
        if let Some(part) = block.get_mut(SUPER_AT + at..SUPER_AT + at + bytes.len()) {
            part.copy_from_slice(bytes);
        }
    };
    put(0, &MAGIC.to_le_bytes());
    put(8, &FEATURES.to_le_bytes());
    put(12, &[BLOCK_BITS]);
    // The root is the first inode, so its number is small.
    put(14, &u16::try_from(contents.root).unwrap_or(0).to_le_bytes());
    put(16, &(contents.inodes as u64).to_le_bytes());
    // There is no build time, so that equal trees produce equal bytes.
    put(36, &contents.blocks.to_le_bytes());
    put(44, &contents.xattr_block.to_le_bytes());
    put(48, &contents.uuid);
    let checksum = crc32c(&block[SUPER_AT..]);
    block[SUPER_AT + 4..SUPER_AT + 8].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&block[SUPER_AT..], SUPER_OFFSET)
}

/// Computes CRC-32C like the kernel: initialised with all ones, without the final
/// inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc_32c() {
        // The published check value includes the final inversion.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }
}
