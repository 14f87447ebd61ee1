//! Extents of pages, and the flattening of a chain of snapshots into one list of
//! mappings.
//!
//! Pages are numbered in *RAM order*: guest memory without the hole below 4 GiB. Page `p`
//! of a snapshot is stored at byte offset `p * PAGE` of its `memory.bin` at every depth
//! of a chain, so that no lookup is needed to map it.

use serde::{Deserialize, Serialize};

use crate::runs::{Run, push as push_run};

/// Size of a page in bytes.
pub const PAGE: u64 = 4096;

/// Kind of the content of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ExtentKind {
    /// The pages are stored in the snapshot's `memory.bin`.
    Data,
    /// The pages are zero, and the parent's may not be.
    Zero,
}

/// A run of pages with the same kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First page, in RAM order.
    pub first: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
    /// Kind of their content.
    pub content: ExtentKind,
}

impl Extent {
    /// Returns the number of the page after the last one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }
}

/// Index of `memory.bin`, stored as a section of `state.bin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryIndex {
    /// Guest physical start and length of each RAM region, in RAM order.
    pub regions: Vec<(u64, u64)>,
    /// The recorded extents.
    pub extents: Vec<Extent>,
    /// SHA-256 of the stored pages of each [`ExtentKind::Data`] extent, in order.
    pub digests: Vec<[u8; 32]>,
}

impl MemoryIndex {
    /// Returns the number of pages of guest memory.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, (_, len)| sum.saturating_add(len / PAGE))
    }

    /// Returns the number of pages recorded with `content`.
    #[must_use]
    pub fn count(&self, content: ExtentKind) -> u64 {
        self.extents
            .iter()
            .filter(|extent| extent.content == content)
            .map(|extent| extent.pages)
            .sum()
    }
}

/// Builds extents from pages in ascending order.
#[derive(Debug, Default)]
pub struct ExtentBuilder {
    extents: Vec<Extent>,
}

impl ExtentBuilder {
    /// Creates a builder without pages.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a page. Pages must be added in ascending order.
    pub fn push(&mut self, page: u64, content: ExtentKind) {
        if let Some(last) = self.extents.last_mut()
            && last.content == content
            && last.end() == page
        {
            last.pages += 1;
            return;
        }
        self.extents.push(Extent {
            first: page,
            pages: 1,
            content,
        });
    }

    /// Returns the extents.
    #[must_use]
    pub fn finish(self) -> Vec<Extent> {
        self.extents
    }
}

/// Returns true if the extents are ascending, disjoint, not empty and end within `pages`.
#[must_use]
pub fn is_well_formed(extents: &[Extent], pages: u64) -> bool {
    let mut next = 0;
    extents.iter().all(|extent| {
        let ok = extent.pages > 0
            && extent.first >= next
            && extent.pages <= pages
            && extent.first <= pages - extent.pages;
        next = extent.end();
        ok
    })
}

/// Joins data extents that are at most `gap` pages apart, where the pages between them
/// are zero or not recorded. Also returns the pages that were not recorded before and now
/// belong to a data extent, which the caller has to store. Zero pages in a data extent
/// need not be stored, because they are holes of the file already.
#[must_use]
pub fn join(extents: &[Extent], gap: u64) -> (Vec<Extent>, Vec<Run>) {
    let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
    let mut missing = Vec::new();
    // Short zero extents since the last data extent.
    let mut zeros: Vec<Extent> = Vec::new();
    for &extent in extents {
        if extent.content == ExtentKind::Zero {
            if extent.pages <= gap {
                zeros.push(extent);
            } else {
                joined.append(&mut zeros);
                joined.push(extent);
            }
            continue;
        }
        match joined.last_mut() {
            Some(last)
                if last.content == ExtentKind::Data && is_near(last, &zeros, &extent, gap) =>
            {
                let mut at = last.end();
                for zero in zeros.drain(..).chain([extent]) {
                    push_run(&mut missing, (at, zero.first - at));
                    at = zero.end();
                }
                last.pages = at - last.first;
            }
            _ => {
                joined.append(&mut zeros);
                joined.push(extent);
            }
        }
    }
    joined.append(&mut zeros);
    (joined, missing)
}

/// Returns true if every unrecorded gap between these extents is at most `gap` pages
/// long.
fn is_near(from: &Extent, between: &[Extent], to: &Extent, gap: u64) -> bool {
    let mut at = from.end();
    between.iter().chain([to]).all(|extent| {
        let near = extent.first.saturating_sub(at) <= gap;
        at = extent.end();
        near
    })
}

/// Source of a run of pages of a restored guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// `memory.bin` of the chain member with this index (0 is the root).
    Member(usize),
    /// Anonymous zero pages.
    Zero,
}

/// A run of pages to map from one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First page, in RAM order; also the page offset in the member's file.
    pub first: u64,
    /// Number of pages.
    pub pages: u64,
    /// Source of the pages.
    pub source: Source,
}

/// Flattens the extents of a chain, root first, into the pieces to map.
///
/// The root provides all pages: pages that it does not store are holes of its file, which
/// read as zero, so that mapping it takes one piece. `chain[0]` is therefore ignored.
/// Adjacent pieces of one source are merged.
#[must_use]
pub fn flatten(pages: u64, chain: &[&[Extent]]) -> Vec<Piece> {
    let mut pieces = vec![Piece {
        first: 0,
        pages,
        source: Source::Member(0),
    }];
    for (member, extents) in chain.iter().enumerate().skip(1) {
        pieces = overlay(&pieces, member, extents);
    }
    pieces
}

