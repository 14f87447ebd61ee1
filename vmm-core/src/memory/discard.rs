//! Pages that a guest returns to the host.
//!
//! A discarded page has no memory of the host and reads as zero until it is written. The
//! way to that depends on its initial contents:
//!
//! - Zero: the kernel drops the page (`MADV_DONTNEED`).
//! - A file, mapped privately: dropping the page would bring back the contents of the file,
//!   which a guest must not find in a page that it has returned (virtio 1.3 section 5.5.6.7).
//!   Zero pages are mapped over the file instead. Each such mapping counts towards the
//!   limit of the process (`vm.max_map_count`), so there are at most [`MAX_RUNS`]; further
//!   pages keep their memory.
//! - Filled by a pager: the page is dropped, and the pager fills it with zeros.
//!
//! In the last two cases the page is recorded: the next snapshot stores it as zero, although
//! it is no private page, and a revert restores its initial contents. Pages that the machine
//! has not changed are left alone: they are the page cache's, and cost this machine nothing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::Advice;

use super::{FileExtent, MachineMemory, MemoryError, PAGE_SIZE, RamRegion};
use crate::pagemap::Pagemap;

/// Maximum number of runs that are recorded.
const MAX_RUNS: usize = 24_000;
/// Number of mappings that guest memory may have. Linux allows a process 65,530 by default.
const MAX_MAPPINGS: usize = 60_000;

/// The initial contents of memory.
#[derive(Debug)]
enum InitialContents {
    Zero,
    Filled,
    Files {
        /// In the order of mapping.
        extents: Vec<FileExtent>,
        /// The pages of all extents, ascending and disjoint.
        backed: Vec<Range<u64>>,
        dump: bool,
    },
}

/// The initial contents of memory, and the pages that do not have them any more.
#[derive(Debug)]
pub(super) struct Discards {
    contents: InitialContents,
    limit: usize,
    pages: Mutex<DiscardedPages>,
}

impl Discards {
    pub(super) fn anonymous() -> Self {
        Self::new(InitialContents::Zero, 0)
    }

    pub(super) fn filled() -> Self {
        Self::new(InitialContents::Filled, MAX_RUNS)
    }

    pub(super) fn mapped(extents: &[FileExtent], dump: bool) -> Self {
        let pages = |extent: &FileExtent| {
            let end = extent.offset.saturating_add(extent.len);
            extent.offset / PAGE_SIZE..end / PAGE_SIZE
        };
        let mut all: Vec<Range<u64>> = extents.iter().map(pages).collect();
        all.sort_by_key(|range| range.start);
        let mut backed: Vec<Range<u64>> = Vec::with_capacity(all.len());
        for range in all {
            match backed.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => backed.push(range),
            }
        }
        // A run is a mapping, and splits another one; so does an extent.
        let left = MAX_MAPPINGS.saturating_sub(2 * extents.len()) / 2;
        let contents = InitialContents::Files {
            extents: extents.to_vec(),
            backed,
            dump,
        };
        Self::new(contents, left.min(MAX_RUNS))
    }

    fn new(contents: InitialContents, limit: usize) -> Self {
        Self {
            contents,
            limit,
            pages: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, DiscardedPages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pages that read as zero instead of having their initial contents, in RAM order. Those
/// that were written since are among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiscardedPages {
    /// First page and end of each run.
    runs: BTreeMap<u64, u64>,
    /// Number of runs that were inserted. It is limited instead of the number of runs, since
    /// the kernel need not join mappings that are adjacent.
    inserted: usize,
}

impl DiscardedPages {
    /// Returns the runs: first page and number of pages, ascending and disjoint.
    #[must_use]
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let runs = self.runs.iter();
        runs.map(|(&first, &end)| (first, end - first)).collect()
    }

    /// Returns true if page `first` is discarded, and the number of pages from it on, at most
    /// `most`, of which the same is true.
    #[must_use]
    pub fn run(&self, first: u64, most: u64) -> (bool, u64) {
        let limit = first.saturating_add(most);
        if let Some((_, &end)) = self.runs.range(..=first).next_back()
            && end > first
        {
            return (true, end.min(limit) - first);
        }
        let next = self.runs.range(first..).next();
        let end = next.map_or(limit, |(&next, _)| next.min(limit));
        (false, end - first)
    }

    /// Returns the parts of `range` that are not discarded.
    fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (discarded, pages) = self.run(at, range.end - at);
            if !discarded {
                parts.push(at..at + pages);
            }
            at += pages;
        }
        parts
    }

    /// Adds a range, which may overlap others.
    fn insert(&mut self, range: Range<u64>) {
        let (mut first, mut end) = (range.start, range.end);
        while let Some((&start, &stop)) = self.runs.range(..=end).next_back()
            && stop >= first
        {
            self.runs.remove(&start);
            first = first.min(start);
            end = end.max(stop);
        }
        self.runs.insert(first, end);
        self.inserted += 1;
    }
}

