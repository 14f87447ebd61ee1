//! Writes the *metadata image*: an EROFS file system without the contents of any
//! but small files.
//!
//! Other contents stay in the layers' blobs, which follow the metadata image on
//! the composite disk; a file's inode points there by block number. The format is
//! that of Linux `fs/erofs/erofs_fs.h`: extended inodes (for exact times and
//! owners), plain data or, for directories, links and small files, data whose last
//! part follows the inode in the same block.
//!
//! ```text
//! superblock | inodes, with inline data | data that is not inline | shared xattrs
//! ```
//!
//! The image is planned first and then written from front to back, so that memory
//! holds a few numbers for each inode and no more.

mod directory;
mod output;
mod superblock;
mod xattrs;

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use self::directory::Directory;
use self::output::Output;
use self::xattrs::EncodedXattrs;
use crate::Error;
use crate::digest::Digest;
use crate::index::Place;
use crate::layer::BLOCK_SIZE;
use crate::tree::{InodeId, Kind, ROOT, Tree};

const BLOCK: u64 = BLOCK_SIZE;
const BLOCK_BYTES: usize = 4096;
const _: () = assert!(BLOCK_BYTES as u64 == BLOCK);
const SUPER_AT: usize = 1024;
const SUPER_OFFSET: u64 = SUPER_AT as u64;
const SUPER_LEN: u64 = 128;
/// Inode numbers (nids) count in these.
const SLOT: u64 = 32;
const INODE_BYTES: usize = 64;
const INODE_LEN: u64 = INODE_BYTES as u64;

/// `i_format`: extended inode, and the data layout from bit 1 on.
const PLAIN: u16 = 1;
const INLINE: u16 = 1 | 2 << 1;

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// An inode that has no place.
const NOWHERE: u32 = u32::MAX;

/// What of a layer is on the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerData<'a> {
    /// Length of the blob in bytes.
    pub(crate) blob_len: u64,
    /// Contents of small files.
    pub(crate) small: &'a File,
}

/// Writes the metadata image of `tree` to an empty file; returns its length.
/// `layers` are those that the tree was made of; their blobs follow it on the
/// disk in this order. `identity` makes the file system's UUID.
pub(crate) fn build(
    tree: &Tree,
    layers: &[LayerData<'_>],
    identity: Digest,
    file: &File,
) -> Result<u64, Error> {
    let mut image = Image::plan(tree, layers)?;
    image.write(file)?;
    superblock::complete(
        file,
        &superblock::Contents {
            identity,
            root: image.nid(ROOT),
            inodes: image.order.len(),
            blocks: image.disk_blocks,
            xattr_block: image.xattr_block,
        },
    )
    .map_err(unwritable)?;
    Ok(image.len)
}

fn unwritable(error: std::io::Error) -> Error {
    Error::MetadataImage(error)
}

const TOO_MANY: Error = Error::TooLarge("it has too many files");

/// A planned metadata image.
struct Image<'a> {
    tree: &'a Tree,
    layers: &'a [LayerData<'a>],
    xattrs: EncodedXattrs,
    /// All inodes that can be reached, parents before children.
    order: Vec<InodeId>,
    /// By inode: its place, in slots, and its links.
    slots: Vec<u32>,
    links: Vec<u32>,
    /// First byte after the inodes, block-aligned: data begins here.
    inodes_end: u64,
    /// Block of the shared attributes.
    xattr_block: u32,
    /// Length of the metadata image.
    len: u64,
    /// First block on the disk of each layer's blob.
    bases: Vec<u64>,
    disk_blocks: u32,
}

/// How an inode and its data are laid out.
struct Layout {
    /// Bytes of the inode with its attributes.
    fixed: u64,
    /// Bytes of data in this image: of a directory, a link, a small file.
    len: u64,
    /// The last part of the data follows the inode.
    inline: bool,
}

impl Layout {
    fn tail(&self) -> u64 {
        if self.inline { self.len % BLOCK } else { 0 }
    }

    /// Bytes of data in blocks of their own.
    fn in_blocks(&self) -> u64 {
        self.len - self.tail()
    }
}

