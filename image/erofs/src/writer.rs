//! Planning an image, and writing it from front to back.
//!
//! The format is defined in Linux `fs/erofs/erofs_fs.h`. Images use extended inodes (for
//! exact times and owners) with plain data or, where it fits, data whose last part
//! follows the inode in the same block.
//!
//! ```text
//! superblock | inodes, with inline data | data that is not inline | shared xattrs
//! ```

mod directory;
mod output;
mod superblock;
mod xattrs;

use std::fs::File;
use std::ops::Range;

use self::directory::Directory;
use self::output::Output;
use self::xattrs::EncodedXattrs;
use crate::{Data, Error, FileTree, InodeId, Kind, ROOT};

/// Size of a block of the file system in bytes.
pub const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = 4096;
const _: () = assert!(BLOCK_BYTES as u64 == BLOCK);
const SUPER_AT: usize = 1024;
const SUPER_OFFSET: u64 = SUPER_AT as u64;
const SUPER_LEN: u64 = 128;
/// Unit of inode numbers (nids) in bytes.
const SLOT: u64 = 32;
const INODE_BYTES: usize = 64;
const INODE_LEN: u64 = INODE_BYTES as u64;
/// Maximum number of bytes of a file copied at a time; a multiple of the block size.
const CHUNK: u64 = 1 << 20;
/// Maximum length of a directory entry's name (`EROFS_NAME_LEN`).
pub(crate) const MAX_NAME: usize = 255;

/// Values of `i_format`: extended inode, and the data layout from bit 1 on.
const LAYOUT_PLAIN: u16 = 1;
const LAYOUT_INLINE: u16 = 1 | 2 << 1;

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// Slot of an inode that is not in the image.
const NOWHERE: u32 = u32::MAX;

/// Options of an image besides its tree. By default the UUID is zero, and no data follows
/// the image.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    uuid: [u8; 16],
    behind_len: u64,
}

impl Options {
    /// Sets the file system's UUID.
    #[must_use]
    pub fn uuid(self, uuid: [u8; 16]) -> Self {
        Self { uuid, ..self }
    }

    /// Sets the number of bytes of [`Data::Behind`] that follow the image on the disk.
    /// They are included in the file system's size.
    #[must_use]
    pub fn behind(self, behind_len: u64) -> Self {
        Self { behind_len, ..self }
    }
}

/// Writes the image of `tree` to an empty file, which must also be readable. Returns the
/// image's length in bytes, a multiple of [`BLOCK`].
///
/// # Errors
/// The tree exceeds a limit of the format, contents cannot be read, or writing fails.
pub fn write(tree: &impl FileTree, file: &File, options: &Options) -> Result<u64, Error> {
    let mut image = Image::plan(tree, options.behind_len)?;
    image.write(file)?;
    superblock::complete(
        file,
        &superblock::Contents {
            uuid: options.uuid,
            root: image.nid(ROOT),
            inodes: image.order.len(),
            blocks: image.disk_blocks,
            xattr_block: image.xattr_block,
        },
    )
    .map_err(Error::Write)?;
    Ok(image.len)
}

const TOO_MANY: Error = Error::TooLarge("it has too many files");
const TOO_LARGE: Error = Error::TooLarge("it is larger than 16 TiB");

/// A planned image.
struct Image<'t, T> {
    tree: &'t T,
    xattrs: EncodedXattrs,
    /// All reachable inodes, parents before children.
    order: Vec<InodeId>,
    /// Slot and link count of each inode.
    slots: Vec<u32>,
    links: Vec<u32>,
    /// Offset of the first byte after the inodes, where data starts; block-aligned.
    inodes_end: u64,
    /// First block of the shared attributes.
    xattr_block: u32,
    /// Length of the image in bytes.
    len: u64,
    disk_blocks: u32,
}

/// Layout of an inode and its data.
struct Layout {
    /// Length of the inode with its attributes in bytes.
    fixed: u64,
    /// Length of the data in this image in bytes: of a directory, link or small file.
    len: u64,
    /// The last part of the data follows the inode.
    inline: bool,
}

impl Layout {
    fn tail(&self) -> u64 {
        if self.inline { self.len % BLOCK } else { 0 }
    }

    /// Returns the length of the data that is stored in separate blocks.
    fn in_blocks(&self) -> u64 {
        self.len - self.tail()
    }
}

impl<'t, T: FileTree> Image<'t, T> {
    fn plan(tree: &'t T, behind_len: u64) -> Result<Self, Error> {
        // A tree without a root inode is inconsistent; the writer assumes one.
        let count = tree.inode_count().max(1);
        let most = |count| u32::try_from(count).is_err();
        if most(count) || most(tree.xattr_sets()) {
            return Err(TOO_MANY);
        }
        let mut image = Self {
            tree,
            xattrs: EncodedXattrs::default(),
            order: vec![ROOT],
            slots: vec![NOWHERE; count],
            links: vec![0; count],
            inodes_end: 0,
            xattr_block: 0,
            len: 0,
            disk_blocks: 0,
        };
        image.collect()?;
        image.xattrs = EncodedXattrs::new(tree, &image.order)?;
        image.lay_out()?;
        image.disk_blocks =
            u32::try_from((image.len / BLOCK).saturating_add(behind_len.div_ceil(BLOCK)))
                .ok()
                // The last block number is reserved for "no block".
                .filter(|total| *total < u32::MAX)
                .ok_or(TOO_LARGE)?;
        Ok(image)
    }

