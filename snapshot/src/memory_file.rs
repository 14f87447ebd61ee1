//! Writing of `memory.bin`: sparse, page-aligned, with only the pages that must be
//! stored.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
};

use crate::Error;
use crate::chain::Chain;
use crate::contents;
use crate::extents::{self, Extent, ExtentBuilder, ExtentKind, MemoryIndex, PAGE};
use crate::runs::{self, Run};

/// [`PAGE`] as a `usize`.
const PAGE_LEN: usize = 4096;
/// Number of bytes copied from the guest at a time; fits the second-level cache of a
/// core.
const COPY: usize = 256 * 1024;

/// Returns the RAM regions of `memory`: guest physical start and length, in RAM order.
#[must_use]
pub fn ram_regions(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    memory
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect()
}

/// Reference with which written pages are compared.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Base<'a> {
    /// No parent: pages that are not recorded are zero.
    Nothing,
    /// A parent: pages that are not recorded have the parent's contents.
    Parent,
    /// A parent from which memory was filled. Only pages that differ from the parent are
    /// recorded.
    Filled(&'a Chain),
    /// A parent from which these pages were copied before the guest used them. Of these,
    /// only pages that differ from the parent are recorded; others are treated as in
    /// [`Self::Parent`].
    Copied(&'a Chain, &'a [Run]),
}

impl<'a> Base<'a> {
    /// Returns the parent if some of the `pages` pages from `first` may equal those of
    /// the parent.
    fn doubtful(self, first: u64, pages: u64) -> Option<&'a Chain> {
        match self {
            Base::Nothing | Base::Parent => None,
            Base::Filled(chain) => Some(chain),
            Base::Copied(chain, runs) => runs::touches(runs, (first, pages)).then_some(chain),
        }
    }
}

/// Number of extents above which nearby extents of a diff are joined, because each costs
/// a mapping at restore.
const MANY: usize = 1024;
/// Maximum number of unchanged pages that joining two extents may store.
const MOST_GAP: u64 = 64;

/// The pages of a guest that may differ from the base; lists of different pages.
#[derive(Clone, Copy, Debug)]
pub struct ChangedPages<'a> {
    /// Pages that are read.
    pub written: &'a [Run],
    /// Pages that are known to be zero, and are not read.
    pub zero: &'a [Run],
}

/// Writes pages of a paused guest to `file` and returns the index. Zero pages are not stored.
/// The function returns early when `cancelled` is set.
///
/// # Errors
/// The file system is full or fails, a parent cannot be read, or [`Error::Cancelled`].
pub fn write(
    memory: &GuestMemoryMmap,
    changed: ChangedPages<'_>,
    base: Base<'_>,
    file: &File,
    path: &Path,
    cancelled: &AtomicBool,
) -> Result<MemoryIndex, Error> {
    let regions = ram_regions(memory);
    let pages: u64 = regions.iter().map(|(_, len)| len / PAGE).sum();
    file.set_len(pages * PAGE)
        .map_err(Error::io("set the length of", path))?;
    let mut writer = Writer {
        memory,
        regions: &regions,
        file,
        path,
        cancelled,
        base,
        builder: ExtentBuilder::new(),
        scratch: vec![0; COPY],
        parents: Vec::new(),
    };
    let mut zero = changed.zero.iter().peekable();
    for &(first, pages) in changed.written {
        while let Some(run) = zero.next_if(|(other, _)| *other < first) {
            writer.zero_run(*run);
        }
        writer.copy_run((first, pages))?;
    }
    zero.for_each(|run| writer.zero_run(*run));
    let mut extents = std::mem::take(&mut writer.builder).finish();
    if !matches!(base, Base::Nothing) {
        // Pages added by joining are stored even if they equal the parent's.
        writer.base = Base::Nothing;
        let mut gap = 1;
        while extents.len() > MANY && gap <= MOST_GAP {
            let (joined, missing) = extents::join(&extents, gap);
            for run in missing {
                writer.copy_run(run)?;
            }
            extents = joined;
            gap *= 2;
        }
    }
    Ok(MemoryIndex {
        regions,
        extents,
        digests: Vec::new(),
    })
}

struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    regions: &'a [(u64, u64)],
    file: &'a File,
    path: &'a Path,
    cancelled: &'a AtomicBool,
    base: Base<'a>,
    builder: ExtentBuilder,
    scratch: Vec<u8>,
    /// Buffer for the parent's pages.
    parents: Vec<u8>,
}

impl Writer<'_> {
    /// Copies a run, which may span regions.
    fn copy_run(&mut self, (first, pages): Run) -> Result<(), Error> {
        let mut offset = 0;
        for &(start, len) in self.regions {
            let end = offset + len / PAGE;
            let (from, to) = (first.max(offset), (first + pages).min(end));
            if from < to {
                self.copy_within(start + (from - offset) * PAGE, from, to - from)?;
            }
            offset = end;
        }
        Ok(())
    }

    /// Records pages that are zero.
    fn zero_run(&mut self, (first, pages): Run) {
        if !matches!(self.base, Base::Nothing) {
            for page in first..first.saturating_add(pages) {
                self.builder.push(page, ExtentKind::Zero);
            }
        }
    }

    /// Copies pages from the guest physical address `start`, which is page `first` in RAM
    /// order.
    fn copy_within(&mut self, start: u64, first: u64, pages: u64) -> Result<(), Error> {
        let step = (COPY as u64) / PAGE;
        let mut done = 0;
        while done < pages {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let count = step.min(pages - done);
            let len = usize::try_from(count * PAGE).unwrap_or(COPY);
            let mut buffer = std::mem::take(&mut self.scratch);
            let read = self
                .memory
                .read_slice(&mut buffer[..len], GuestAddress(start + done * PAGE));
            let stored = match read {
                Ok(()) => self.store(first + done, &buffer[..len]),
                Err(e) => Err(Error::damaged(
                    self.path,
                    format!("guest memory cannot be read: {e}"),
                )),
            };
            self.scratch = buffer;
            stored?;
            done += count;
        }
        Ok(())
    }

    /// Records the pages of `bytes`, the first of which is page `first` in RAM order, and
    /// writes those that must be stored.
    fn store(&mut self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let mut parents = std::mem::take(&mut self.parents);
        let parent = self.base.doubtful(first, bytes.len() as u64 / PAGE);
        if let Some(chain) = parent {
            contents::read_pages(chain, first, bytes.len() as u64 / PAGE, &mut parents)?;
        }
        let unchanged = |number, range, page| {
            parent.is_some()
                && self.base.doubtful(number, 1).is_some()
                && parents.get(range) == Some(page)
        };
        // Range of bytes to write in one call.
        let mut pending = 0..0;
        for (index, page) in bytes.chunks_exact(PAGE_LEN).enumerate() {
            let number = first + index as u64;
            let range = index * PAGE_LEN..(index + 1) * PAGE_LEN;
            let zero = is_zero(page);
            let content = match self.base {
                Base::Nothing => (!zero).then_some(ExtentKind::Data),
                _ if unchanged(number, range.clone(), page) => None,
                _ if zero => Some(ExtentKind::Zero),
                _ => Some(ExtentKind::Data),
            };
            if let Some(content) = content {
                self.builder.push(number, content);
            }
            if content == Some(ExtentKind::Data) {
                if pending.end != range.start {
                    self.write_out(first, bytes, pending)?;
                    pending = range.start..range.start;
                }
                pending.end = range.end;
            }
        }
        self.parents = parents;
        self.write_out(first, bytes, pending)
    }

    fn write_out(
        &self,
        first: u64,
        bytes: &[u8],
        range: std::ops::Range<usize>,
    ) -> Result<(), Error> {
        let at = first * PAGE + range.start as u64;
        let chunk = bytes.get(range).unwrap_or_default();
        self.file
            .write_all_at(chunk, at)
            .map_err(Error::io("write", self.path))
    }
}

