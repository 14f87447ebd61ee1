//! Directories: blocks with entries, followed by the names of these entries. Linux looks
//! names up by binary search, so all names are sorted by their bytes.

use super::{BLOCK, BLOCK_BYTES};
use crate::{FileTree, InodeId, Kind};

const DIRENT_LEN: usize = 12;

/// The sorted entries of a directory.
pub(super) struct Directory<'t> {
    entries: Vec<(&'t [u8], InodeId)>,
    /// Number of entries in each block.
    blocks: Vec<usize>,
    len: u64,
}

impl<'t> Directory<'t> {
    pub(super) fn of(tree: &'t impl FileTree, id: InodeId) -> Self {
        let mut entries = Vec::new();
        tree.children(id, &mut entries);
        if !entries.is_sorted() {
            entries.sort_unstable();
        }
        for (name, inode) in [(&b"."[..], id), (b"..", tree.parent(id))] {
            let at = entries.partition_point(|(other, _)| *other < name);
            entries.insert(at, (name, inode));
        }
        let (mut blocks, mut in_block, mut used) = (Vec::new(), 0, 0);
        for (name, _) in &entries {
            let needed = DIRENT_LEN + name.len();
            if (used + needed) as u64 > BLOCK {
                blocks.push(in_block);
                (in_block, used) = (0, 0);
            }
            in_block += 1;
            used += needed;
        }
        let len = blocks.len() as u64 * BLOCK + used as u64;
        blocks.push(in_block);
        Self {
            entries,
            blocks,
            len,
        }
    }

    /// Returns the length of the encoded directory in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends the encoded directory to `data`, which must be empty.
    pub(super) fn encode(
        &self,
        tree: &impl FileTree,
        nid: impl Fn(InodeId) -> u32,
        data: &mut Vec<u8>,
    ) {
        let mut rest = self.entries.as_slice();
        for (number, count) in self.blocks.iter().enumerate() {
            let (block, after) = rest.split_at(*count);
            rest = after;
            data.resize(number * BLOCK_BYTES, 0);
            let mut name_offset = block.len() * DIRENT_LEN;
            for (name, inode) in block {
                data.extend_from_slice(&u64::from(nid(*inode)).to_le_bytes());
                // The offset is within a block, so it fits.
                data.extend_from_slice(&u16::try_from(name_offset).unwrap_or(0).to_le_bytes());
                let kind = match *name {
                    b"." | b".." => file_type(Kind::Directory),
                    _ if (*inode as usize) < tree.inode_count() => file_type(tree.kind(*inode)),
                    // The tree is inconsistent.
                    _ => 0,
                };
                data.extend_from_slice(&[kind, 0]);
                name_offset += name.len();
            }
            for (name, _) in block {
                data.extend_from_slice(name);
            }
        }
    }
}

fn file_type(kind: Kind<'_>) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory => 2,
        Kind::CharDevice(..) => 3,
        Kind::BlockDevice(..) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Entry, EntryKind, ROOT, Tree};

    #[test]
    fn directories_are_cut_between_entries() {
        let mut tree = Tree::new();
        for n in 0..1000 {
            let path = format!("name{n:05}");
            let file = Entry::new(EntryKind::Bytes(b"x".to_vec()));
            tree.add(path.as_bytes(), file).unwrap();
        }
        let directory = Directory::of(&tree, ROOT);
        assert!(directory.blocks.len() > 1);
        assert_eq!(directory.entries.len(), 1002);
        let mut data = Vec::new();
        directory.encode(&tree, |id| id, &mut data);
        assert_eq!(data.len() as u64, directory.len());
        // The first entry of a block contains the offset of its names, which determines
        // the number of entries.
        let mut seen = Vec::new();
        for block in data.chunks(4096) {
            let offset = |n: usize| {
                let at = n * DIRENT_LEN + 8;
                usize::from(u16::from_le_bytes([block[at], block[at + 1]]))
            };
            let count = offset(0) / DIRENT_LEN;
            for n in 0..count {
                let end = match n + 1 < count {
                    true => offset(n + 1),
                    false => block.iter().rposition(|byte| *byte != 0).unwrap() + 1,
                };
                seen.push(block[offset(n)..end].to_vec());
            }
        }
        assert_eq!(seen.len(), 1002);
        assert!(seen.is_sorted());
    }
}