/// Replaces the parts of `lower` that `extents` cover.
fn overlay(lower: &[Piece], member: usize, extents: &[Extent]) -> Vec<Piece> {
    let mut out = Vec::with_capacity(lower.len() + 2 * extents.len());
    let mut extents = extents.iter().peekable();
    for piece in lower {
        let end = piece.first + piece.pages;
        let mut at = piece.first;
        while let Some(extent) = extents.peek() {
            if extent.first >= end {
                break;
            }
            push(&mut out, at, extent.first.max(at), piece.source);
            let source = match extent.content {
                ExtentKind::Data => Source::Member(member),
                ExtentKind::Zero => Source::Zero,
            };
            let begin = extent.first.max(at);
            let stop = extent.end().min(end);
            push(&mut out, begin, stop, source);
            at = stop;
            if extent.end() > end {
                break;
            }
            extents.next();
        }
        push(&mut out, at, end, piece.source);
    }
    out
}

fn push(out: &mut Vec<Piece>, first: u64, end: u64, source: Source) {
    if first >= end {
        return;
    }
    if let Some(last) = out.last_mut()
        && last.source == source
        && last.first + last.pages == first
    {
        last.pages += end - first;
        return;
    }
    out.push(Piece {
        first,
        pages: end - first,
        source,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 64;

    fn layer() -> impl Strategy<Value = Vec<Option<ExtentKind>>> {
        let page = prop_oneof![
            3 => Just(None),
            2 => Just(Some(ExtentKind::Data)),
            1 => Just(Some(ExtentKind::Zero)),
        ];
        prop::collection::vec(page, 64..=64)
    }

    fn extents(layer: &[Option<ExtentKind>]) -> Vec<Extent> {
        let mut builder = ExtentBuilder::new();
        for (page, content) in (0..).zip(layer) {
            if let Some(content) = content {
                builder.push(page, *content);
            }
        }
        builder.finish()
    }

    proptest! {
        #[test]
        fn flattening_equals_looking_up_each_page(layers in prop::collection::vec(layer(), 1..6)) {
            let lists: Vec<_> = layers.iter().map(|l| extents(l)).collect();
            for list in &lists {
                prop_assert!(is_well_formed(list, PAGES));
            }
            let borrowed: Vec<&[Extent]> = lists.iter().map(Vec::as_slice).collect();
            let pieces = flatten(PAGES, &borrowed);
            let mut page = 0;
            for piece in &pieces {
                prop_assert_eq!(piece.first, page, "gap or overlap");
                for p in piece.first..piece.first + piece.pages {
                    let expected = (1..layers.len())
                        .rev()
                        .find_map(|m| layers[m][usize::try_from(p).unwrap()].map(|c| match c {
                            ExtentKind::Data => Source::Member(m),
                            ExtentKind::Zero => Source::Zero,
                        }))
                        .unwrap_or(Source::Member(0));
                    prop_assert_eq!(piece.source, expected);
                }
                page += piece.pages;
            }
            prop_assert_eq!(page, PAGES);
            for pair in pieces.windows(2) {
                prop_assert_ne!(pair[0].source, pair[1].source, "not merged");
            }
        }
    }

    proptest! {
        #[test]
        fn joining_changes_only_what_lies_between_data(layer in layer(), gap in 0u64..9) {
            let before = extents(&layer);
            let (after, missing) = join(&before, gap);
            prop_assert!(is_well_formed(&after, PAGES));
            let mut model = layer.clone();
            for (first, pages) in missing {
                for page in first..first + pages {
                    let page = usize::try_from(page).unwrap();
                    prop_assert_eq!(model[page], None, "it was recorded before");
                    model[page] = Some(ExtentKind::Data);
                }
            }
            for extent in &after {
                for page in extent.first..extent.end() {
                    let page = usize::try_from(page).unwrap();
                    prop_assert!(model[page].is_some());
                    if extent.content == ExtentKind::Data {
                        model[page] = Some(ExtentKind::Data);
                    }
                }
            }
            prop_assert_eq!(&extents(&model), &after, "and all of it is there");
            // No two data extents are within the gap of each other.
            let data: Vec<_> = after.iter().filter(|e| e.content == ExtentKind::Data).collect();
            for pair in data.windows(2) {
                let apart = pair[0].end()..pair[1].first;
                let stretch = |content| {
                    let mut longest = 0;
                    let mut run = 0;
                    for page in apart.clone() {
                        let same = layer[usize::try_from(page).unwrap()] == content;
                        run = if same { run + 1 } else { 0 };
                        longest = longest.max(run);
                    }
                    longest
                };
                prop_assert!(stretch(None) > gap || stretch(Some(ExtentKind::Zero)) > gap);
            }
        }
    }

    #[test]
    fn malformed_extents_are_found() {
        let e = |first, pages| Extent {
            first,
            pages,
            content: ExtentKind::Data,
        };
        assert!(is_well_formed(&[e(0, 2), e(2, 1)], 3));
        assert!(!is_well_formed(&[e(0, 2), e(1, 1)], 3));
        assert!(!is_well_formed(&[e(0, 0)], 3));
        assert!(!is_well_formed(&[e(2, 2)], 3));
        assert!(!is_well_formed(&[e(u64::MAX, 2)], 3));
        assert!(!is_well_formed(&[e(1, u64::MAX)], 3));
    }
}
