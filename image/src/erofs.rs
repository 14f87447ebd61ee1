//! Writes the *metadata image*: an EROFS file system without file contents.
//!
//! Contents stay in the layers' blobs, which follow the metadata image on the
//! composite disk; a file's inode points there by block number. The format is
//! that of Linux `fs/erofs/erofs_fs.h`: extended inodes (for exact times and
//! owners), plain data or, for directories and symbolic links, data whose last
//! part follows the inode in the same block.

mod superblock;

use crate::Error;
use crate::layer::{BLOCK_SIZE, Meta};
use crate::tree::{Node, NodeId, NodeKind, ROOT, Tree};

const BLOCK: usize = 4096;
const SUPER_OFFSET: usize = 1024;
const SUPER_LEN: usize = 128;
/// Inode numbers (nids) count in these.
const SLOT: usize = 32;
const INODE_LEN: usize = 64;
const DIRENT_LEN: usize = 12;
const XATTR_HEADER_LEN: usize = 12;
const XATTR_ENTRY_LEN: usize = 4;

/// `i_format`: extended inode, and the data layout from bit 1 on.
const PLAIN: u16 = 1;
const INLINE: u16 = 1 | 2 << 1;

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// Name prefixes that are stored as a number.
const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
/// What the guest's overlay file system uses for itself: an image must not
/// speak in its name.
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// Where an inode and its data are.
#[derive(Clone, Debug)]
struct Placed {
    node: NodeId,
    parent: NodeId,
    /// Offset of the inode in the image.
    at: usize,
    links: u32,
    /// Encoded extended attributes.
    xattrs: Vec<u8>,
    /// Bytes of directory or link data.
    len: usize,
    /// The last part of the data follows the inode.
    inline: bool,
    /// First block of the data that does not.
    block: u32,
}

impl Placed {
    /// Bytes of data in blocks of their own.
    fn blocks_len(&self) -> usize {
        if self.inline {
            self.len / BLOCK * BLOCK
        } else {
            self.len
        }
    }
}

/// Builds the metadata image of `tree`. `blob_lens` are the lengths of the
/// layers' blobs, which follow it on the disk in this order.
pub(crate) fn build(tree: &Tree, blob_lens: &[u64]) -> Result<Vec<u8>, Error> {
    let mut inodes = collect(tree)?;
    let mut end = place_inodes(tree, &mut inodes);
    for inode in &mut inodes {
        let len = inode.blocks_len();
        if len > 0 {
            inode.block = block_number(end)?;
            end += len.next_multiple_of(BLOCK);
        }
    }
    let mut image = vec![0; end];
    let meta_blocks = u64::from(block_number(end)?);
    let mut bases = Vec::with_capacity(blob_lens.len());
    let mut total = meta_blocks;
    for len in blob_lens {
        bases.push(total);
        total += len.div_ceil(BLOCK_SIZE);
    }
    let total = u32::try_from(total)
        .ok()
        // The last number means "no block".
        .filter(|total| *total < u32::MAX)
        .ok_or(Error::TooLarge("it is larger than 16 TiB"))?;

    let mut nids = vec![0; tree.nodes.len()];
    for inode in &inodes {
        nids[inode.node] = u64::try_from(inode.at / SLOT).unwrap_or(u64::MAX);
    }
    for (number, inode) in (1u32..).zip(&inodes) {
        write_inode(&mut image, tree, inode, number, &nids, &bases)?;
    }
    let root = inodes.first().map_or(0, |root| root.at / SLOT);
    superblock::write(&mut image, root, inodes.len(), total);
    Ok(image)
}

fn block_number(offset: usize) -> Result<u32, Error> {
    u32::try_from(offset / BLOCK).map_err(|_| Error::TooLarge("it has too many files"))
}

/// All inodes that can be reached, parents before children, with link counts.
fn collect(tree: &Tree) -> Result<Vec<Placed>, Error> {
    let mut order: Vec<Placed> = Vec::new();
    let mut seen: Vec<Option<usize>> = vec![None; tree.nodes.len()];
    let mut queue = std::collections::VecDeque::from([(ROOT, ROOT)]);
    while let Some((id, parent)) = queue.pop_front() {
        if let Some(known) = seen[id] {
            // Another name of the same inode.
            order[known].links += 1;
            continue;
        }
        seen[id] = Some(order.len());
        let node = &tree.nodes[id];
        let (links, len) = match &node.kind {
            NodeKind::Directory(children) => {
                queue.extend(children.values().map(|child| (*child, id)));
                let is_directory =
                    |child: &&NodeId| matches!(tree.nodes[**child].kind, NodeKind::Directory(_));
                let subdirectories = children.values().filter(is_directory).count();
                let links = u32::try_from(subdirectories).unwrap_or(u32::MAX - 2) + 2;
                (links, directory_len(children.keys()))
            }
            NodeKind::Symlink(target) => (1, target.len()),
            _ => (1, 0),
        };
        order.push(Placed {
            node: id,
            parent,
            at: 0,
            links,
            xattrs: encode_xattrs(&node.meta)?,
            len,
            inline: false,
            block: 0,
        });
    }
    Ok(order)
}

