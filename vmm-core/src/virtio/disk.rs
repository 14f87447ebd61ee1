//! Backings of a block device: none, a read-only composite of file segments, one raw file,
//! or layers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use sm_virtio::GuestMemory;
use sm_virtio::iov::{self, Window};

use super::layered::LayeredDisk;
use super::storage::{Storage as _, saturated};

/// Length of a sector in bytes, the unit of the virtio-blk protocol.
pub const SECTOR: u64 = 512;

/// A part of a file that is a part of a composite disk.
#[derive(Debug)]
pub struct FileSegment {
    /// The file, opened for reading.
    pub file: File,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes; a multiple of the sector size. Bytes past the length that the file
    /// has when the disk is created read as zero.
    pub len: u64,
}

/// Backing of a block device.
#[derive(Debug, Default)]
pub struct Disk {
    kind: Kind,
    len: u64,
    /// The range of each segment on the disk.
    ranges: Vec<Range>,
}

/// The bytes of the disk that one segment provides.
#[derive(Clone, Copy, Debug)]
struct Range {
    /// First byte on the disk.
    start: u64,
    /// Number of bytes that the file has, from the start on. The others are zeros; a
    /// failing or short read of these never turns into zeros.
    stored_len: u64,
}

#[derive(Debug, Default)]
enum Kind {
    #[default]
    Empty,
    Composite(Vec<FileSegment>),
    Raw {
        file: File,
        read_only: bool,
    },
    Layered(Box<LayeredDisk>),
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Returns the length of a file or a block device.
fn file_len(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?)
}

impl Disk {
    /// Returns a disk without capacity, to be replaced later.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// Creates a read-only disk from segments, one after the other.
    ///
    /// # Errors
    /// A segment that is not made of whole sectors, or that ends past the largest file; a
    /// total of more than 2^63 bytes; a file whose length cannot be determined.
    pub fn composite(segments: Vec<FileSegment>) -> io::Result<Self> {
        let mut ranges = Vec::with_capacity(segments.len());
        let mut len = 0u64;
        for segment in &segments {
            if !segment.len.is_multiple_of(SECTOR) {
                return Err(invalid("a segment of a disk is not made of whole sectors"));
            }
            let end = segment.offset.checked_add(segment.len);
            if end.is_none_or(|end| i64::try_from(end).is_err()) {
                return Err(invalid("a segment of a disk ends past the largest file"));
            }
            let in_file = file_len(&segment.file)?.saturating_sub(segment.offset);
            ranges.push(Range {
                start: len,
                stored_len: in_file.min(segment.len),
            });
            len = len
                .checked_add(segment.len)
                .filter(|&len| i64::try_from(len).is_ok())
                .ok_or_else(|| invalid("a disk is too large"))?;
        }
        Ok(Self {
            kind: Kind::Composite(segments),
            len,
            ranges,
        })
    }

    /// Creates a disk from a whole file; its length is rounded down to whole sectors.
    ///
    /// # Errors
    /// The length cannot be determined.
    pub fn raw(file: File, read_only: bool) -> io::Result<Self> {
        let len = file_len(&file)?;
        Ok(Self {
            kind: Kind::Raw { file, read_only },
            len: len - len % SECTOR,
            ranges: Vec::new(),
        })
    }

    /// Creates a disk from layers, the topmost of which is written to.
    #[must_use]
    pub fn layered(layers: LayeredDisk) -> Self {
        let len = layers.capacity();
        Self {
            kind: Kind::Layered(Box::new(layers)),
            len,
            ranges: Vec::new(),
        }
    }

    /// Returns the layers, if it has any.
    #[must_use]
    pub fn layers(&self) -> Option<&LayeredDisk> {
        match &self.kind {
            Kind::Layered(layers) => Some(layers),
            Kind::Empty | Kind::Composite(_) | Kind::Raw { .. } => None,
        }
    }

