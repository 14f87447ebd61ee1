//! The clusters that a layer has: one bit for each, in leaves of one page.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Length of a leaf in the file.
pub(super) const LEAF_BYTES: usize = 4096;
/// Clusters that one leaf describes.
pub(super) const LEAF_CLUSTERS: u64 = LEAF_BYTES as u64 * 8;
const WORDS: usize = LEAF_BYTES / 8;

/// A set of clusters, which only grows. A leaf exists from its first cluster on.
///
/// Any thread may read and add. A cluster that is seen in the set has its data in the file:
/// [`insert`](Self::insert) comes after the write.
#[derive(Debug)]
pub(super) struct Index {
    leaves: Box<[OnceLock<Box<Leaf>>]>,
    clusters: u64,
}

#[derive(Debug)]
struct Leaf {
    words: [AtomicU64; WORDS],
    /// It has clusters that the file's index may lack.
    is_dirty: AtomicBool,
}

/// The position of a cluster: its leaf, its word there, and its bit there.
fn position(cluster: u64) -> (usize, usize, u32) {
    let leaf = usize::try_from(cluster / LEAF_CLUSTERS).unwrap_or(usize::MAX);
    // Below LEAF_CLUSTERS, which is 32,768.
    let within = u32::try_from(cluster % LEAF_CLUSTERS).unwrap_or(0);
    (leaf, (within / 64) as usize, within % 64)
}

/// `count` bits from `first` on, which end in the same word.
fn mask(first: u32, count: u32) -> u64 {
    let ones = u64::MAX >> (64 - count.clamp(1, 64));
    ones << first
}

impl Index {
    /// An empty set of numbers below `clusters`.
    pub(super) fn new(clusters: u64) -> Self {
        let leaves = usize::try_from(clusters.div_ceil(LEAF_CLUSTERS)).unwrap_or(usize::MAX);
        Self {
            leaves: std::iter::repeat_with(OnceLock::new).take(leaves).collect(),
            clusters,
        }
    }

    /// The length of the index in the file, for that many clusters.
    pub(super) fn file_len(clusters: u64) -> u64 {
        clusters.div_ceil(LEAF_CLUSTERS) * LEAF_BYTES as u64
    }

    /// Returns true if the set has no clusters.
    pub(super) fn is_empty(&self) -> bool {
        // A leaf exists from its first cluster on.
        self.leaves.iter().all(|leaf| leaf.get().is_none())
    }

    /// The number of its clusters.
    pub(super) fn count(&self) -> u64 {
        let leaves = self.leaves.iter().filter_map(OnceLock::get);
        let words = leaves.flat_map(|leaf| &leaf.words);
        words
            .map(|word| u64::from(word.load(Ordering::Acquire).count_ones()))
            .sum()
    }

    /// Adds the clusters of a leaf of the file.
    pub(super) fn load(&self, leaf: usize, bytes: &[u8; LEAF_BYTES]) {
        if bytes.iter().all(|&byte| byte == 0) {
            return;
        }
        let Some(leaf) = self.leaf(leaf) else {
            return;
        };
        for (word, bytes) in leaf.words.iter().zip(bytes.as_chunks::<8>().0) {
            word.fetch_or(u64::from_le_bytes(*bytes), Ordering::Release);
        }
    }

    /// The leaf, which is created if there is none yet.
    fn leaf(&self, leaf: usize) -> Option<&Leaf> {
        let leaf = self.leaves.get(leaf)?;
        let new = || {
            Box::new(Leaf {
                words: [const { AtomicU64::new(0) }; WORDS],
                is_dirty: AtomicBool::new(false),
            })
        };
        Some(leaf.get_or_init(new))
    }

    /// Returns true if the set has `cluster`, and the number of clusters from there on,
    /// `most` at most, of which the same is true. The set has no clusters past its end.
    pub(super) fn run(&self, cluster: u64, most: u64) -> (bool, u64) {
        let (mut answer, mut len) = (None, 0);
        while len < most {
            let at = cluster.saturating_add(len);
            if at >= self.clusters {
                return match answer {
                    Some(true) => (true, len),
                    _ => (false, most),
                };
            }
            let (leaf, word, bit) = position(at);
            let Some(found) = self.leaves.get(leaf).and_then(OnceLock::get) else {
                // No cluster of this leaf.
                if answer == Some(true) {
                    break;
                }
                answer = Some(false);
                len += LEAF_CLUSTERS - at % LEAF_CLUSTERS;
                continue;
            };
            let bits = found.words[word].load(Ordering::Acquire) >> bit;
            let first = *answer.get_or_insert(bits & 1 == 1);
            let same = if first {
                bits.trailing_ones()
            } else {
                bits.trailing_zeros()
            };
            // The shift has filled up with zeros.
            let same = same.min(64 - bit);
            len += u64::from(same);
            if same < 64 - bit {
                break;
            }
        }
        (answer == Some(true), len.min(most))
    }