/// Gives every inode its place; returns the end of the inodes, block-aligned.
fn place_inodes(tree: &Tree, inodes: &mut [Placed]) -> usize {
    let mut at = SUPER_OFFSET + SUPER_LEN;
    for inode in inodes {
        let tail = inode.len % BLOCK;
        let fixed = INODE_LEN + inode.xattrs.len();
        let has_data = matches!(
            tree.nodes[inode.node].kind,
            NodeKind::Directory(_) | NodeKind::Symlink(_)
        );
        inode.inline = has_data && tail > 0 && fixed + tail <= BLOCK;
        let needed = fixed + if inode.inline { tail } else { 0 };
        // Inode and inline data stay within a block where they can.
        if at % BLOCK + needed > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        inode.at = at;
        at = (at + needed).next_multiple_of(SLOT);
    }
    at.next_multiple_of(BLOCK)
}

fn write_inode(
    image: &mut [u8],
    tree: &Tree,
    inode: &Placed,
    number: u32,
    nids: &[u64],
    bases: &[u64],
) -> Result<(), Error> {
    let node = &tree.nodes[inode.node];
    let (kind, size, union) = describe(node, inode, bases)?;
    let meta = &node.meta;
    let xattr_count = match inode.xattrs.len() {
        0 => 0,
        len => (len - XATTR_HEADER_LEN) / 4 + 1,
    };
    let xattr_count = u16::try_from(xattr_count)
        .map_err(|_| Error::TooLarge("a file has too many extended attributes"))?;
    let format = if inode.inline { INLINE } else { PLAIN };
    let mut writer = Writer::at(image, inode.at);
    writer.u16(format);
    writer.u16(xattr_count);
    writer.u16(kind | meta.mode & 0o7777);
    writer.u16(0);
    writer.u64(size);
    writer.u32(union);
    writer.u32(number);
    writer.u32(meta.uid);
    writer.u32(meta.gid);
    writer.bytes(&meta.mtime.0.to_le_bytes());
    writer.u32(meta.mtime.1);
    writer.u32(inode.links);
    writer.bytes(&[0; 16]);
    writer.bytes(&inode.xattrs);
    let data = match &node.kind {
        NodeKind::Directory(_) => directory_data(tree, inode, nids),
        NodeKind::Symlink(target) => target.clone(),
        _ => return Ok(()),
    };
    let (blocks, tail) = data.split_at(inode.blocks_len());
    writer.bytes(tail);
    Writer::at(image, widen(inode.block) * BLOCK).bytes(blocks);
    Ok(())
}

/// File type, size, and what the inode's union holds: first block or device.
fn describe(node: &Node, inode: &Placed, bases: &[u64]) -> Result<(u16, u64, u32), Error> {
    let len = u64::try_from(inode.len).unwrap_or(u64::MAX);
    Ok(match &node.kind {
        NodeKind::Directory(_) => (S_IFDIR, len, inode.block),
        NodeKind::Symlink(_) => (S_IFLNK, len, inode.block),
        NodeKind::File { size: 0, .. } => (S_IFREG, 0, 0),
        NodeKind::File {
            layer,
            offset,
            size,
        } => {
            let base = bases.get(*layer).copied().unwrap_or_default();
            let block = u32::try_from(base + offset / BLOCK_SIZE)
                .map_err(|_| Error::TooLarge("it is larger than 16 TiB"))?;
            (S_IFREG, *size, block)
        }
        NodeKind::CharDevice(major, minor) => (S_IFCHR, 0, device_number(*major, *minor)),
        NodeKind::BlockDevice(major, minor) => (S_IFBLK, 0, device_number(*major, *minor)),
        NodeKind::Fifo => (S_IFIFO, 0, 0),
    })
}

/// Linux's `new_encode_dev`.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// Names of a directory with `.` and `..`, in byte order, cut into blocks.
fn directory_blocks<'a>(names: impl Iterator<Item = &'a Vec<u8>>) -> Vec<Vec<&'a [u8]>> {
    let mut names: Vec<&[u8]> = names.map(Vec::as_slice).chain([&b"."[..], b".."]).collect();
    names.sort_unstable();
    let mut blocks = Vec::new();
    let mut block: Vec<&[u8]> = Vec::new();
    let mut used = 0;
    for name in names {
        let needed = DIRENT_LEN + name.len();
        if used + needed > BLOCK {
            blocks.push(std::mem::take(&mut block));
            used = 0;
        }
        used += needed;
        block.push(name);
    }
    blocks.push(block);
    blocks
}

