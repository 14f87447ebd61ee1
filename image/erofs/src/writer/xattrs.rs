//! Extended attributes: those of an inode follow it, and attributes that several inodes
//! have are stored once and referred to by number.

use std::collections::HashMap;

use super::TOO_MANY;
use crate::{Error, FileTree, InodeId};

const HEADER_LEN: usize = 12;
/// Unit of attributes and of references to shared ones, in bytes.
const UNIT: usize = 4;
/// Maximum number of references of an inode, which are counted in one byte.
const MOST_SHARED: usize = 255;

/// Name prefixes that are stored as a number.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// The encoded sets of attributes of a tree.
#[derive(Default)]
pub(super) struct EncodedXattrs {
    sets: Vec<Vec<u8>>,
    shared: Vec<u8>,
}

impl EncodedXattrs {
    /// Encodes the sets used by the inodes in `order`.
    pub(super) fn new(tree: &impl FileTree, order: &[InodeId]) -> Result<Self, Error> {
        let mut users = vec![0u64; tree.xattr_sets()];
        for id in order {
            if let Some(users) = users.get_mut(tree.xattr_set(*id) as usize) {
                *users += 1;
            }
        }
        let shared = Shared::of(tree, &users)?;
        let encode = |(set, users): (u32, &u64)| match *users {
            0 => Ok(Vec::new()),
            _ => shared.encode(tree, set),
        };
        let sets = (0u32..).zip(&users).map(encode).collect::<Result<_, _>>()?;
        Ok(Self {
            sets,
            shared: shared.bytes,
        })
    }

    /// Returns the bytes that follow an inode with this set.
    pub(super) fn get(&self, set: u32) -> &[u8] {
        self.sets.get(set as usize).map_or(&[], Vec::as_slice)
    }

    pub(super) fn len(&self, set: u32) -> u64 {
        self.get(set).len() as u64
    }

    /// Returns `i_xattr_icount`.
    pub(super) fn count(&self, set: u32) -> Result<u16, Error> {
        match self.get(set).len() {
            0 => Ok(0),
            len => u16::try_from((len - HEADER_LEN) / UNIT + 1)
                .map_err(|_| Error::TooLarge("a file has too many extended attributes")),
        }
    }

    /// Returns the encoded shared attributes.
    pub(super) fn shared(&self) -> &[u8] {
        &self.shared
    }

    pub(super) fn shared_len(&self) -> u64 {
        self.shared.len() as u64
    }
}

/// Attributes that several inodes have.
struct Shared<'t> {
    bytes: Vec<u8>,
    /// Offset of each attribute in units.
    numbers: HashMap<(&'t [u8], &'t [u8]), u32>,
}

impl<'t> Shared<'t> {
    fn of(tree: &'t impl FileTree, users: &[u64]) -> Result<Self, Error> {
        let mut counts = HashMap::new();
        let mut inorder = Vec::new();
        let mut attributes = Vec::new();
        for (set, users) in (0u32..).zip(users).filter(|(_, users)| **users > 0) {
            attributes.clear();
            tree.xattrs(set, &mut attributes);
            for attribute in attributes.iter().copied() {
                let count = counts.entry(attribute).or_insert_with(|| {
                    inorder.push(attribute);
                    0u64
                });
                *count += users;
            }
        }
        let mut shared = Self {
            bytes: Vec::new(),
            numbers: HashMap::new(),
        };
        let mut encoded = Vec::new();
        for attribute in inorder {
            let many = counts.get(&attribute).is_some_and(|count| *count > 1);
            encoded.clear();
            // A reference takes a unit, so a smaller attribute is not shared.
            if many && encode(attribute, &mut encoded)? && encoded.len() > UNIT {
                let number = u32::try_from(shared.bytes.len() / UNIT).map_err(|_| TOO_MANY)?;
                shared.numbers.insert(attribute, number);
                shared.bytes.extend_from_slice(&encoded);
            }
        }
        Ok(shared)
    }

    /// Encodes the set as it follows an inode; empty if there are no attributes.
    fn encode(&self, tree: &'t impl FileTree, set: u32) -> Result<Vec<u8>, Error> {
        let mut references = Vec::new();
        let mut own = Vec::new();
        let mut attributes = Vec::new();
        tree.xattrs(set, &mut attributes);
        for attribute in attributes {
            match self.numbers.get(&attribute) {
                Some(number) if references.len() < MOST_SHARED => references.push(*number),
                _ => {
                    encode(attribute, &mut own)?;
                }
            }
        }
        if references.is_empty() && own.is_empty() {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4] = u8::try_from(references.len()).unwrap_or(0);
        for number in references {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&own);
        Ok(bytes)
    }
}

/// Appends an attribute. Returns `false` if EROFS does not support its namespace.
fn encode((name, value): (&[u8], &[u8]), bytes: &mut Vec<u8>) -> Result<bool, Error> {
    let prefix = PREFIXES
        .iter()
        .find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)));
    let Some((suffix, index)) = prefix else {
        return Ok(false);
    };
    let too_long = |_| Error::TooLarge("an extended attribute is too long");
    let value_len = u16::try_from(value.len()).map_err(too_long)?;
    bytes.push(u8::try_from(suffix.len()).map_err(too_long)?);
    bytes.push(index);
    bytes.extend_from_slice(&value_len.to_le_bytes());
    bytes.extend_from_slice(suffix);
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(UNIT), 0);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Entry, EntryKind, Tree};

    /// Name and value.
    type Pair<'a> = (&'a str, &'a [u8]);

    /// Creates a tree of files in the root with extended attributes. Inodes are numbered
    /// from 1.
    fn with_xattrs(files: &[(&str, &[Pair<'_>])]) -> Tree {
        let mut tree = Tree::new();
        for (path, xattrs) in files {
            let mut file = Entry::new(EntryKind::Bytes(b"x".to_vec()));
            for (name, value) in *xattrs {
                file = file.xattr(name.as_bytes(), *value);
            }
            tree.add(path.as_bytes(), file).unwrap();
        }
        tree
    }

    #[test]
    fn attributes_that_erofs_cannot_name_are_dropped() {
        let tree = with_xattrs(&[("a", &[("os2.thing", b"y"), ("user.a", b"bc")])]);
        let encoded = EncodedXattrs::new(&tree, &[1]).unwrap();
        assert_eq!(
            encoded.get(1)[HEADER_LEN..],
            [1, 1, 2, 0, b'a', b'b', b'c', 0]
        );
        assert_eq!(encoded.count(1).unwrap(), 3);
    }

    #[test]
    fn shared_attributes_are_stored_once() {
        let label: &[u8] = b"system_u:object_r:bin_t:s0";
        let tree = with_xattrs(&[
            ("a", &[("security.selinux", label)]),
            ("b", &[("security.selinux", label), ("user.b", b"own")]),
        ]);
        let encoded = EncodedXattrs::new(&tree, &[1, 2]).unwrap();
        assert_eq!(encoded.shared().len(), 40);
        assert_eq!(
            encoded.get(1),
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            encoded.get(2)[HEADER_LEN + UNIT..],
            b"\x01\x01\x03\0bown\0\0\0\0"[..8]
        );
    }
}
