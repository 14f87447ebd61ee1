//! Which pages of this process's memory are private, by its own page tables.
//!
//! Guest memory is either anonymous (a machine that was booted) or a private
//! mapping of snapshot files (one that was restored). In both, a page that was
//! written is an anonymous page of this process, and one that was not is either
//! not present or a page of the file. `/proc/self/pagemap` tells them apart, so
//! the pages that a machine changed are known exactly, without write protection,
//! a dirty log, or comparing memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::extents::PAGE;

/// Bits of an entry (Linux `Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// Entries read at once: 2 MiB of page map covers 1 GiB of memory; 64 KiB keeps
/// the buffer small and covers 32 MiB.
const BATCH: u64 = 8192;

/// What the page tables say of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState(u64);

impl PageState {
    /// The page was written by this process: it is a page of its own.
    #[must_use]
    pub fn is_private(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0 && self.0 & FILE_OR_SHARED == 0
    }

    /// The page is mapped here: it was touched, or a neighbour was.
    #[must_use]
    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }
}

/// The page map of this process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the page map.
    ///
    /// # Errors
    /// The system's answer, for instance where `/proc` is not mounted.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            file: File::open("/proc/self/pagemap")?,
        })
    }

    /// Calls `visit(index, state)` for each of `pages` pages from `address` on.
    /// `address` is a multiple of the page size.
    ///
    /// # Errors
    /// The system's answer.
    pub fn visit(
        &self,
        address: u64,
        pages: u64,
        mut visit: impl FnMut(u64, PageState),
    ) -> io::Result<()> {
        let mut buffer = Vec::new();
        let mut done = 0;
        while done < pages {
            let batch = BATCH.min(pages - done);
            let bytes = usize::try_from(batch * 8).map_err(io::Error::other)?;
            buffer.resize(bytes, 0);
            let offset = (address / PAGE + done) * 8;
            self.file.read_exact_at(&mut buffer, offset)?;
            for (index, entry) in (done..).zip(buffer.chunks_exact(8)) {
                let entry = entry.try_into().map(u64::from_ne_bytes).unwrap_or(0);
                visit(index, PageState(entry));
            }
            done += batch;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use vm_memory::{
        Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    };

    fn states(memory: &GuestMemoryMmap, pages: u64) -> Vec<PageState> {
        use vm_memory::GuestMemoryBackend as _;
        let address = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        let mut states = Vec::new();
        Pagemap::open()
            .unwrap()
            .visit(address, pages, |_, state| states.push(state))
            .unwrap();
        states
    }

    #[test]
    fn written_pages_of_a_private_file_mapping_are_private() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 16 * 4096]).unwrap();
        let region = MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            16 * 4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        )
        .unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let _: u8 = memory.read_obj(GuestAddress(3 * 4096)).unwrap();
        memory.write_obj(1u8, GuestAddress(5 * 4096)).unwrap();
        memory.write_obj(1u8, GuestAddress(9 * 4096 + 17)).unwrap();
        let states = states(&memory, 16);
        let private: Vec<_> = (0..16).filter(|&p| states[p].is_private()).collect();
        assert_eq!(private, [5, 9]);
        assert!(states[3].is_present() && !states[3].is_private());
    }

    #[test]
    fn untouched_anonymous_pages_are_neither() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8 * 4096)]).unwrap();
        memory.write_obj(1u8, GuestAddress(4096)).unwrap();
        let states = states(&memory, 8);
        assert!(states[1].is_private());
        assert!(!states[6].is_present() && !states[6].is_private());
    }
}