    /// Returns the capacity in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns true if the capacity is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns true if writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        match &self.kind {
            Kind::Empty | Kind::Composite(_) => true,
            Kind::Raw { read_only, .. } => *read_only,
            Kind::Layered(_) => false,
        }
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(invalid("access past the end of the disk")),
        }
    }

    /// Fills `window` from `offset` on.
    ///
    /// # Errors
    /// An access past the end of the disk, a file that has become shorter than it was when
    /// the disk was created (`UnexpectedEof`), or the file's error.
    pub fn read(&self, memory: &GuestMemory, window: Window<'_>, offset: u64) -> io::Result<()> {
        if let Kind::Layered(layers) = &self.kind {
            return layers.read(memory, window, offset);
        }
        self.for_each_run(memory, window, offset, |part, file, at| {
            iov::read_exact_at(memory, part, file, at).map(|()| true)
        })?;
        Ok(())
    }

    /// Fills `window` from `offset` on if that is possible without waiting for a device.
    /// Returns `Ok(false)` if it is not, or if the file system cannot report it; a part of
    /// the window may then have been filled.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_cached(
        &self,
        memory: &GuestMemory,
        window: Window<'_>,
        offset: u64,
    ) -> io::Result<bool> {
        if let Kind::Layered(layers) = &self.kind {
            return layers.read_cached(memory, window, offset);
        }
        self.for_each_run(memory, window, offset, |part, file, at| {
            iov::read_cached_at(memory, part, file, at)
        })
    }

    /// Calls `read` for each part of `window` that lies in one file, with its offset there,
    /// until one call returns false; parts outside all files are zeros.
    fn for_each_run(
        &self,
        memory: &GuestMemory,
        mut window: Window<'_>,
        offset: u64,
        mut read: impl FnMut(Window<'_>, BorrowedFd<'_>, u64) -> io::Result<bool>,
    ) -> io::Result<bool> {
        self.check(offset, u64::from(window.len()))?;
        let segments = match &self.kind {
            // Layers have their own.
            Kind::Empty | Kind::Layered(_) => return Ok(true),
            Kind::Raw { file, .. } => return read(window, file.as_fd(), offset),
            Kind::Composite(segments) => segments,
        };
        let first = self.ranges.partition_point(|range| range.start <= offset);
        let mut at = offset;
        for (segment, range) in segments.iter().zip(&self.ranges).skip(first.max(1) - 1) {
            if window.is_empty() {
                break;
            }
            let within = at - range.start;
            let part = window.take(saturated(segment.len - within));
            let mut padding = part;
            let part = part.take(saturated(range.stored_len.saturating_sub(within)));
            let position = segment.offset + within;
            if !part.is_empty() && !read(part, segment.file.as_fd(), position)? {
                return Ok(false);
            }
            let len = padding.len();
            padding.advance(part.len());
            padding.zero(memory)?;
            window.advance(len);
            at += u64::from(len);
        }
        Ok(true)
    }

    /// Writes `window` from `offset` on.
    ///
    /// # Errors
    /// A read-only disk, an access past the end, or the file's error.
    pub fn write(&self, memory: &GuestMemory, window: Window<'_>, offset: u64) -> io::Result<()> {
        if let Kind::Layered(layers) = &self.kind {
            return layers.write(memory, window, offset);
        }
        self.check(offset, u64::from(window.len()))?;
        iov::write_all_at(memory, window, self.writable()?.as_fd(), offset)
    }

    fn writable(&self) -> io::Result<&File> {
        match &self.kind {
            Kind::Raw {
                file,
                read_only: false,
            } => Ok(file),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    /// Makes earlier writes durable.
    ///
    /// # Errors
    /// The file's error.
    pub fn flush(&self) -> io::Result<()> {
        match &self.kind {
            Kind::Raw {
                file,
                read_only: false,
            } => file.sync(),
            Kind::Layered(layers) => layers.flush(),
            _ => Ok(()),
        }
    }

    /// Makes a range read as zero, and returns its space to the file system.
    ///
    /// # Errors
    /// `Unsupported` if the file system has no holes; a range past the end; the file's
    /// error.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if let Kind::Layered(layers) = &self.kind {
            return layers.discard(offset, len);
        }
        self.change(offset, len, |file, range| file.punch(range))
    }

    /// Makes a range read as zero; with `unmap`, also returns its space, if the file system
    /// supports it.
    ///
    /// # Errors
    /// A range past the end; the file's error.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if let Kind::Layered(layers) = &self.kind {
            return layers.write_zeroes(offset, len, unmap);
        }
        self.change(offset, len, |file, range| {
            let zeroed = if unmap {
                file.punch(range.clone())
            } else {
                file.zero(range.clone())
            };
            match zeroed {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    file.store_zeroes(range)
                }
                other => other,
            }
        })
    }

    /// Applies `change` to a range of the file, unless it is empty.
    fn change(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce(&File, std::ops::Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.check(offset, len)?;
        let file = self.writable()?;
        if len == 0 {
            return Ok(());
        }
        // The end is at most that of the disk.
        change(file, offset..offset + len)
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "test patterns are small numbers"
)]
mod tests {
    use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
    use std::os::unix::fs::MetadataExt as _;

    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use sm_virtio::queue::Span;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn file(contents: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    /// Returns spans of the given lengths, not adjacent.
    fn spans(lens: &[u32]) -> Vec<Span> {
        let mut address = 0x100;
        lens.iter()
            .map(|&len| {
                let span = Span {
                    address: GuestAddress(address),
                    len,
                };
                address += u64::from(len) + 8;
                span
            })
            .collect()
    }

    fn contents(memory: &GuestMemory, spans: &[Span]) -> Vec<u8> {
        let window = Window::new(spans, 0, u32::MAX);
        let mut bytes = vec![0; window.len() as usize];
        assert!(window.copy_out(memory, &mut bytes));
        bytes
    }

    fn pattern(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8 ^ seed).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Reading a composite is reading the concatenation of its segments.
        #[test]
        fn a_composite_is_the_concatenation_of_its_segments(
            sectors in prop::collection::vec((0u64..6, 0u64..3, 0u64..7), 1..6),
            at in 0u64..20,
            lens in prop::collection::vec(0u32..1500, 1..5),
        ) {
            let memory = memory();
            let mut whole = Vec::new();
            let segments = (0u8..).zip(&sectors).map(|(seed, &(len, offset, held))| {
                // The file may end before the segment does.
                let data = pattern(usize::try_from(held * SECTOR).unwrap() + 100, seed);
                let (offset, len) = (offset * SECTOR + 7, len * SECTOR);
                let mut part: Vec<u8> =
                    data.iter().copied().skip(usize::try_from(offset).unwrap()).collect();
                part.resize(usize::try_from(len).unwrap(), 0);
                whole.extend_from_slice(&part);
                FileSegment { file: file(&data), offset, len }
            });
            let disk = Disk::composite(segments.collect()).unwrap();
            prop_assert_eq!(disk.len(), whole.len() as u64);
            let spans = spans(&lens);
            let total: usize = lens.iter().map(|&len| len as usize).sum();
            let start = usize::try_from(at * SECTOR).unwrap();
            let read = disk.read(&memory, Window::new(&spans, 0, u32::MAX), at * SECTOR);
            match whole.get(start..start + total) {
                None => prop_assert!(read.is_err()),
                Some(expected) => {
                    read.unwrap();
                    prop_assert_eq!(contents(&memory, &spans), expected);
                    let window = Window::new(&spans, 0, u32::MAX);
                    memory.write_slice(&[0xaa; 8192], GuestAddress(0)).unwrap();
                    if disk.read_cached(&memory, window, at * SECTOR).unwrap() {
                        prop_assert_eq!(contents(&memory, &spans), expected);
                    }
                }
            }
        }
    }

