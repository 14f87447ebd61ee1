//! Operations on the file of a disk: a trait, so that tests can record them.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use rustix::io::Errno;
use sm_virtio::GuestMemory;
use sm_virtio::iov::{self, Window};

/// Zeros for file systems that cannot zero a range themselves.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Converts a length, limited to that of the largest window.
pub(super) fn saturated(len: u64) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// The file of a disk. Any thread may use it; a read at a place that no call has written
/// gives zeros.
pub(super) trait Storage: Debug + Send + Sync {
    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// The space that it occupies, in bytes.
    fn allocated(&self) -> io::Result<u64>;

    /// Makes the file longer, without allocating anything.
    fn extend(&self, len: u64) -> io::Result<()>;

    /// Fills `window` from `at` on.
    fn read(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<()>;

    /// As [`read`](Self::read), if nothing has to be waited for; else `Ok(false)`.
    fn read_cached(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<bool>;

    /// Writes `window` from `at` on.
    fn write(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<()>;

    /// Fills `bytes` from `at` on.
    fn load(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes `bytes` from `at` on.
    fn store(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Makes a range read as zero, and returns its space. `Unsupported` if the file system
    /// has no holes.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes a range read as zero, and keeps or allocates its space. `Unsupported` if the
    /// file system cannot.
    fn zero(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes everything before durable. An error says nothing of why: a later call may
    /// succeed although data is lost, so nothing may be tried again because of its kind.
    fn sync(&self) -> io::Result<()>;

    /// Makes a range read as zero by writing zeros.
    fn store_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let count = (range.end - at).min(ZEROES.len() as u64);
            let bytes = ZEROES.get(..usize::try_from(count).unwrap_or(0));
            self.store(bytes.unwrap_or(&ZEROES), at)?;
            at += count;
        }
        Ok(())
    }

    /// Makes a range read as zero; in the way of [`zero`](Self::zero) if possible.
    fn make_zero(&self, range: Range<u64>) -> io::Result<()> {
        match self.zero(range.clone()) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.store_zeroes(range),
            other => other,
        }
    }

    /// The first part of `range` that may be something else than zeros.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>>;
}

fn change(file: &File, how: FallocateFlags, range: &Range<u64>) -> io::Result<()> {
    let how = how | FallocateFlags::KEEP_SIZE;
    match fallocate(file, how, range.start, range.end - range.start) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(io::ErrorKind::Unsupported.into()),
        Err(error) => Err(error.into()),
    }
}

impl Storage for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.metadata()?.blocks().saturating_mul(512))
    }

    fn extend(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn read(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<()> {
        iov::read_exact_at(memory, window, self.as_fd(), at)
    }

    fn read_cached(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<bool> {
        iov::read_cached_at(memory, window, self.as_fd(), at)
    }

    fn write(&self, memory: &GuestMemory, window: Window<'_>, at: u64) -> io::Result<()> {
        iov::write_all_at(memory, window, self.as_fd(), at)
    }

    fn load(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(bytes, at)
    }

    fn store(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        change(self, FallocateFlags::PUNCH_HOLE, &range)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        change(self, FallocateFlags::ZERO_RANGE, &range)
    }

    fn sync(&self) -> io::Result<()> {
        // Also without space, of which file systems that allocate late tell only now.
        self.sync_data()
            .map_err(|error| io::Error::other(format!("cannot write back: {error}")))
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let start = match rustix::fs::seek(self, SeekFrom::Data(range.start)) {
            Ok(start) => start.max(range.start),
            Err(Errno::NXIO) => return Ok(None),
            // Without holes in this file system, everything may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(range)),
            Err(error) => return Err(error.into()),
        };
        if start >= range.end {
            return Ok(None);
        }
        let end = rustix::fs::seek(self, SeekFrom::Hole(start))?;
        Ok(Some(start..end.min(range.end)))
    }
}