impl MachineMemory {
    /// Returns the discarded pages, without those whose initial contents are zero. The pages
    /// do not change while the caller has the value.
    pub fn discarded(&self) -> MutexGuard<'_, DiscardedPages> {
        self.discards.lock()
    }

    /// Returns the memory of `len` bytes from the guest physical address `address` on to the
    /// host. Pages of it that the machine has changed read as zero afterwards; others, and
    /// parts of pages, are left alone. Returns the number of bytes that had memory of their
    /// own and have none now. Other threads may use the memory; what they write to these
    /// pages meanwhile may be lost.
    ///
    /// # Errors
    /// The host refused. Every page has its contents, or is zero.
    pub fn discard(&self, pagemap: &Pagemap, address: u64, len: u64) -> Result<u64, MemoryError> {
        let granule = PAGE_SIZE.max(rustix::param::page_size() as u64);
        let mut returned = 0;
        for region in &self.regions {
            let region_end = region.guest_address + region.len;
            let end = address.saturating_add(len).min(region_end) / granule * granule;
            let Some(start) = address
                .max(region.guest_address)
                .checked_next_multiple_of(granule)
                .filter(|start| *start < end)
            else {
                continue;
            };
            let page = |address: u64| (region.offset + address - region.guest_address) / PAGE_SIZE;
            returned += self.discard_within(pagemap, region, page(start)..page(end))?;
        }
        Ok(returned)
    }

    /// Discards pages, in RAM order, that are in `region`.
    fn discard_within(
        &self,
        pagemap: &Pagemap,
        region: &RamRegion,
        range: Range<u64>,
    ) -> Result<u64, MemoryError> {
        let pages = range.end - range.start;
        let examined = |source| MemoryError::Map {
            operation: "examine",
            len: pages * PAGE_SIZE,
            source,
        };
        let (host, _) = self.host_range(region, &bytes(&range)).map_err(examined)?;
        let mut private = Vec::new();
        pagemap
            .private_runs(host.as_ptr() as u64, pages, |(first, count)| {
                let first = range.start + first;
                private.push(first..first + count);
            })
            .map_err(examined)?;
        if private.is_empty() {
            return Ok(0);
        }
        let mut discarded = self.discards.lock();
        let mut returned = 0;
        for (unrecorded, part) in self.discards.parts(&discarded, range) {
            let Some((pages, count)) = hull(&private, &part) else {
                continue;
            };
            if unrecorded {
                if discarded.inserted >= self.discards.limit {
                    continue;
                }
                self.discard_recorded(region, &mut discarded, pages)?;
            } else {
                self.drop_pages(region, offset(region, &pages), length(&pages))?;
            }
            returned += count * PAGE_SIZE;
        }
        Ok(returned)
    }

    /// Discards pages whose initial contents are not zero, or may not be.
    fn discard_recorded(
        &self,
        region: &RamRegion,
        discarded: &mut DiscardedPages,
        pages: Range<u64>,
    ) -> Result<(), MemoryError> {
        let (at, len) = (offset(region, &pages), length(&pages));
        if let InitialContents::Files { dump, .. } = self.discards.contents {
            self.map_zero(region, bytes(&pages))?;
            discarded.insert(pages);
            self.exclude_from_dumps(dump, region, at, len)
        } else {
            // Before the pages are dropped, since the pager may fill them at once.
            discarded.insert(pages);
            self.drop_pages(region, at, len)
        }
    }

    fn exclude_from_dumps(
        &self,
        dump: bool,
        region: &RamRegion,
        at: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        if dump {
            return Ok(());
        }
        self.advise_range(region, at, len, Advice::LinuxDontDump)
            .map_err(|source| MemoryError::Map {
                operation: "exclude from core dumps",
                len,
                source,
            })
    }

    /// Gives discarded pages their initial contents again.
    pub(super) fn restore_discarded(&self) -> Result<(), MemoryError> {
        let mut discarded = self.discards.lock();
        match &self.discards.contents {
            InitialContents::Zero => {}
            InitialContents::Filled => {
                for run in discarded.runs() {
                    for region in &self.regions {
                        if let Some((at, len)) = region.part(run) {
                            self.drop_pages(region, at, len)?;
                        }
                    }
                }
            }
            InitialContents::Files { extents, dump, .. } => {
                for extent in extents {
                    self.restore_extent(extent, &discarded, *dump)?;
                }
            }
        }
        *discarded = DiscardedPages::default();
        Ok(())
    }

    /// Maps the discarded parts of an extent again.
    fn restore_extent(
        &self,
        extent: &FileExtent,
        discarded: &DiscardedPages,
        dump: bool,
    ) -> Result<(), MemoryError> {
        let end = extent.offset.saturating_add(extent.len) / PAGE_SIZE;
        let mut at = extent.offset / PAGE_SIZE;
        while at < end {
            let (is_discarded, pages) = discarded.run(at, end - at);
            for region in &self.regions {
                if let Some((offset, len)) = region.part((at, pages))
                    && is_discarded
                {
                    let start = region.offset + offset;
                    let file_offset = extent.file_offset + (start - extent.offset);
                    self.map_file(region, start..start + len, &extent.file, file_offset)?;
                    self.exclude_from_dumps(dump, region, offset, len)?;
                }
            }
            at += pages;
        }
        Ok(())
    }
}

