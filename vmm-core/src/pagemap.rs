//! Detection of private pages in this process's page tables.
//!
//! Guest memory is either anonymous (a booted machine) or a private mapping of snapshot
//! files (a restored one). In both cases a page that was written is an anonymous page of
//! this process, and one that was not is either not present or a page of the file.
//! `/proc/self/pagemap` distinguishes them, so that the pages that a machine changed are
//! known exactly, without write protection, a dirty log or comparison of memory. Linux
//! 6.7 added an ioctl that finds such pages without visiting untouched ones; on older
//! kernels the entry of each page is read.
#![expect(
    unsafe_code,
    reason = "the ioctl PAGEMAP_SCAN is given the address of a buffer"
)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// Page size in bytes.
const PAGE: u64 = 4096;

/// Bits of an entry (Linux `Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// Number of entries read at a time: 64 KiB of page map, which cover 32 MiB of memory.
const BATCH: u64 = 8192;

/// Number of regions requested from the kernel at a time.
const REGIONS: usize = 512;

/// Categories of `PAGEMAP_SCAN` (`Documentation/admin-guide/mm/pagemap.rst`).
const SCAN_FILE: u64 = 1 << 2;
const SCAN_PRESENT: u64 = 1 << 3;
const SCAN_SWAPPED: u64 = 1 << 4;
/// The shared zero page, which is mapped by reads of untouched anonymous memory.
const SCAN_ZERO: u64 = 1 << 5;

/// `struct page_region`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[derive(Default)]
#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

// SAFETY: the kernel reads and writes this structure, and writes at most `vec_len`
// regions at `vec`; the code that creates the value ensures that the buffer is that long.
unsafe impl Ioctl for &mut Scan {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<Scan>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut::<Scan>(*self).cast()
    }

    unsafe fn output_from_ptr(
        regions: IoctlOutput,
        _: *mut c_void,
    ) -> rustix::io::Result<Self::Output> {
        usize::try_from(regions).map_err(|_| Errno::INVAL)
    }
}

/// Page table state of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState(u64);

impl PageState {
    /// Returns true if the page is an anonymous page of this process, because it was
    /// written.
    #[must_use]
    pub fn is_private(self) -> bool {
        self.0 & (PRESENT | SWAPPED) != 0 && self.0 & FILE_OR_SHARED == 0
    }

    /// Returns true if the page is mapped, because it or (by fault-around) a neighbour
    /// was accessed.
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
    /// The file cannot be opened, for example because `/proc` is not mounted.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            file: File::open("/proc/self/pagemap")?,
        })
    }

    /// Calls `found` with each run of private pages (see [`PageState::is_private`]), its first
    /// page and number of pages, among the `pages` pages from `address`. Page numbers are relative to `address`, which
    /// must be a multiple of the page size. Adjacent runs may be reported separately.
    ///
    /// # Errors
    /// The page map cannot be read.
    pub fn private_runs(
        &self,
        address: u64,
        pages: u64,
        mut found: impl FnMut((u64, u64)),
    ) -> io::Result<()> {
        match self.scan(address, pages, &mut found) {
            Err(Errno::NOTTY | Errno::INVAL | Errno::NOSYS) => {}
            done => return done.map_err(Into::into),
        }
        self.visit(address, pages, |page, state| {
            if state.is_private() {
                found((page, 1));
            }
        })
    }

    fn scan(
        &self,
        address: u64,
        pages: u64,
        found: &mut dyn FnMut((u64, u64)),
    ) -> Result<(), Errno> {
        let mut regions = [Region::default(); REGIONS];
        let end = address + pages * PAGE;
        let mut at = address;
        while at < end {
            let mut scan = Scan {
                size: size_of::<Scan>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_inverted: SCAN_FILE | SCAN_ZERO,
                category_mask: SCAN_FILE | SCAN_ZERO,
                category_anyof_mask: SCAN_PRESENT | SCAN_SWAPPED,
                return_mask: SCAN_PRESENT,
                ..Scan::default()
            };
            // SAFETY: `vec` points to the buffer above, which has `vec_len` regions.
            let count = unsafe { ioctl(&self.file, &mut scan) }?;
            for region in regions.iter().take(count) {
                found((
                    (region.start - address) / PAGE,
                    (region.end - region.start) / PAGE,
                ));
            }
            if scan.walk_end <= at {
                return Err(Errno::IO);
            }
            at = scan.walk_end;
        }
        Ok(())
    }

    /// Calls `visit(index, state)` for each of the `pages` pages from `address`, which
    /// must be a multiple of the page size.
    ///
    /// # Errors
    /// The page map cannot be read.
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
        assert_eq!(private(&memory, 16), [(5, 1), (9, 1)]);
        let states = states(&memory, 16);
        let private: Vec<_> = (0..16).filter(|&p| states[p].is_private()).collect();
        assert_eq!(private, [5, 9]);
        assert!(states[3].is_present() && !states[3].is_private());
    }

    fn push(runs: &mut Vec<(u64, u64)>, (first, pages): (u64, u64)) {
        match runs.last_mut() {
            Some((start, count)) if *start + *count == first => *count += pages,
            _ => runs.push((first, pages)),
        }
    }

    fn private(memory: &GuestMemoryMmap, pages: u64) -> Vec<(u64, u64)> {
        use vm_memory::GuestMemoryBackend as _;
        let address = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        let mut runs = Vec::new();
        Pagemap::open()
            .unwrap()
            .private_runs(address, pages, |run| push(&mut runs, run))
            .unwrap();
        runs
    }

    /// There are more runs than one ioctl returns; both methods must find all of them.
    #[test]
    fn both_ways_to_find_private_pages_agree() {
        let pages = 4096u64;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(
            GuestAddress(0),
            usize::try_from(pages * PAGE).unwrap(),
        )])
        .unwrap();
        for page in (0..pages).filter(|page| page % 3 != 1 && page % 7 != 0) {
            memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let mut read = Vec::new();
        for (page, state) in (0..).zip(states(&memory, pages)) {
            if state.is_private() {
                push(&mut read, (page, 1));
            }
        }
        assert!(read.len() > REGIONS);
        assert_eq!(private(&memory, pages), read);
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
