//! Construction of trees for tests of other modules.

use super::Tree;
use crate::index::{ContentLocation, Entry, EntryKind, Meta, Xattrs, encode_xattrs};
use crate::limits::Limits;

const FILE: EntryKind<'static> = EntryKind::File {
    location: ContentLocation::Blob(0),
    size: 1,
};

/// Creates files in the root, in this order.
pub(crate) fn of_files<'a>(paths: impl IntoIterator<Item = &'a str>) -> Tree {
    let mut tree = Tree::new(Limits::default());
    for path in paths {
        let entry = Entry {
            path: path.as_bytes(),
            kind: FILE,
            meta: Meta::default(),
            xattrs: Xattrs::default(),
        };
        tree.add(0, &entry).unwrap();
    }
    tree
}

/// Name and value.
type Pair<'a> = (&'a str, &'a [u8]);

/// Creates files with extended attributes in the root.
pub(crate) fn with_xattrs(files: &[(&str, &[Pair<'_>])]) -> Tree {
    let mut tree = Tree::new(Limits::default());
    for (path, xattrs) in files {
        let xattrs: Vec<_> = xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()))
            .collect();
        let encoded = encode_xattrs(&xattrs).unwrap();
        let entry = Entry {
            path: path.as_bytes(),
            kind: FILE,
            meta: Meta::default(),
            xattrs: Xattrs::encoded(&encoded),
        };
        tree.add(0, &entry).unwrap();
    }
    tree
}
