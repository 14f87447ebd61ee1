//! Guest memory: anonymous for a new machine, private file mappings for a restored one.
#![expect(
    unsafe_code,
    reason = "maps files over reserved guest memory and advises the kernel about it"
)]

mod discard;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

pub use self::discard::DiscardedPages;
use self::discard::Discards;
use crate::layout::{HOLE_END, HOLE_START};
use sm_virtio::GuestMemory;

/// Granule of guest memory and of file extents, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Minimum memory of a machine: 64 MiB.
pub const MIN_MEMORY: u64 = 64 << 20;

/// Maximum memory of a machine: 4 TiB.
pub const MAX_MEMORY: u64 = 4 << 40;

/// Reason why guest memory cannot be set up.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A size that is out of range or not a multiple of 1 MiB.
    #[error(
        "guest memory of {bytes} bytes is invalid: \
         it must be a multiple of 1 MiB from 64 MiB to 4 TiB"
    )]
    Size {
        /// The requested size.
        bytes: u64,
    },
    /// An extent that does not fit the memory or its file.
    #[error("extent of {len} bytes at memory offset {offset:#x} does not fit: {reason}")]
    Extent {
        /// Offset in guest memory.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The reason.
        reason: &'static str,
    },
    /// The host refused a mapping.
    #[error("cannot {operation} {len} bytes of guest memory")]
    Map {
        /// The failed operation.
        operation: &'static str,
        /// Length in bytes.
        len: u64,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The length of a file that backs guest memory cannot be read.
    #[error("cannot examine a memory file")]
    File(#[source] io::Error),
    /// Regions do not form an address space.
    #[error("cannot assemble guest memory")]
    Assemble(#[from] vm_memory::GuestRegionCollectionError),
}

/// Options for guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// Size in bytes: a multiple of 1 MiB, [`MIN_MEMORY`] to [`MAX_MEMORY`].
    pub bytes: u64,
    /// Requests transparent huge pages.
    pub huge_pages: bool,
    /// Includes guest memory in core dumps of the VMM.
    pub dump: bool,
}

impl MemoryConfig {
    /// Returns a configuration of `bytes` bytes with default options: ordinary pages, not
    /// in core dumps.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes,
            huge_pages: false,
            dump: false,
        }
    }
}

/// A part of guest memory whose initial contents are in a file.
#[derive(Clone, Debug)]
pub struct FileExtent {
    /// Offset in guest memory, counted without the hole; page-aligned.
    pub offset: u64,
    /// Length in bytes; a multiple of the page size.
    pub len: u64,
    /// The file; opened for reading.
    pub file: Arc<File>,
    /// Offset of the contents in the file; page-aligned.
    pub file_offset: u64,
}

/// A contiguous range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of its first byte in guest memory, counted without the hole.
    pub offset: u64,
}

impl RamRegion {
    /// Returns the part of a run of pages, in RAM order, that is in this region: its offset
    /// in the region and its length, both in bytes.
    fn part(&self, (first, pages): (u64, u64)) -> Option<(u64, u64)> {
        let begin = self.offset / PAGE_SIZE;
        let end = begin + self.len / PAGE_SIZE;
        let from = first.max(begin);
        let to = first.saturating_add(pages).min(end);
        (from < to).then(|| ((from - begin) * PAGE_SIZE, (to - from) * PAGE_SIZE))
    }
}

/// Returns the ranges that `bytes` of guest memory occupy: one, or two around the hole.
#[must_use]
pub fn ram_regions(bytes: u64) -> Vec<RamRegion> {
    let low = bytes.min(HOLE_START);
    let mut regions = vec![RamRegion {
        guest_address: 0,
        len: low,
        offset: 0,
    }];
    if bytes > low {
        regions.push(RamRegion {
            guest_address: HOLE_END,
            len: bytes - low,
            offset: low,
        });
    }
    regions
}

/// The memory of a machine. The mappings live until the last clone of
/// [`Self::guest`] is dropped.
#[derive(Clone, Debug)]
pub struct MachineMemory {
    /// Access by guest physical address.
    pub guest: GuestMemory,
    /// The ranges, by ascending address.
    pub regions: Vec<RamRegion>,
    discards: Arc<Discards>,
}

impl MachineMemory {
    /// Creates memory that reads as zero. Pages are allocated on first access, without a
    /// reservation (overcommit).
    ///
    /// # Errors
    /// An invalid size, or no address space left.
    pub fn anonymous(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let memory = Self::reserve(config.bytes, Discards::anonymous())?;
        memory.advise(config)?;
        Ok(memory)
    }