fn block_len(names: &[&[u8]]) -> usize {
    names.iter().map(|name| DIRENT_LEN + name.len()).sum()
}

fn directory_len<'a>(names: impl Iterator<Item = &'a Vec<u8>>) -> usize {
    let blocks = directory_blocks(names);
    let last = blocks.last().map_or(0, |names| block_len(names));
    (blocks.len() - 1) * BLOCK + last
}

fn directory_data(tree: &Tree, inode: &Placed, nids: &[u64]) -> Vec<u8> {
    let NodeKind::Directory(children) = &tree.nodes[inode.node].kind else {
        return Vec::new();
    };
    let mut data = Vec::with_capacity(inode.len);
    let blocks = directory_blocks(children.keys());
    let last = blocks.len() - 1;
    for (number, names) in blocks.iter().enumerate() {
        let mut name_offset = names.len() * DIRENT_LEN;
        for name in names {
            let id = match *name {
                b"." => inode.node,
                b".." => inode.parent,
                name => children.get(name).copied().unwrap_or(ROOT),
            };
            data.extend_from_slice(&nids[id].to_le_bytes());
            // Within a block, so it fits.
            data.extend_from_slice(&u16::try_from(name_offset).unwrap_or(0).to_le_bytes());
            data.push(dirent_type(&tree.nodes[id].kind));
            data.push(0);
            name_offset += name.len();
        }
        for name in names {
            data.extend_from_slice(name);
        }
        if number < last {
            data.resize((number + 1) * BLOCK, 0);
        }
    }
    data
}

fn dirent_type(kind: &NodeKind) -> u8 {
    match kind {
        NodeKind::File { .. } => 1,
        NodeKind::Directory(_) => 2,
        NodeKind::CharDevice(..) => 3,
        NodeKind::BlockDevice(..) => 4,
        NodeKind::Fifo => 5,
        NodeKind::Symlink(_) => 7,
    }
}

/// Extended attributes as they follow an inode; nothing if there are none.
fn encode_xattrs(meta: &Meta) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; XATTR_HEADER_LEN];
    for (name, value) in &meta.xattrs {
        if OVERLAY.iter().any(|own| name.starts_with(own)) {
            continue;
        }
        let prefix = XATTR_PREFIXES
            .iter()
            .find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)));
        // What the kernel could not be asked for is of no use.
        let Some((suffix, index)) = prefix else {
            continue;
        };
        let too_long = |_| Error::TooLarge("an extended attribute is too long");
        bytes.push(u8::try_from(suffix.len()).map_err(too_long)?);
        bytes.push(index);
        let value_len = u16::try_from(value.len())
            .map_err(|_| Error::TooLarge("an extended attribute is too long"))?;
        bytes.extend_from_slice(&value_len.to_le_bytes());
        bytes.extend_from_slice(suffix);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(XATTR_ENTRY_LEN), 0);
    }
    if bytes.len() == XATTR_HEADER_LEN {
        bytes.clear();
    }
    Ok(bytes)
}

/// Appends little-endian numbers at a position.
struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    fn at(bytes: &'a mut [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// Every place was reserved by the same computation that writes it.
    fn bytes(&mut self, bytes: &[u8]) {
        self.bytes[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
}

fn widen(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_cut_between_entries() {
        let names: Vec<Vec<u8>> = (0..1000)
            .map(|n| format!("name{n:05}").into_bytes())
            .collect();
        let blocks = directory_blocks(names.iter());
        assert!(blocks.len() > 1);
        assert!(blocks.iter().all(|names| block_len(names) <= BLOCK));
        let all: Vec<_> = blocks.concat();
        assert_eq!(all.len(), 1002);
        assert!(all.is_sorted());
    }

    #[test]
    fn device_numbers_are_linuxs() {
        assert_eq!(device_number(8, 1), 0x801);
        assert_eq!(device_number(259, 0x1234), 0x0121_0334);
    }

    #[test]
    fn overlays_own_attributes_are_dropped() {
        let meta = Meta {
            xattrs: vec![
                (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()),
                (b"user.a".to_vec(), b"bc".to_vec()),
            ],
            ..Meta::default()
        };
        let bytes = encode_xattrs(&meta).unwrap();
        assert_eq!(
            &bytes[XATTR_HEADER_LEN..],
            [1, 1, 2, 0, b'a', b'b', b'c', 0]
        );
    }
}
