//! The *metadata image*: an EROFS file system without the contents of files, except small
//! ones. Other contents remain in the layers' blobs, which follow the metadata image on
//! the composite disk; a file's inode refers to them by block number.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use sm_erofs::{Data, FileTree, Options};

use crate::Error;
use crate::blob::BLOCK_SIZE;
use crate::digest::Digest;
use crate::index::ContentLocation;
use crate::tree::{InodeId, Kind, Tree};

const _: () = assert!(sm_erofs::BLOCK == BLOCK_SIZE);
const _: () = assert!(sm_erofs::ROOT == crate::tree::ROOT);

/// Attributes that the guest's overlay file system uses itself. An image must not set
/// them.
const OVERLAY: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// The data of a layer that is on the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerData<'a> {
    /// Length of the blob in bytes.
    pub(crate) blob_len: u64,
    /// Contents of small files.
    pub(crate) small: &'a File,
}

/// Writes the metadata image of `tree` to an empty file and returns its length in bytes.
/// `layers` are the layers of the tree; their blobs follow it on the disk in this order.
/// The file system's UUID derives from `identity`.
pub(crate) fn build(
    tree: &Tree,
    layers: &[LayerData<'_>],
    identity: Digest,
    file: &File,
) -> Result<u64, Error> {
    let mut blobs_len = 0u64;
    let mut bases = Vec::with_capacity(layers.len());
    for layer in layers {
        bases.push(blobs_len);
        let blocks = layer.blob_len.div_ceil(BLOCK_SIZE);
        blobs_len = blobs_len.saturating_add(blocks.saturating_mul(BLOCK_SIZE));
    }
    let stack = Stack {
        tree,
        layers,
        bases,
    };
    let options = Options::default().uuid(uuid(identity)).behind(blobs_len);
    sm_erofs::write(&stack, file, &options).map_err(|error| match error {
        sm_erofs::Error::TooLarge(what) => Error::TooLarge(what),
        sm_erofs::Error::Read(source) | sm_erofs::Error::Write(source) => {
            Error::MetadataImage(source)
        }
        other => Error::MetadataImage(io::Error::other(other)),
    })
}

/// Returns a UUID of version 8 (RFC 9562).
fn uuid(identity: Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&identity.bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// Implements the writer's view of a stack of layers.
struct Stack<'a> {
    tree: &'a Tree,
    layers: &'a [LayerData<'a>],
    /// Start of each layer's blob, in bytes from the end of the metadata image.
    bases: Vec<u64>,
}

impl FileTree for Stack<'_> {
    fn inode_count(&self) -> usize {
        self.tree.inode_count()
    }

    fn kind(&self, id: InodeId) -> sm_erofs::Kind<'_> {
        match self.tree.kind(id) {
            Kind::Directory => sm_erofs::Kind::Directory,
            Kind::File {
                layer,
                location,
                size,
            } => {
                let data = match location {
                    ContentLocation::Small(_) => Data::Image,
                    ContentLocation::Blob(offset) => {
                        let base = self.bases.get(usize::from(layer)).copied();
                        Data::Behind(base.unwrap_or_default().saturating_add(offset))
                    }
                };
                sm_erofs::Kind::File { data, size }
            }
            Kind::Symlink(target) => sm_erofs::Kind::Symlink(self.tree.text(target)),
            Kind::CharDevice(major, minor) => sm_erofs::Kind::CharDevice(major, minor),
            Kind::BlockDevice(major, minor) => sm_erofs::Kind::BlockDevice(major, minor),
            Kind::Fifo => sm_erofs::Kind::Fifo,
        }
    }

    fn meta(&self, id: InodeId) -> sm_erofs::Meta {
        let meta = self.tree.meta(id);
        sm_erofs::Meta {
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            mtime: meta.mtime,
        }
    }

    fn parent(&self, directory: InodeId) -> InodeId {
        self.tree.parent(directory)
    }

    fn children<'t>(&'t self, directory: InodeId, children: &mut Vec<(&'t [u8], InodeId)>) {
        let mut own = Vec::new();
        self.tree.children(directory, &mut own);
        let own = own.into_iter();
        children.extend(own.map(|(name, inode)| (self.tree.text(name), inode)));
    }

    fn xattr_set(&self, id: InodeId) -> u32 {
        self.tree.xattr_set(id)
    }

    fn xattr_sets(&self) -> usize {
        self.tree.xattr_sets()
    }

    fn xattrs<'t>(&'t self, set: u32, attributes: &mut Vec<(&'t [u8], &'t [u8])>) {
        let of_images =
            |(name, _): &(&[u8], &[u8])| !OVERLAY.iter().any(|own| name.starts_with(own));
        attributes.extend(self.tree.xattrs(set).iter().filter(of_images));
    }

    fn read_at(&self, file: InodeId, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let Kind::File {
            layer,
            location: ContentLocation::Small(begin),
            ..
        } = self.tree.kind(file)
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        match self.layers.get(usize::from(layer)) {
            Some(layer) => layer
                .small
                .read_exact_at(buffer, begin.saturating_add(offset)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::testing;

    #[test]
    fn blobs_follow_those_of_lower_layers() {
        let tree = testing::of_files(["a"]);
        let stack = Stack {
            tree: &tree,
            layers: &[],
            bases: vec![3 * BLOCK_SIZE],
        };
        let file = sm_erofs::Kind::File {
            data: Data::Behind(3 * BLOCK_SIZE),
            size: 1,
        };
        assert_eq!(stack.kind(1), file);
    }

    #[test]
    fn overlays_own_attributes_are_dropped() {
        let tree =
            testing::with_xattrs(&[("a", &[("trusted.overlay.opaque", b"y"), ("user.a", b"bc")])]);
        let stack = Stack {
            tree: &tree,
            layers: &[],
            bases: Vec::new(),
        };
        let mut attributes = Vec::new();
        stack.xattrs(1, &mut attributes);
        assert_eq!(attributes, [(&b"user.a"[..], &b"bc"[..])]);
    }
}
