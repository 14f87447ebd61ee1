//! Writes [EROFS](https://erofs.docs.kernel.org) file systems, which Linux mounts
//! read-only, from a directory, a tar stream, or any tree that implements [`FileTree`].
//!
//! Equal trees produce equal bytes. Owners, permissions, times to the nanosecond, hard
//! links, devices and extended attributes are preserved; extended attributes that several
//! inodes have are stored once. Files are not compressed.
//!
//! ```
//! use std::fs::File;
//!
//! use sm_erofs::{Entry, EntryKind, Options, Tree, write};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! let mut tree = Tree::new();
//! tree.add(b"etc/hostname", Entry::new(EntryKind::Bytes(b"guest\n".to_vec())))?;
//! tree.add(b"etc/name", Entry::new(EntryKind::Symlink(b"hostname".to_vec())))?;
//!
//! let image = File::create_new(directory.path().join("image.erofs"))?;
//! let len = write(&tree, &image, &Options::default())?;
//! assert_eq!(len, image.metadata()?.len());
//! assert_eq!(len % sm_erofs::BLOCK, 0);
//! # Ok(())
//! # }
//! ```
//!
//! Contents of files are part of the image ([`Data::Image`]) or follow it on the disk
//! ([`Data::Behind`]). A program whose contents are in a file already can write only the
//! metadata, and append its file.
//!
//! Architecture invariants: an image is planned first and then written from front to
//! back, so the writer stores a few numbers for each inode and no contents; no answer of
//! a tree causes a panic.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod error;
mod source;
mod tree;
mod writer;

pub use error::Error;
pub use source::{Data, FileTree, InodeId, Kind, Meta, ROOT};
pub use tree::{Entry, EntryKind, Tree};
pub use writer::{BLOCK, Options, write};
