//! Writing `memory.bin`: sparse, page-aligned, only what has to be stored.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
};

use crate::Error;
use crate::extents::{Content, Extent, ExtentBuilder, PAGE};
use crate::pagemap::Pagemap;

/// [`PAGE`], as a length in memory.
const PAGE_LEN: usize = 4096;
/// Bytes copied out of the guest at once: fits a core's second-level cache.
const COPY: usize = 256 * 1024;

/// What `memory.bin` holds; stored as a section of `state.bin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryIndex {
    /// Guest physical start and length of each RAM region, in RAM order.
    pub regions: Vec<(u64, u64)>,
    /// The runs of pages recorded.
    pub extents: Vec<Extent>,
    /// SHA-256 over the stored pages of each [`Content::Data`] extent, in order.
    pub digests: Vec<[u8; 32]>,
}

impl MemoryIndex {
    /// Number of pages of guest memory.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, (_, len)| sum.saturating_add(len / PAGE))
    }

    /// Number of pages recorded with `content`.
    #[must_use]
    pub fn count(&self, content: Content) -> u64 {
        self.extents
            .iter()
            .filter(|extent| extent.content == content)
            .map(|extent| extent.pages)
            .sum()
    }
}

/// The RAM regions of `memory`: guest physical start and length, in RAM order.
#[must_use]
pub fn ram_regions(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    memory
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect()
}

/// Which pages to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing below: record pages that are not zero.
    Nothing,
    /// A parent below, mapped privately: record pages that were written,
    /// those that are zero as [`Content::Zero`].
    Parent,
}

/// Writes the pages of a paused guest to `file` and says what was written.
///
/// Only pages that the process's page tables show as its own are read; a page
/// that was never touched costs nothing. For a machine restored from a chain
/// and captured in full ([`Base::Nothing`]), file-backed pages are read too.
///
/// # Errors
/// A file system that is full or refuses, or an unreadable page map.
pub fn write(
    memory: &GuestMemoryMmap,
    base: Base,
    whole: bool,
    file: &File,
    path: &Path,
) -> Result<MemoryIndex, Error> {
    let regions = ram_regions(memory);
    let pages: u64 = regions.iter().map(|(_, len)| len / PAGE).sum();
    file.set_len(pages * PAGE)
        .map_err(Error::io("set the length of", path))?;
    let pagemap = Pagemap::open().map_err(Error::io("open", Path::new("/proc/self/pagemap")))?;
    let mut writer = Writer {
        memory,
        file,
        path,
        base,
        builder: ExtentBuilder::new(),
        scratch: vec![0; COPY],
    };
    let mut offset = 0;
    for region in memory.iter() {
        let start = region.start_addr();
        let host = memory
            .get_host_address(start)
            .map_err(|e| Error::damaged(path, format!("guest memory is not mapped: {e}")))?
            as u64;
        let count = region.len() / PAGE;
        for run in candidate_runs(&pagemap, host, count, whole)? {
            writer.copy_run(start.0, offset, run)?;
        }
        offset += count;
    }
    let extents = writer.builder.finish();
    Ok(MemoryIndex {
        regions,
        extents,
        digests: Vec::new(),
    })
}

/// Runs (first, pages) of a mapping whose content has to be looked at.
fn candidate_runs(
    pagemap: &Pagemap,
    host: u64,
    count: u64,
    whole: bool,
) -> Result<Vec<(u64, u64)>, Error> {
    if whole {
        return Ok(vec![(0, count)]);
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    pagemap
        .visit(host, count, |page, state| {
            if !state.is_private() {
                return;
            }
            match runs.last_mut() {
                Some((first, pages)) if *first + *pages == page => *pages += 1,
                _ => runs.push((page, 1)),
            }
        })
        .map_err(Error::io("read", Path::new("/proc/self/pagemap")))?;
    Ok(runs)
}

struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    file: &'a File,
    path: &'a Path,
    base: Base,
    builder: ExtentBuilder,
    scratch: Vec<u8>,
}

