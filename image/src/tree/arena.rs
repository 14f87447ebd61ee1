//! Storage for data of the tables: names, link targets, extended attributes.

use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;

use super::{Reason, exceeded};
use crate::index::Xattrs;

/// A reference to bytes in an [`Arena`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Text {
    at: u32,
    len: u16,
}

impl Text {
    /// Converts the reference to a number; [`Self::unpack`] is the inverse.
    pub(super) fn pack(self) -> u64 {
        u64::from(self.at) << 16 | u64::from(self.len)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the parts that `pack` put together"
    )]
    pub(super) fn unpack(packed: u64) -> Self {
        Self {
            at: (packed >> 16) as u32,
            len: packed as u16,
        }
    }
}

/// Concatenated texts.
#[derive(Default)]
pub(super) struct Arena {
    bytes: Vec<u8>,
}

impl Arena {
    /// Stores `text`, unless the total would exceed `most` bytes.
    pub(super) fn add(&mut self, text: &[u8], most: usize) -> Result<Text, Reason> {
        let too_many = || exceeded(format!("the image has more than {most} bytes of names"));
        let at = u32::try_from(self.bytes.len()).map_err(|_| too_many())?;
        let len = u16::try_from(text.len()).map_err(|_| too_many())?;
        if self.bytes.len() + text.len() > most {
            return Err(too_many());
        }
        self.bytes.extend_from_slice(text);
        Ok(Text { at, len })
    }

    pub(super) fn get(&self, text: Text) -> &[u8] {
        let at = text.at as usize;
        self.bytes
            .get(at..at + usize::from(text.len))
            .unwrap_or_default()
    }
}

/// Sets of extended attributes, each stored once: most inodes have none, and those with
/// attributes often share them.
#[derive(Default)]
pub(super) struct XattrSets {
    bytes: Vec<u8>,
    /// Location of each set.
    sets: Vec<(usize, usize)>,
    by_content: HashTable<u32>,
    hasher: RandomState,
}

impl XattrSets {
    /// Returns the number of a set; 0 is the empty one.
    pub(super) fn number(&mut self, xattrs: Xattrs<'_>, most: usize) -> Result<u32, Reason> {
        let content = xattrs.bytes();
        if content.is_empty() {
            return Ok(0);
        }
        let hash = self.hasher.hash_one(content);
        let same = |number: &u32| self.get(*number).bytes() == content;
        if let Some(known) = self.by_content.find(hash, same) {
            return Ok(*known);
        }
        let too_many = || {
            exceeded(format!(
                "the image has more than {most} bytes of extended attributes"
            ))
        };
        if self.bytes.len() + content.len() > most {
            return Err(too_many());
        }
        self.sets.push((self.bytes.len(), content.len()));
        let number = u32::try_from(self.sets.len()).map_err(|_| too_many())?;
        self.bytes.extend_from_slice(content);
        let Self {
            bytes,
            sets,
            by_content,
            hasher,
        } = self;
        by_content.insert_unique(hash, number, |number| {
            hasher.hash_one(slice(bytes, sets, *number))
        });
        Ok(number)
    }

    /// Returns the set with this number.
    pub(super) fn get(&self, number: u32) -> Xattrs<'_> {
        Xattrs::encoded(slice(&self.bytes, &self.sets, number))
    }

    /// Returns the number of sets, including the empty one.
    pub(super) fn count(&self) -> usize {
        self.sets.len() + 1
    }
}

fn slice<'a>(bytes: &'a [u8], sets: &[(usize, usize)], number: u32) -> &'a [u8] {
    let set = (number as usize).checked_sub(1).and_then(|n| sets.get(n));
    set.and_then(|(at, len)| bytes.get(*at..at + len))
        .unwrap_or_default()
}