    /// Finds all inodes, and counts their links.
    fn collect(&mut self) -> Result<(), Error> {
        let tree = self.tree;
        let mut children = Vec::new();
        let mut next = 0;
        self.links[ROOT as usize] = 2;
        while let Some(&id) = self.order.get(next) {
            next += 1;
            if tree.kind(id) != Kind::Directory {
                continue;
            }
            children.clear();
            tree.children(id, &mut children);
            for (name, child) in &children {
                if name.is_empty() || name.len() > MAX_NAME {
                    return Err(Error::TooLarge("a name does not have 1 to 255 bytes"));
                }
                let Some(links) = self.links.get_mut(*child as usize) else {
                    return Err(TOO_MANY);
                };
                let known = *links > 0;
                if tree.kind(*child) == Kind::Directory {
                    // The links are its name and its own `.`; its `..` counts for the
                    // parent.
                    *links = 2;
                    self.links[id as usize] += 1;
                } else {
                    *links += 1;
                }
                if !known {
                    self.order.push(*child);
                }
            }
        }
        Ok(())
    }

    /// Assigns a location to every inode and all data.
    fn lay_out(&mut self) -> Result<(), Error> {
        let mut at = SUPER_OFFSET + SUPER_LEN;
        let mut data_blocks: u64 = 0;
        for number in 0..self.order.len() {
            let id = self.order[number];
            let layout = self.layout(id);
            let needed = layout.fixed + layout.tail();
            // Inode and inline data share a block if possible.
            if at % BLOCK + needed > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            let slot = u32::try_from(at / SLOT).ok();
            let slot = slot.filter(|slot| *slot != NOWHERE).ok_or(TOO_MANY)?;
            self.slots[id as usize] = slot;
            at = (at + needed).next_multiple_of(SLOT);
            let blocks = layout.in_blocks().div_ceil(BLOCK);
            data_blocks = data_blocks.saturating_add(blocks);
            // Later sums of bytes or blocks cannot overflow.
            if data_blocks > u64::from(u32::MAX) {
                return Err(TOO_LARGE);
            }
        }
        self.inodes_end = at.next_multiple_of(BLOCK);
        let data_end = self.inodes_end + data_blocks * BLOCK;
        self.xattr_block = u32::try_from(data_end / BLOCK).map_err(|_| TOO_LARGE)?;
        self.len = (data_end + self.xattrs.shared_len()).next_multiple_of(BLOCK);
        Ok(())
    }

    fn nid(&self, id: InodeId) -> u32 {
        self.slots.get(id as usize).copied().unwrap_or(0)
    }

    fn layout(&self, id: InodeId) -> Layout {
        let len = match self.tree.kind(id) {
            Kind::Directory => Directory::of(self.tree, id).len(),
            Kind::Symlink(target) => target.len() as u64,
            Kind::File {
                data: Data::Image,
                size,
            } => size,
            _ => 0,
        };
        let fixed = INODE_LEN + self.xattrs.len(self.tree.xattr_set(id));
        let tail = len % BLOCK;
        Layout {
            fixed,
            len,
            inline: tail > 0 && fixed + tail <= BLOCK,
        }
    }

    fn write(&mut self, file: &File) -> Result<(), Error> {
        let mut out = Output::new(file);
        let mut block = u32::try_from(self.inodes_end / BLOCK).map_err(|_| TOO_MANY)?;
        let mut data = Vec::new();
        for (number, &id) in (1u32..).zip(&self.order) {
            let layout = self.layout(id);
            out.pad_to(u64::from(self.nid(id)) * SLOT)
                .map_err(Error::Write)?;
            self.write_inode(&mut out, id, number, &layout, block)?;
            if layout.tail() > 0 {
                self.data(id, layout.in_blocks()..layout.len, &mut data)?;
                out.bytes(&data).map_err(Error::Write)?;
            }
            let blocks = layout.in_blocks().div_ceil(BLOCK);
            let next = u32::try_from(blocks)
                .ok()
                .and_then(|n| block.checked_add(n));
            block = next.ok_or(TOO_LARGE)?;
        }
        out.pad_to(self.inodes_end).map_err(Error::Write)?;
        for &id in &self.order {
            self.write_blocks(&mut out, id, &mut data)?;
        }
        out.bytes(self.xattrs.shared()).map_err(Error::Write)?;
        out.pad_to(self.len).map_err(Error::Write)?;
        out.finish().map_err(Error::Write)
    }