/// Returns true if all bytes are zero. The compiler vectorises the inner loop.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(256)
        .all(|chunk| chunk.iter().fold(0, |acc, byte| acc | byte) == 0)
}

/// Computes the digest of each data extent of a written file. The function reads the file
/// and not the guest, so that the machine need not be paused.
///
/// # Errors
/// The file is shorter than its index requires, or cannot be read.
pub fn digests(file: &File, path: &Path, extents: &[Extent]) -> Result<Vec<[u8; 32]>, Error> {
    let mut buffer = vec![0; COPY];
    extents
        .iter()
        .filter(|extent| extent.content == ExtentKind::Data)
        .map(|extent| digest(file, path, extent, &mut buffer))
        .collect()
}

/// Checks that a file is zero wherever its index records no stored page. Holes are not
/// read.
///
/// # Errors
/// A page is not zero, or the file cannot be read.
pub fn check_holes(file: &File, path: &Path, index: &MemoryIndex) -> Result<(), Error> {
    let data = index.extents.iter();
    let data = data.filter(|extent| extent.content == ExtentKind::Data);
    let mut buffer = vec![0; COPY];
    let mut at = 0;
    for (first, end) in data
        .map(|extent| (extent.first, extent.end()))
        .chain([(index.pages(), 0)])
    {
        check_hole(file, path, at * PAGE, first * PAGE, &mut buffer)?;
        at = end;
    }
    Ok(())
}

fn check_hole(
    file: &File,
    path: &Path,
    mut at: u64,
    end: u64,
    buffer: &mut [u8],
) -> Result<(), Error> {
    while at < end {
        // A file system without support for holes reports everything as data.
        at = match seek(file, SeekFrom::Data(at)) {
            Ok(found) => found,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(Error::io("look for data in", path)(error.into())),
        };
        if at >= end {
            return Ok(());
        }
        let len = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let bytes = &mut buffer[..len];
        file.read_exact_at(bytes, at)
            .map_err(Error::io("read", path))?;
        if let Some(offset) = bytes.iter().position(|&byte| byte != 0) {
            let page = (at + offset as u64) / PAGE;
            let reason = format!("page {page}, which was zero, is not what was written");
            return Err(Error::damaged(path, reason));
        }
        at += len as u64;
    }
    Ok(())
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
    use crate::pagemap;
    use vm_memory::GuestAddress;

    fn write_all(memory: &GuestMemoryMmap, base: Base<'_>, file: &File) -> MemoryIndex {
        let runs = pagemap::private(memory).unwrap();
        let changed = ChangedPages {
            written: &runs,
            zero: &[],
        };
        let never = AtomicBool::new(false);
        let path = Path::new("memory.bin");
        write(memory, changed, base, file, path, &never).unwrap()
    }

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
        let index = write_all(&memory, Base::Nothing, &file);
        let data = |first, pages| Extent {
            first,
            pages,
            content: ExtentKind::Data,
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
        let index = write_all(&memory, Base::Parent, &file);
        assert_eq!(index.count(ExtentKind::Zero), 1);
        assert_eq!(index.count(ExtentKind::Data), 1);
    }

    #[test]
    fn copying_stops_when_it_is_cancelled() {
        let memory = guest();
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let changed = ChangedPages {
            written: &pagemap::private(&memory).unwrap(),
            zero: &[],
        };
        let (path, cancelled) = (Path::new("memory.bin"), AtomicBool::new(true));
        let error = write(&memory, changed, Base::Nothing, &file, path, &cancelled).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error:?}");
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
        let index = write_all(&memory, Base::Nothing, &file);
        assert_eq!(index.count(ExtentKind::Data), 1000);
        for page in 0..1000u64 {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, page * 4096 + 8).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), page + 1);
        }
    }
}