    /// Returns true if the set has all of `clusters`.
    pub(super) fn has_all(&self, clusters: &Range<u64>) -> bool {
        let count = clusters.end - clusters.start;
        self.run(clusters.start, count) == (true, count)
    }

    /// Adds `clusters`.
    pub(super) fn insert(&self, clusters: Range<u64>) {
        let mut at = clusters.start;
        let end = clusters.end.min(self.clusters);
        while at < end {
            let (number, word, bit) = position(at);
            let count = (end - at).min(u64::from(64 - bit));
            if let Some(leaf) = self.leaf(number) {
                // At most 64.
                let added = mask(bit, u32::try_from(count).unwrap_or(64));
                let before = leaf.words[word].fetch_or(added, Ordering::Release);
                if before & added != added {
                    leaf.is_dirty.store(true, Ordering::Release);
                }
            }
            at += count;
        }
    }

    /// Copies the leaves that have changed since the last call. A cluster that is added
    /// meanwhile is in this copy or in that of the next call.
    pub(super) fn take_dirty(&self) -> Vec<(usize, Box<[u8; LEAF_BYTES]>)> {
        let mut dirty = Vec::new();
        for (number, leaf) in self.leaves.iter().enumerate() {
            let Some(leaf) = leaf.get() else {
                continue;
            };
            if !leaf.is_dirty.swap(false, Ordering::AcqRel) {
                continue;
            }
            let mut bytes = Box::new([0; LEAF_BYTES]);
            for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&leaf.words) {
                *to = word.load(Ordering::Acquire).to_le_bytes();
            }
            dirty.push((number, bytes));
        }
        dirty
    }

    /// Marks leaves whose copies could not be written.
    pub(super) fn mark_dirty(&self, leaves: impl Iterator<Item = usize>) {
        for leaf in leaves {
            if let Some(leaf) = self.leaves.get(leaf).and_then(OnceLock::get) {
                leaf.is_dirty.store(true, Ordering::Release);
            }
        }
    }

    /// The number of leaves that exist.
    #[cfg(test)]
    pub(super) fn leaves(&self) -> usize {
        self.leaves.iter().filter_map(OnceLock::get).count()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Not a multiple of a leaf or a word.
    const CLUSTERS: u64 = 3 * LEAF_CLUSTERS + 77;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        let near = prop_oneof![
            0..CLUSTERS,
            LEAF_CLUSTERS - 70..LEAF_CLUSTERS + 70,
            CLUSTERS - 70..CLUSTERS,
        ];
        let range = (near, 1..200u64).prop_map(|(at, len)| at..(at + len).min(CLUSTERS));
        prop::collection::vec(range, 0..12)
    }

    proptest! {
        #[test]
        fn an_index_is_the_set_that_was_added(ranges in ranges(), at in 0..CLUSTERS, most in 1..500u64) {
            let index = Index::new(CLUSTERS);
            let mut model = BTreeSet::new();
            for range in &ranges {
                index.insert(range.clone());
                model.extend(range.clone());
            }
            for at in ranges.iter().map(|range| range.start).chain([at]) {
                let (has, len) = index.run(at, most);
                prop_assert!((1..=most).contains(&len));
                prop_assert!((at..at + len).all(|cluster| model.contains(&cluster) == has));
                if len < most {
                    prop_assert_ne!(model.contains(&(at + len)), has);
                }
            }
            // As the file has it.
            let copy = Index::new(CLUSTERS);
            for (leaf, bytes) in index.take_dirty() {
                copy.load(leaf, &bytes);
            }
            prop_assert!(index.take_dirty().is_empty());
            prop_assert_eq!(copy.leaves(), index.leaves());
            let mut at = 0;
            while at < CLUSTERS {
                let run = copy.run(at, CLUSTERS - at);
                prop_assert_eq!(run, index.run(at, CLUSTERS - at));
                at += run.1;
            }
        }
    }

    #[test]
    fn nothing_lies_past_the_end() {
        let index = Index::new(100);
        index.insert(90..200);
        assert_eq!(index.run(90, 500), (true, 10));
        assert_eq!(index.run(100, 500), (false, 500));
        assert_eq!(index.run(u64::MAX, 5), (false, 5));
        assert!(index.has_all(&(90..100)));
        assert!(!index.has_all(&(90..101)));
    }

    #[test]
    fn what_is_not_new_makes_nothing_dirty() {
        let index = Index::new(100);
        index.insert(3..5);
        assert_eq!(index.take_dirty().len(), 1);
        index.insert(3..4);
        assert_eq!(index.take_dirty().len(), 0);
        index.mark_dirty([0, 7].into_iter());
        assert_eq!(index.take_dirty().len(), 1);
    }
}