    /// Writes the data of an inode that is stored in separate blocks.
    fn write_blocks(
        &self,
        out: &mut Output<'_>,
        id: InodeId,
        data: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let end = self.layout(id).in_blocks();
        let step = match self.tree.kind(id) {
            Kind::File { .. } => CHUNK,
            // Data other than file contents is encoded in one step, because its source is
            // in memory.
            _ => end,
        };
        let mut at = 0;
        while at < end {
            let next = at.saturating_add(step).min(end);
            self.data(id, at..next, data)?;
            out.bytes(data).map_err(Error::Write)?;
            at = next;
        }
        out.pad_to(out.position().next_multiple_of(BLOCK))
            .map_err(Error::Write)
    }

    fn write_inode(
        &self,
        out: &mut Output<'_>,
        id: InodeId,
        number: u32,
        layout: &Layout,
        block: u32,
    ) -> Result<(), Error> {
        let (kind, size, union) = self.describe(id, layout, block)?;
        let meta = self.tree.meta(id);
        let set = self.tree.xattr_set(id);
        let mut inode = [0; INODE_BYTES];
        let format = if layout.inline {
            LAYOUT_INLINE
        } else {
            LAYOUT_PLAIN
        };
        let mut put = |at: usize, bytes: &[u8]| {
            // The offsets are constant and within the inode.
            if let Some(part) = inode.get_mut(at..at + bytes.len()) {
                part.copy_from_slice(bytes);
            }
        };
        put(0, &format.to_le_bytes());
        put(2, &self.xattrs.count(set)?.to_le_bytes());
        put(4, &(kind | meta.mode & 0o7777).to_le_bytes());
        put(8, &size.to_le_bytes());
        put(16, &union.to_le_bytes());
        put(20, &number.to_le_bytes());
        put(24, &meta.uid.to_le_bytes());
        put(28, &meta.gid.to_le_bytes());
        put(32, &meta.mtime.0.to_le_bytes());
        put(40, &meta.mtime.1.to_le_bytes());
        put(44, &self.links[id as usize].to_le_bytes());
        out.bytes(&inode).map_err(Error::Write)?;
        out.bytes(self.xattrs.get(set)).map_err(Error::Write)
    }

    /// Returns file type, size, and the value of the inode's union: first block or
    /// device.
    fn describe(&self, id: InodeId, layout: &Layout, block: u32) -> Result<(u16, u64, u32), Error> {
        let block = if layout.in_blocks() > 0 { block } else { 0 };
        Ok(match self.tree.kind(id) {
            Kind::Directory => (S_IFDIR, layout.len, block),
            Kind::Symlink(_) => (S_IFLNK, layout.len, block),
            Kind::File {
                data: Data::Behind(offset),
                size,
            } => {
                let block = (self.len / BLOCK).saturating_add(offset / BLOCK);
                (S_IFREG, size, u32::try_from(block).map_err(|_| TOO_LARGE)?)
            }
            Kind::File { size, .. } => (S_IFREG, size, block),
            Kind::CharDevice(major, minor) => (S_IFCHR, 0, device_number(major, minor)?),
            Kind::BlockDevice(major, minor) => (S_IFBLK, 0, device_number(major, minor)?),
            Kind::Fifo => (S_IFIFO, 0, 0),
        })
    }

    /// Replaces `data` by a part of an inode's data in this image.
    fn data(&self, id: InodeId, range: Range<u64>, data: &mut Vec<u8>) -> Result<(), Error> {
        data.clear();
        let at = |position: u64| usize::try_from(position).unwrap_or(usize::MAX);
        match self.tree.kind(id) {
            Kind::Directory => {
                Directory::of(self.tree, id).encode(self.tree, |id| self.nid(id), data);
                data.truncate(at(range.end));
                data.drain(..at(range.start).min(data.len()));
            }
            Kind::Symlink(target) => {
                let part = target.get(at(range.start)..at(range.end));
                data.extend_from_slice(part.unwrap_or_default());
            }
            Kind::File {
                data: Data::Image, ..
            } => {
                // The range exceeds a chunk only if the tree is inconsistent.
                data.resize(at((range.end - range.start).min(CHUNK)), 0);
                self.tree
                    .read_at(id, range.start, data)
                    .map_err(Error::Read)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Encodes a device number like Linux's `new_encode_dev`, with 12 and 20 bits. Truncation
/// would produce the number of another device.
fn device_number(major: u32, minor: u32) -> Result<u32, Error> {
    if major >> 12 != 0 || minor >> 20 != 0 {
        return Err(Error::TooLarge(
            "a device number has more than 12 or 20 bits",
        ));
    }
    Ok(minor & 0xff | major << 8 | (minor & 0xf_ff00) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_linuxs() {
        assert_eq!(device_number(8, 1).unwrap(), 0x801);
        assert_eq!(device_number(259, 0x1234).unwrap(), 0x0121_0334);
        assert_eq!(device_number(0xfff, 0xf_ffff).unwrap(), u32::MAX);
        for (major, minor) in [(4097, 3), (1, 1 << 20)] {
            assert!(device_number(major, minor).is_err());
        }
    }
}