impl Discards {
    /// Divides a range into pages whose discarding has to be recorded (true) and others.
    fn parts(&self, discarded: &DiscardedPages, range: Range<u64>) -> Vec<(bool, Range<u64>)> {
        let unrecorded = match &self.contents {
            InitialContents::Zero => Vec::new(),
            InitialContents::Filled => discarded.missing(range.clone()),
            InitialContents::Files { backed, .. } => {
                let first = backed.partition_point(|pages| pages.end <= range.start);
                let backed = backed.iter().skip(first);
                let backed = backed.take_while(|pages| pages.start < range.end);
                backed
                    .flat_map(|pages| {
                        let within = pages.start.max(range.start)..pages.end.min(range.end);
                        discarded.missing(within)
                    })
                    .collect()
            }
        };
        let mut parts = Vec::new();
        let mut at = range.start;
        for part in unrecorded {
            if at < part.start {
                parts.push((false, at..part.start));
            }
            at = part.end;
            parts.push((true, part));
        }
        if at < range.end {
            parts.push((false, at..range.end));
        }
        parts
    }
}

/// Returns the smallest range with all pages of `runs` that are in `part`, and the number of
/// those pages; `None` if there are none.
fn hull(runs: &[Range<u64>], part: &Range<u64>) -> Option<(Range<u64>, u64)> {
    let after = runs.partition_point(|run| run.end <= part.start);
    let runs = runs.iter().skip(after);
    let mut hull: Option<(Range<u64>, u64)> = None;
    for run in runs.take_while(|run| run.start < part.end) {
        let (first, end) = (run.start.max(part.start), run.end.min(part.end));
        let (pages, count) = hull.get_or_insert((first..end, 0));
        pages.end = end;
        *count += end - first;
    }
    hull
}

/// Returns the offset of pages in their region, in bytes.
fn offset(region: &RamRegion, pages: &Range<u64>) -> u64 {
    (pages.start * PAGE_SIZE).saturating_sub(region.offset)
}

/// Returns the length of pages in bytes.
fn length(pages: &Range<u64>) -> u64 {
    (pages.end - pages.start) * PAGE_SIZE
}

/// Returns pages as bytes of guest memory.
fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE_SIZE..pages.end * PAGE_SIZE
}

#[cfg(test)]
mod tests;
