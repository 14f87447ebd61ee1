//! What may be behind a block device: nothing yet, a read-only composite of
//! file segments, or one raw file.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{FallocateFlags, fallocate};

use super::iov;
use super::queue::{Span, slice_spans};
use crate::GuestMemory;

/// Bytes in a sector, the unit of the virtio-blk protocol.
pub const SECTOR: u64 = 512;

/// A run of a file that appears on a composite disk.
#[derive(Debug)]
pub struct Segment {
    /// The file, opened for reading.
    pub file: File,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes; a multiple of the sector size. What lies past the end of
    /// the file reads as zero.
    pub len: u64,
}

/// Backing of a block device.
#[derive(Debug, Default)]
pub struct Disk {
    kind: Kind,
    len: u64,
    /// Start of each segment on the disk.
    starts: Vec<u64>,
}

#[derive(Debug, Default)]
enum Kind {
    #[default]
    Empty,
    Composite(Vec<Segment>),
    Raw {
        file: File,
        read_only: bool,
    },
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl Disk {
    /// A disk of no capacity, to be replaced later.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// A read-only disk made of segments, one after the other.
    ///
    /// # Errors
    /// A segment that is not made of whole sectors, or a total over 2^63 bytes.
    pub fn composite(segments: Vec<Segment>) -> io::Result<Self> {
        let mut starts = Vec::with_capacity(segments.len());
        let mut len = 0u64;
        for segment in &segments {
            if !segment.len.is_multiple_of(SECTOR) {
                return Err(invalid("a segment of a disk is not made of whole sectors"));
            }
            starts.push(len);
            len = len
                .checked_add(segment.len)
                .filter(|&len| i64::try_from(len).is_ok())
                .ok_or_else(|| invalid("a disk is too large"))?;
        }
        Ok(Self {
            kind: Kind::Composite(segments),
            len,
            starts,
        })
    }

    /// A file as it is; its length is rounded down to whole sectors.
    ///
    /// # Errors
    /// The length cannot be found out.
    pub fn raw(file: File, read_only: bool) -> io::Result<Self> {
        let len = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        Ok(Self {
            kind: Kind::Raw { file, read_only },
            len: len - len % SECTOR,
            starts: Vec::new(),
        })
    }

    /// Capacity in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no capacity.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        !matches!(
            self.kind,
            Kind::Raw {
                read_only: false,
                ..
            }
        )
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(invalid("access past the end of the disk")),
        }
    }

    /// Fills `spans` from `offset` on.
    ///
    /// # Errors
    /// An access past the end, or the file's error.
    pub fn read(&self, memory: &GuestMemory, spans: &[Span], offset: u64) -> io::Result<()> {
        let len = total(spans);
        self.check(offset, len)?;
        match &self.kind {
            Kind::Empty => Ok(()),
            Kind::Raw { file, .. } => read_file(memory, spans.to_vec(), file, offset),
            Kind::Composite(segments) => self.read_composite(memory, spans, offset, segments),
        }
    }

    fn read_composite(
        &self,
        memory: &GuestMemory,
        spans: &[Span],
        offset: u64,
        segments: &[Segment],
    ) -> io::Result<()> {
        let end = offset + total(spans);
        let mut at = offset;
        let mut index = self.starts.partition_point(|&start| start <= at).max(1) - 1;
        while at < end {
            let (Some(segment), Some(&start)) = (segments.get(index), self.starts.get(index))
            else {
                return Err(invalid("access past the end of the disk"));
            };
            let within = at - start;
            let len = (segment.len - within.min(segment.len)).min(end - at);
            if len > 0 {
                let mut part = Vec::with_capacity(spans.len());
                // Both fit: a request is at most 4 GiB.
                let skip = u32::try_from(at - offset).unwrap_or(u32::MAX);
                let take = u32::try_from(len).unwrap_or(u32::MAX);
                slice_spans(spans, skip, take, &mut part);
                read_file(memory, part, &segment.file, segment.offset + within)?;
            }
            at += len;
            index += 1;
        }
        Ok(())
    }

    /// Writes `spans` from `offset` on.
    ///
    /// # Errors
    /// A read-only disk, an access past the end, or the file's error.
    pub fn write(&self, memory: &GuestMemory, spans: &[Span], offset: u64) -> io::Result<()> {
        self.check(offset, total(spans))?;
        let mut spans = spans.to_vec();
        let mut offset = offset;
        let file = self.writable()?;
        while !spans.is_empty() {
            let written = iov::pwritev(memory, &spans, file.as_fd(), offset)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            iov::advance(&mut spans, written);
            offset += written as u64;
        }
        Ok(())
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
            Kind::Raw { file, .. } => file.sync_data(),
            _ => Ok(()),
        }
    }

    /// Makes a range read as zero, giving its space back where the file system
    /// can have holes.
    ///
    /// # Errors
    /// `Unsupported` where it cannot; a range past the end; the file's error.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let file = self.writable()?;
        if len == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, offset, len)?;
        Ok(())
    }

    /// Makes a range read as zero.
    ///
    /// # Errors
    /// A range past the end; the file's error.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.discard(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            other => return other,
        }
        let file = self.writable()?;
        let zeroes = vec![0; 64 << 10];
        let mut at = offset;
        while at < offset + len {
            let count = (offset + len - at).min(zeroes.len() as u64);
            file.write_all_at(&zeroes[..usize::try_from(count).unwrap_or(0)], at)?;
            at += count;
        }
        Ok(())
    }
}

fn total(spans: &[Span]) -> u64 {
    spans.iter().map(|span| u64::from(span.len)).sum()
}

/// Reads exactly; what lies past the end of the file is zero.
fn read_file(
    memory: &GuestMemory,
    mut spans: Vec<Span>,
    file: &File,
    mut offset: u64,
) -> io::Result<()> {
    while !spans.is_empty() {
        let read = iov::preadv(memory, &spans, file.as_fd(), offset)?;
        if read == 0 {
            return zero(memory, &spans);
        }
        iov::advance(&mut spans, read);
        offset += read as u64;
    }
    Ok(())
}

fn zero(memory: &GuestMemory, spans: &[Span]) -> io::Result<()> {
    use vm_memory::Bytes as _;
    let zeroes = [0; 4096];
    for span in spans {
        let mut done = 0;
        while done < span.len {
            let len = (span.len - done).min(4096);
            let address = vm_memory::GuestAddress(span.address.0 + u64::from(done));
            memory
                .write_slice(&zeroes[..len as usize], address)
                .map_err(io::Error::other)?;
            done += len;
        }
    }
    Ok(())
}