    #[test]
    fn an_empty_disk_has_nothing_to_read_or_write() {
        let (disk, memory) = (Disk::empty(), memory());
        let spans = spans(&[512]);
        let one = Window::new(&spans, 0, 512);
        assert!(disk.is_empty() && disk.is_read_only());
        assert!(disk.read(&memory, one, 0).is_err());
        assert!(disk.write(&memory, one, 0).is_err());
        assert!(disk.read(&memory, one.take(0), 0).is_ok());
        disk.flush().unwrap();
    }

    #[test]
    fn a_raw_disk_stores_writes_and_discards_ranges() {
        let memory = memory();
        let file = file(&vec![1; 1 << 20]);
        let disk = Disk::raw(file.try_clone().unwrap(), false).unwrap();
        assert_eq!(disk.len(), 1 << 20);
        let spans = spans(&[300, 212, 512]);
        memory.write_slice(&[7; 2048], GuestAddress(0)).unwrap();
        let window = Window::new(&spans, 0, u32::MAX);
        disk.write(&memory, window, 512).unwrap();
        disk.flush().unwrap();
        let mut whole = Vec::new();
        (&file).seek(SeekFrom::Start(0)).unwrap();
        (&file).read_to_end(&mut whole).unwrap();
        assert_eq!(whole[..512], [1; 512]);
        assert_eq!(whole[512..1536], [7; 1024]);
        assert_eq!(whole[1536], 1);

        disk.write_zeroes(512, 512, false).unwrap();
        disk.write_zeroes(1024, 512, true).unwrap();
        disk.read(&memory, window, 512).unwrap();
        assert_eq!(contents(&memory, &spans), [0; 1024]);
        let before = file.metadata().unwrap().blocks();
        match disk.discard(4096, 1 << 19) {
            Ok(()) => assert!(file.metadata().unwrap().blocks() < before),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported),
        }
        assert_eq!(file.metadata().unwrap().len(), 1 << 20, "the size is kept");
        for (offset, len) in [(1 << 20, 512), ((1 << 20) - 512, 1024), (u64::MAX, 2)] {
            assert!(disk.discard(offset, len).is_err());
            assert!(disk.write_zeroes(offset, len, true).is_err());
        }
    }

    /// Also for kernels on which a read of uncached data may return 0 (`RWF_NOWAIT` on
    /// Linux 5.9 and 5.10).
    #[test]
    fn a_truncated_file_does_not_read_as_zeros() {
        let memory = memory();
        let spans = spans(&[700, 324]);
        let window = Window::new(&spans, 0, u32::MAX);
        let raw = file(&[1; 2048]);
        let part = file(&[1; 2048]);
        let disks = [
            (Disk::raw(raw.try_clone().unwrap(), true).unwrap(), raw),
            (
                Disk::composite(vec![FileSegment {
                    file: part.try_clone().unwrap(),
                    offset: 0,
                    len: 4096,
                }])
                .unwrap(),
                part,
            ),
        ];
        for (disk, file) in disks {
            disk.read(&memory, window, 1024).unwrap();
            assert_eq!(contents(&memory, &spans), [1; 1024]);
            file.set_len(1500).unwrap();
            // The short read may have other reasons than the page cache; the second read
            // fails.
            assert!(!disk.read_cached(&memory, window, 1024).unwrap());
            let error = disk.read(&memory, window, 1024).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            disk.read(&memory, window, 0).unwrap();
        }
    }

    #[test]
    fn bytes_that_a_file_never_had_are_zeros() {
        let memory = memory();
        let disk = Disk::composite(vec![FileSegment {
            file: file(&[1; 600]),
            offset: 88,
            len: 2048,
        }])
        .unwrap();
        let spans = spans(&[100, 924]);
        let window = Window::new(&spans, 0, u32::MAX);
        for at in [0, 512, 1024] {
            memory.write_slice(&[0xaa; 4096], GuestAddress(0)).unwrap();
            disk.read(&memory, window, at).unwrap();
            let held = 512 - usize::try_from(at).unwrap().min(512);
            let expected: Vec<u8> = (0..1024).map(|i| u8::from(i < held)).collect();
            assert_eq!(contents(&memory, &spans), expected);
        }
    }

    #[test]
    fn a_read_only_disk_is_not_written() {
        let memory = memory();
        let spans = spans(&[512]);
        let window = Window::new(&spans, 0, 512);
        let raw = Disk::raw(file(&[1; 1300]), true).unwrap();
        assert_eq!(raw.len(), 1024, "cut to whole sectors");
        let segment = FileSegment {
            file: file(&[1; 512]),
            offset: 0,
            len: 512,
        };
        for disk in [raw, Disk::composite(vec![segment]).unwrap()] {
            assert!(disk.is_read_only());
            assert!(disk.write(&memory, window, 0).is_err());
            assert!(disk.discard(0, 512).is_err());
            assert!(disk.write_zeroes(0, 512, true).is_err());
        }
    }

    #[test]
    fn invalid_segments_are_refused() {
        let segment = |offset, len| FileSegment {
            file: file(&[]),
            offset,
            len,
        };
        assert!(Disk::composite(vec![segment(0, 511)]).is_err());
        assert!(Disk::composite(vec![segment(u64::MAX - 511, 512)]).is_err());
        let half = 1 << 62;
        assert!(Disk::composite(vec![segment(0, half), segment(0, half)]).is_err());
    }
}