impl<'a> Image<'a> {
    fn plan(tree: &'a Tree, layers: &'a [LayerData<'a>]) -> Result<Self, Error> {
        let mut image = Self {
            tree,
            layers,
            xattrs: EncodedXattrs::default(),
            order: vec![ROOT],
            slots: vec![NOWHERE; tree.inode_count()],
            links: vec![0; tree.inode_count()],
            inodes_end: 0,
            xattr_block: 0,
            len: 0,
            bases: Vec::with_capacity(layers.len()),
            disk_blocks: 0,
        };
        image.collect();
        image.xattrs = EncodedXattrs::new(tree, &image.order)?;
        image.place()?;
        image.place_blobs()?;
        Ok(image)
    }

    /// Finds all inodes, and counts their links.
    fn collect(&mut self) {
        let mut children = Vec::new();
        let mut next = 0;
        self.links[ROOT as usize] = 2;
        while let Some(&id) = self.order.get(next) {
            next += 1;
            if self.tree.kind(id) != Kind::Directory {
                continue;
            }
            children.clear();
            self.tree.children(id, &mut children);
            for (_, child) in &children {
                let known = self.links[*child as usize] > 0;
                if self.tree.kind(*child) == Kind::Directory {
                    // Its name, and its own `.`; its `..` is the parent's.
                    self.links[*child as usize] = 2;
                    self.links[id as usize] += 1;
                } else {
                    self.links[*child as usize] += 1;
                }
                if !known {
                    self.order.push(*child);
                }
            }
        }
    }

    /// Gives every inode and all data their places.
    fn place(&mut self) -> Result<(), Error> {
        let mut at = SUPER_OFFSET + SUPER_LEN;
        let mut data_blocks = 0;
        for number in 0..self.order.len() {
            let id = self.order[number];
            let layout = self.layout(id);
            let needed = layout.fixed + layout.tail();
            // Inode and inline data stay within a block where they can.
            if at % BLOCK + needed > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            let slot = u32::try_from(at / SLOT).ok();
            let slot = slot.filter(|slot| *slot != NOWHERE).ok_or(TOO_MANY)?;
            self.slots[id as usize] = slot;
            at = (at + needed).next_multiple_of(SLOT);
            data_blocks += layout.in_blocks().div_ceil(BLOCK);
        }
        self.inodes_end = at.next_multiple_of(BLOCK);
        let data_end = self.inodes_end + data_blocks * BLOCK;
        self.xattr_block = u32::try_from(data_end / BLOCK).map_err(|_| TOO_MANY)?;
        self.len = (data_end + self.xattrs.shared_len()).next_multiple_of(BLOCK);
        Ok(())
    }

    /// Finds where each layer's blob begins on the disk.
    fn place_blobs(&mut self) -> Result<(), Error> {
        let mut total = self.len / BLOCK;
        for layer in self.layers {
            self.bases.push(total);
            total = total.saturating_add(layer.blob_len.div_ceil(BLOCK));
        }
        self.disk_blocks = u32::try_from(total)
            .ok()
            // The last number means "no block".
            .filter(|total| *total < u32::MAX)
            .ok_or(Error::TooLarge("it is larger than 16 TiB"))?;
        Ok(())
    }

    fn nid(&self, id: InodeId) -> u32 {
        self.slots[id as usize]
    }

    fn layout(&self, id: InodeId) -> Layout {
        let len = match self.tree.kind(id) {
            Kind::Directory => Directory::of(self.tree, id).len(),
            Kind::Symlink(target) => self.tree.text(target).len() as u64,
            Kind::File {
                place: Place::Small(_),
                size,
                ..
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
                .map_err(unwritable)?;
            self.write_inode(&mut out, id, number, &layout, block)?;
            if layout.tail() > 0 {
                self.data(id, &mut data)?;
                let tail = usize::try_from(layout.in_blocks()).ok();
                let tail = tail.and_then(|at| data.get(at..)).unwrap_or_default();
                out.bytes(tail).map_err(unwritable)?;
            }
            let blocks = layout.in_blocks().div_ceil(BLOCK);
            block += u32::try_from(blocks).map_err(|_| TOO_MANY)?;
        }
        out.pad_to(self.inodes_end).map_err(unwritable)?;
        for &id in &self.order {
            let in_blocks = self.layout(id).in_blocks();
            if in_blocks == 0 {
                continue;
            }
            self.data(id, &mut data)?;
            let end = usize::try_from(in_blocks).ok();
            let whole = end.and_then(|end| data.get(..end)).unwrap_or_default();
            out.bytes(whole).map_err(unwritable)?;
            out.pad_to(out.position().next_multiple_of(BLOCK))
                .map_err(unwritable)?;
        }
        out.bytes(self.xattrs.shared()).map_err(unwritable)?;
        out.pad_to(self.len).map_err(unwritable)?;
        out.finish().map_err(unwritable)
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
        let format = if layout.inline { INLINE } else { PLAIN };
        let mut put = |at: usize, bytes: &[u8]| {
            // Constant offsets, within the inode.
            if let Some(place) = inode.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
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
        out.bytes(&inode).map_err(unwritable)?;
        out.bytes(self.xattrs.get(set)).map_err(unwritable)
    }

    /// File type, size, and what the inode's union holds: first block or device.
    fn describe(&self, id: InodeId, layout: &Layout, block: u32) -> Result<(u16, u64, u32), Error> {
        let block = if layout.in_blocks() > 0 { block } else { 0 };
        Ok(match self.tree.kind(id) {
            Kind::Directory => (S_IFDIR, layout.len, block),
            Kind::Symlink(_) => (S_IFLNK, layout.len, block),
            Kind::File {
                layer,
                place: Place::Blob(offset),
                size,
            } => {
                let base = self.bases.get(usize::from(layer)).copied();
                let block = base.unwrap_or_default() + offset / BLOCK;
                let block = u32::try_from(block)
                    .map_err(|_| Error::TooLarge("it is larger than 16 TiB"))?;
                (S_IFREG, size, block)
            }
            Kind::File { size, .. } => (S_IFREG, size, block),
            Kind::CharDevice(major, minor) => (S_IFCHR, 0, device_number(major, minor)),
            Kind::BlockDevice(major, minor) => (S_IFBLK, 0, device_number(major, minor)),
            Kind::Fifo => (S_IFIFO, 0, 0),
        })
    }

    /// Puts an inode's data that is in this image into `data`.
    fn data(&self, id: InodeId, data: &mut Vec<u8>) -> Result<(), Error> {
        data.clear();
        match self.tree.kind(id) {
            Kind::Directory => {
                Directory::of(self.tree, id).encode(self.tree, |id| self.nid(id), data);
            }
            Kind::Symlink(target) => data.extend_from_slice(self.tree.text(target)),
            Kind::File {
                layer,
                place: Place::Small(offset),
                size,
            } => {
                data.resize(usize::try_from(size).unwrap_or(0), 0);
                let layer = self.layers.get(usize::from(layer));
                if let Some(layer) = layer {
                    layer
                        .small
                        .read_exact_at(data, offset)
                        .map_err(unwritable)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Linux's `new_encode_dev`. The tree has only numbers that it has room for.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_linuxs() {
        assert_eq!(device_number(8, 1), 0x801);
        assert_eq!(device_number(259, 0x1234), 0x0121_0334);
    }
}