    /// Creates memory like [`Self::anonymous`] whose pages a pager fills when they are first
    /// accessed. The pager holds [`Self::discarded`] while it fills one, and fills those that
    /// it contains with zeros.
    ///
    /// # Errors
    /// An invalid size, or no address space left.
    pub fn filled(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let memory = Self::reserve(config.bytes, Discards::filled())?;
        memory.advise(config)?;
        Ok(memory)
    }

    /// Creates memory whose initial contents come from files, mapped privately: pages are
    /// read on first access, guest writes never reach the files. Memory outside all extents
    /// reads as zero. Later extents replace earlier ones where they overlap, as in a chain
    /// of diffs. Cost: one `mmap` for each extent.
    ///
    /// The files must not be truncated while the machine exists.
    ///
    /// # Errors
    /// An invalid size, an extent outside memory or past the end of its file, or a mapping
    /// that the host refuses.
    pub fn from_files(config: &MemoryConfig, extents: &[FileExtent]) -> Result<Self, MemoryError> {
        let discards = Discards::mapped(extents, config.dump);
        let memory = Self::reserve(config.bytes, discards)?;
        for extent in extents {
            memory.map_extent(config.bytes, extent)?;
        }
        memory.advise(config)?;
        Ok(memory)
    }

    /// Returns the size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// Returns the host address of the first byte of `region`, for the hypervisor and for
    /// page-level inspection. `None` for a region of another machine.
    #[must_use]
    pub fn host_address(&self, region: &RamRegion) -> Option<NonNull<u8>> {
        let mapped = self.guest.find_region(GuestAddress(region.guest_address))?;
        let whole = mapped.start_addr().0 == region.guest_address && mapped.len() == region.len;
        NonNull::new(mapped.as_ptr()).filter(|_| whole)
    }

    /// Discards everything written since the memory was set up: pages of files have the
    /// files' contents again, all others read as zero. Pages that were only read are also
    /// unmapped; [`Self::revert_pages`] spares them. No vCPU and no device may use the
    /// memory meanwhile: its contents change.
    ///
    /// # Errors
    /// The host refused.
    pub fn revert(&self) -> Result<(), MemoryError> {
        self.restore_discarded()?;
        for region in &self.regions {
            self.advise_region(region, Advice::LinuxDontNeed)
                .map_err(|source| MemoryError::Map {
                    operation: "revert",
                    len: region.len,
                    source,
                })?;
        }
        Ok(())
    }

    /// Like [`Self::revert`], for the pages of `runs` only: first page and number of pages,
    /// in RAM order. Pages outside memory are ignored.
    ///
    /// # Errors
    /// The host refused.
    pub fn revert_pages(&self, runs: &[(u64, u64)]) -> Result<(), MemoryError> {
        self.restore_discarded()?;
        for region in &self.regions {
            for &run in runs {
                if let Some((offset, len)) = region.part(run) {
                    self.drop_pages(region, offset, len)?;
                }
            }
        }
        Ok(())
    }

    /// Unmaps pages of `region`: those of files have the files' contents again, others read
    /// as zero.
    fn drop_pages(&self, region: &RamRegion, offset: u64, len: u64) -> Result<(), MemoryError> {
        self.advise_range(region, offset, len, Advice::LinuxDontNeed)
            .map_err(|source| MemoryError::Map {
                operation: "revert",
                len,
                source,
            })
    }

