//! Guest memory: anonymous for a new machine, private file mappings for a restored one.
#![expect(
    unsafe_code,
    reason = "maps files over reserved guest memory and advises the kernel about it"
)]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

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
}

impl MachineMemory {
    /// Creates memory that reads as zero. Pages are allocated on first access, without a
    /// reservation (overcommit).
    ///
    /// # Errors
    /// An invalid size, or no address space left.
    pub fn anonymous(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let memory = Self::reserve(config.bytes)?;
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
        let memory = Self::reserve(config.bytes)?;
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
        for region in &self.regions {
            let begin = region.offset / PAGE_SIZE;
            let end = begin + region.len / PAGE_SIZE;
            for &(first, pages) in runs {
                let from = first.max(begin);
                let to = first.saturating_add(pages).min(end);
                if from >= to {
                    continue;
                }
                let (offset, len) = ((from - begin) * PAGE_SIZE, (to - from) * PAGE_SIZE);
                self.advise_range(region, offset, len, Advice::LinuxDontNeed)
                    .map_err(|source| MemoryError::Map {
                        operation: "revert",
                        len,
                        source,
                    })?;
            }
        }
        Ok(())
    }

    fn reserve(bytes: u64) -> Result<Self, MemoryError> {
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
            let host = self
                .host_address(region)
                .ok_or_else(|| bad("its region is not mapped"))?;
            let within = usize::try_from(start - region.offset)
                .map_err(|_| bad("it ends past guest memory"))?;
            let len =
                usize::try_from(stop - start).map_err(|_| bad("it ends past guest memory"))?;
            // SAFETY: `within + len` is inside this region's own mapping (the bounds
            // above), which only volatile guest memory accessors refer to, so replacing
            // pages of it invalidates no reference.
            unsafe {
                rustix::mm::mmap(
                    host.as_ptr().add(within).cast(),
                    len,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                    &extent.file,
                    extent.file_offset + (start - extent.offset),
                )
            }
            .map_err(|error| MemoryError::Map {
                operation: "map a file over",
                len: stop - start,
                source: error.into(),
            })?;
        }
        Ok(())
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
        let host = self
            .host_address(region)
            .ok_or(io::ErrorKind::AddrNotAvailable)?;
        if offset.checked_add(len).is_none_or(|end| end > region.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: the range is within this region's mapping (checked above), which only
        // volatile guest memory accessors refer to: even advice that changes its contents
        // invalidates no reference.
        Ok(unsafe { rustix::mm::madvise(host.as_ptr().add(offset).cast(), len, advice) }?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(contents: &[u8]) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(contents).unwrap();
        Arc::new(file)
    }

    #[test]
    fn regions_leave_the_hole_free() {
        assert_eq!(ram_regions(256 * MIB).len(), 1);
        assert_eq!(ram_regions(HOLE_START).len(), 1);
        let regions = ram_regions(6144 * MIB);
        assert_eq!(regions[0].len, HOLE_START);
        assert_eq!(
            regions[1],
            RamRegion {
                guest_address: HOLE_END,
                len: 3072 * MIB,
                offset: HOLE_START,
            }
        );
    }

    #[test]
    fn invalid_sizes_are_refused() {
        for bytes in [0, 63 * MIB, 64 * MIB + 4096, MAX_MEMORY + MIB, u64::MAX] {
            assert!(matches!(
                MachineMemory::anonymous(&MemoryConfig::new(bytes)),
                Err(MemoryError::Size { .. })
            ));
        }
    }

    #[test]
    fn memory_above_the_hole_is_usable_and_the_hole_is_not() {
        let memory = MachineMemory::anonymous(&MemoryConfig::new(6144 * MIB)).unwrap();
        let last = GuestAddress(HOLE_END + 3072 * MIB - 8);
        memory.guest.write_obj(7u64, last).unwrap();
        assert_eq!(memory.guest.read_obj::<u64>(last).unwrap(), 7);
        assert!(
            memory
                .guest
                .read_obj::<u8>(GuestAddress(HOLE_START))
                .is_err()
        );
        assert_eq!(memory.bytes(), 6144 * MIB);
    }

    #[test]
    fn extents_are_mapped_at_their_offsets_and_stay_private() {
        let base = file(&[1; 3 * 4096]);
        let diff = file(&[2; 4096]);
        // The base spans the hole; the diff replaces its middle page.
        let offset = HOLE_START - 4096;
        let extents = [
            FileExtent {
                offset,
                len: 3 * 4096,
                file: base.clone(),
                file_offset: 0,
            },
            FileExtent {
                offset: offset + 4096,
                len: 4096,
                file: diff,
                file_offset: 0,
            },
        ];
        let config = MemoryConfig {
            huge_pages: true,
            ..MemoryConfig::new(4096 * MIB)
        };
        let memory = MachineMemory::from_files(&config, &extents).unwrap();
        let read = |address| memory.guest.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!(read(HOLE_START - 4097), 0);
        assert_eq!(read(HOLE_START - 1), 1);
        assert_eq!(read(HOLE_END), 2);
        assert_eq!(read(HOLE_END + 4096), 1);
        assert_eq!(read(HOLE_END + 2 * 4096), 0);

        memory
            .guest
            .write_obj(9u8, GuestAddress(HOLE_END + 4096))
            .unwrap();
        memory.guest.write_obj(9u8, GuestAddress(0)).unwrap();
        memory.revert().unwrap();
        assert_eq!(read(HOLE_END + 4096), 1);
        assert_eq!(read(0), 0);
        memory
            .guest
            .write_obj(9u8, GuestAddress(HOLE_END + 4096))
            .unwrap();

        // Only the requested pages, on either side of the hole.
        memory.guest.write_obj(8u8, GuestAddress(HOLE_END)).unwrap();
        memory
            .guest
            .write_obj(8u8, GuestAddress(HOLE_START - 1))
            .unwrap();
        let page = HOLE_START / PAGE_SIZE;
        memory
            .revert_pages(&[(page - 1, 2), (u64::MAX, 7)])
            .unwrap();
        assert_eq!((read(HOLE_START - 1), read(HOLE_END)), (1, 2));
        assert_eq!(read(HOLE_END + 4096), 9, "not requested");

        let again = MachineMemory::from_files(&config, &extents).unwrap();
        let byte: u8 = again.guest.read_obj(GuestAddress(HOLE_END + 4096)).unwrap();
        assert_eq!(byte, 1);
    }

    #[test]
    fn extents_that_do_not_fit_are_refused() {
        let file = file(&[1; 8192]);
        let extent = |offset, len, file_offset| FileExtent {
            offset,
            len,
            file: file.clone(),
            file_offset,
        };
        for bad in [
            extent(0, 0, 0),
            extent(1, 4096, 0),
            extent(0, 4095, 0),
            extent(0, 4096, 12),
            extent(0, 3 * 4096, 0),
            extent(0, 8192, 4096),
            extent(0, 4096, u64::MAX - 4095),
            extent(64 * MIB - 4096, 8192, 0),
            extent(u64::MAX - 4095, 4096, 0),
        ] {
            let result =
                MachineMemory::from_files(&MemoryConfig::new(64 * MIB), std::slice::from_ref(&bad));
            assert!(matches!(result, Err(MemoryError::Extent { .. })), "{bad:?}");
        }
    }
}
