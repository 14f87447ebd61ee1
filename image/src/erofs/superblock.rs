//! The superblock: what the file system is, its checksum and its UUID.

use super::{BLOCK, SUPER_OFFSET, Writer};
use crate::digest::Digest;

const MAGIC: u32 = 0xe0f5_e1e2;
/// Compatible features: the superblock has a checksum; inode times are those
/// of modification.
const FEATURES: u32 = 1 | 2;
/// Offset in the superblock of the checksum, and of the UUID.
const CHECKSUM_AT: usize = 4;
const UUID_AT: usize = 48;

/// Completes an image whose inodes are in place. `root` is the root's nid.
pub(super) fn write(image: &mut [u8], root: usize, inodes: usize, blocks: u32) {
    let mut writer = Writer::at(image, SUPER_OFFSET);
    writer.u32(MAGIC);
    writer.u32(0); // checksum: last of all
    writer.u32(FEATURES);
    writer.bytes(&[12, 0]); // block size as a power of two; extension slots
    // The root comes first, so its number is small.
    writer.u16(u16::try_from(root).unwrap_or(0));
    writer.u64(u64::try_from(inodes).unwrap_or(u64::MAX));
    writer.u64(0); // build time: the same image has the same bytes
    writer.u32(0);
    writer.u32(blocks);
    // Block addresses of inodes and shared attributes, volume name, incompatible
    // features and all that they would need: zero.
    let uuid = uuid(image);
    Writer::at(image, SUPER_OFFSET + UUID_AT).bytes(&uuid);
    let checksum = crc32c(&image[SUPER_OFFSET..BLOCK]);
    Writer::at(image, SUPER_OFFSET + CHECKSUM_AT).u32(checksum);
}

/// A UUID of version 8 (RFC 9562) from the contents.
fn uuid(image: &[u8]) -> [u8; 16] {
    let digest = Digest::of(image);
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// CRC-32C as the kernel computes it: from all ones, without the last inversion.
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
        // The published check value, without the last inversion.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }
}