    fn reserve(bytes: u64, discards: Discards) -> Result<Self, MemoryError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) || !bytes.is_multiple_of(1 << 20) {
            return Err(MemoryError::Size { bytes });
        }
        let regions = ram_regions(bytes);
        let mut mapped = Vec::with_capacity(regions.len());
        for region in &regions {
            let len = usize::try_from(region.len).map_err(|_| MemoryError::Size { bytes })?;
            // The region owns the mapping: dropping it unmaps all of it, including mappings
            // over parts of it.
            let mapping = MmapRegionBuilder::<()>::new(len)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
                .map_err(|error| MemoryError::Map {
                    operation: "map",
                    len: region.len,
                    source: io::Error::other(error),
                })?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(region.guest_address))
                .ok_or(MemoryError::Size { bytes })?;
            mapped.push(region);
        }
        Ok(Self {
            guest: GuestMemory::from_regions(mapped)?,
            regions,
            discards: Arc::new(discards),
        })
    }

    fn map_extent(&self, bytes: u64, extent: &FileExtent) -> Result<(), MemoryError> {
        let bad = |reason| MemoryError::Extent {
            offset: extent.offset,
            len: extent.len,
            reason,
        };
        let aligned = [extent.offset, extent.len, extent.file_offset]
            .iter()
            .all(|value| value.is_multiple_of(PAGE_SIZE));
        if !aligned || extent.len == 0 {
            return Err(bad("it is not made of whole pages"));
        }
        let end = extent
            .offset
            .checked_add(extent.len)
            .filter(|&end| end <= bytes)
            .ok_or_else(|| bad("it ends past guest memory"))?;
        // An access to a page past the end of the file would kill the VMM (SIGBUS).
        let file_len = extent.file.metadata().map_err(MemoryError::File)?.len();
        extent
            .file_offset
            .checked_add(extent.len)
            .filter(|&end| end <= file_len)
            .ok_or_else(|| bad("it ends past its file"))?;

        for region in &self.regions {
            let start = extent.offset.max(region.offset);
            let stop = end.min(region.offset + region.len);
            if start >= stop {
                continue;
            }
            self.map_file(
                region,
                start..stop,
                &extent.file,
                extent.file_offset + (start - extent.offset),
            )?;
        }
        Ok(())
    }

    /// Maps a part of `file` over the bytes `range` of guest memory, which are in `region`.
    fn map_file(
        &self,
        region: &RamRegion,
        range: Range<u64>,
        file: &File,
        file_offset: u64,
    ) -> Result<(), MemoryError> {
        let len = range.end.saturating_sub(range.start);
        let failed = |source| MemoryError::Map {
            operation: "map a file over",
            len,
            source,
        };
        let (address, size) = self.host_range(region, &range).map_err(failed)?;
        // SAFETY: the range is inside this region's own mapping, which only volatile guest
        // memory accessors refer to, so replacing pages of it invalidates no reference.
        unsafe {
            rustix::mm::mmap(
                address.as_ptr().cast(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                file_offset,
            )
        }
        .map_err(|error| failed(error.into()))?;
        Ok(())
    }

    /// Maps zero pages over the bytes `range` of guest memory, which are in `region`.
    fn map_zero(&self, region: &RamRegion, range: Range<u64>) -> Result<(), MemoryError> {
        let len = range.end.saturating_sub(range.start);
        let failed = |source| MemoryError::Map {
            operation: "map zero pages over",
            len,
            source,
        };
        let (address, size) = self.host_range(region, &range).map_err(failed)?;
        // SAFETY: as in `map_file`.
        unsafe {
            rustix::mm::mmap_anonymous(
                address.as_ptr().cast(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        }
        .map_err(|error| failed(error.into()))?;
        Ok(())
    }

    /// Returns the host address and the length of the bytes `range` of guest memory.
    fn host_range(
        &self,
        region: &RamRegion,
        range: &Range<u64>,
    ) -> io::Result<(NonNull<u8>, usize)> {
        let host = self
            .host_address(region)
            .ok_or(io::ErrorKind::AddrNotAvailable)?;
        let (begin, end) = (region.offset, region.offset + region.len);
        if range.start < begin || range.end > end || range.start >= range.end {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let within = usize::try_from(range.start - begin).map_err(io::Error::other)?;
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        // SAFETY: the start of the range is within the region's mapping (checked above).
        let address = unsafe { host.add(within) };
        Ok((address, len))
    }

    fn advise(&self, config: &MemoryConfig) -> Result<(), MemoryError> {
        for region in &self.regions {
            if config.huge_pages {
                // Optional: a kernel without huge pages refuses.
                let _ = self.advise_region(region, Advice::LinuxHugepage);
            }
            if !config.dump {
                self.advise_region(region, Advice::LinuxDontDump)
                    .map_err(|source| MemoryError::Map {
                        operation: "exclude from core dumps",
                        len: region.len,
                        source,
                    })?;
            }
        }
        Ok(())
    }

    /// Advises the kernel about all of `region`.
    fn advise_region(&self, region: &RamRegion, advice: Advice) -> io::Result<()> {
        self.advise_range(region, 0, region.len, advice)
    }

    /// Advises the kernel about `len` bytes of `region` from `offset` on.
    fn advise_range(
        &self,
        region: &RamRegion,
        offset: u64,
        len: u64,
        advice: Advice,
    ) -> io::Result<()> {
        let start = region.offset.saturating_add(offset);
        let (address, size) = self.host_range(region, &(start..start.saturating_add(len)))?;
        // SAFETY: the range is within this region's mapping, which only volatile guest memory
        // accessors refer to: even advice that changes its contents invalidates no reference.
        Ok(unsafe { rustix::mm::madvise(address.as_ptr().cast(), size, advice) }?)
    }
}

#[cfg(test)]
mod tests;