impl Writer<'_> {
    /// Copies one run of a region that starts at guest address `start` and at
    /// page `offset` in RAM order.
    fn copy_run(
        &mut self,
        start: u64,
        offset: u64,
        (first, pages): (u64, u64),
    ) -> Result<(), Error> {
        let step = (COPY as u64) / PAGE;
        let mut page = first;
        while page < first + pages {
            let count = step.min(first + pages - page);
            let len = usize::try_from(count * PAGE).unwrap_or(COPY);
            let mut buffer = std::mem::take(&mut self.scratch);
            let read = self
                .memory
                .read_slice(&mut buffer[..len], GuestAddress(start + page * PAGE));
            let done = match read {
                Ok(()) => self.store(offset + page, &buffer[..len]),
                Err(e) => Err(Error::damaged(
                    self.path,
                    format!("guest memory cannot be read: {e}"),
                )),
            };
            self.scratch = buffer;
            done?;
            page += count;
        }
        Ok(())
    }

    /// Writes the non-zero pages of `bytes`, which start at page `first` in RAM order.
    fn store(&mut self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let page_len = PAGE_LEN;
        let mut run_start = 0;
        let pages = bytes.len() / page_len;
        for index in 0..=pages {
            let zero = match bytes.get(index * page_len..(index + 1) * page_len) {
                Some(page) => is_zero(page),
                None => true,
            };
            if !zero {
                self.builder.push(first + index as u64, Content::Data);
                continue;
            }
            if run_start < index {
                let chunk = &bytes[run_start * page_len..index * page_len];
                self.file
                    .write_all_at(chunk, (first + run_start as u64) * PAGE)
                    .map_err(Error::io("write", self.path))?;
            }
            if index < pages && self.base == Base::Parent {
                self.builder.push(first + index as u64, Content::Zero);
            }
            run_start = index + 1;
        }
        Ok(())
    }
}

/// Whether all bytes are zero; the compiler vectorises the inner loop.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(256)
        .all(|chunk| chunk.iter().fold(0, |acc, byte| acc | byte) == 0)
}

/// Computes the digest of each data extent of a written file. Kept out of the
/// pause: it reads the file, not the guest.
///
/// # Errors
/// A file that is shorter than its index says, or cannot be read.
pub fn digests(file: &File, path: &Path, extents: &[Extent]) -> Result<Vec<[u8; 32]>, Error> {
    let mut buffer = vec![0; COPY];
    extents
        .iter()
        .filter(|extent| extent.content == Content::Data)
        .map(|extent| digest(file, path, extent, &mut buffer))
        .collect()
}

fn digest(file: &File, path: &Path, extent: &Extent, buffer: &mut [u8]) -> Result<[u8; 32], Error> {
    let mut hash = Sha256::new();
    let mut at = extent.first * PAGE;
    let end = extent.end() * PAGE;
    while at < end {
        let len = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        file.read_exact_at(&mut buffer[..len], at)
            .map_err(Error::io("read", path))?;
        hash.update(&buffer[..len]);
        at += len as u64;
    }
    Ok(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn guest() -> GuestMemoryMmap {
        let ranges = [
            (GuestAddress(0), 32 * 4096),
            (GuestAddress(0x1_0000_0000), 16 * 4096),
        ];
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn only_pages_that_are_not_zero_are_stored() {
        let memory = guest();
        memory
            .write_obj(1u8, GuestAddress(2 * 4096 + 4095))
            .unwrap();
        memory.write_obj(2u8, GuestAddress(3 * 4096)).unwrap();
        memory.write_obj(0u8, GuestAddress(7 * 4096)).unwrap(); // touched, zero
        memory
            .write_obj(3u8, GuestAddress(0x1_0000_0000 + 4096))
            .unwrap();
        let file = tempfile::tempfile().unwrap();
        let path = Path::new("memory.bin");
        let index = write(&memory, Base::Nothing, false, &file, path).unwrap();
        let data = |first, pages| Extent {
            first,
            pages,
            content: Content::Data,
        };
        assert_eq!(index.extents, [data(2, 2), data(33, 1)]);
        assert_eq!(index.pages(), 48);
        assert_eq!(file.metadata().unwrap().len(), 48 * 4096);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 33 * 4096).unwrap();
        assert_eq!(byte, [3]);
        assert_eq!(digests(&file, path, &index.extents).unwrap().len(), 2);
    }

    #[test]
    fn over_a_parent_a_page_cleared_is_recorded_as_zero() {
        let memory = guest();
        memory.write_obj(0u8, GuestAddress(5 * 4096)).unwrap();
        memory.write_obj(9u8, GuestAddress(6 * 4096)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let index = write(&memory, Base::Parent, false, &file, Path::new("m")).unwrap();
        assert_eq!(index.count(Content::Zero), 1);
        assert_eq!(index.count(Content::Data), 1);
    }

    #[test]
    fn a_long_run_is_copied_whole() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1000 * 4096)]).unwrap();
        for page in 0..1000u64 {
            memory
                .write_obj(page + 1, GuestAddress(page * 4096 + 8))
                .unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let index = write(&memory, Base::Nothing, false, &file, Path::new("m")).unwrap();
        assert_eq!(index.count(Content::Data), 1000);
        for page in 0..1000u64 {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, page * 4096 + 8).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), page + 1);
        }
    }
}
