//! Vectored I/O between host descriptors and guest memory, without a copy.

#![expect(
    unsafe_code,
    reason = "the kernel reads and writes guest memory by address"
)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use vm_memory::{GuestMemoryBackend as _, VolatileSlice};

use super::queue::Span;
use crate::GuestMemory;

/// Buffers handed to one system call; longer lists take several.
const MAX_IOV: usize = 64;

/// The buffers of one call, on the stack.
struct Buffers {
    iov: [libc::iovec; MAX_IOV],
    count: libc::c_int,
}

impl Buffers {
    /// The first buffers of `spans`.
    fn new(memory: &GuestMemory, spans: &[Span]) -> io::Result<Self> {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let mut buffers = Self {
            iov: [empty; MAX_IOV],
            count: 0,
        };
        for (slot, span) in buffers.iov.iter_mut().zip(spans) {
            let slice: VolatileSlice<'_, _> = memory
                .get_slice(span.address, span.len as usize)
                .map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            *slot = libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            };
            buffers.count += 1;
        }
        Ok(buffers)
    }
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Reads from a stream into guest memory; at most [`MAX_IOV`] spans at once.
///
/// # Errors
/// The system's answer; `EFAULT` for spans outside guest memory.
pub fn readv(memory: &GuestMemory, spans: &[Span], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let buffers = Buffers::new(memory, spans)?;
    // SAFETY: every buffer lies in guest memory, which `memory` keeps mapped, and
    // which is only ever accessed as volatile.
    result(unsafe { libc::readv(fd.as_raw_fd(), buffers.iov.as_ptr(), buffers.count) })
}

/// Writes guest memory to a stream; at most [`MAX_IOV`] spans at once.
///
/// # Errors
/// The system's answer; `EFAULT` for spans outside guest memory.
pub fn writev(memory: &GuestMemory, spans: &[Span], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let buffers = Buffers::new(memory, spans)?;
    // SAFETY: as in `readv`.
    result(unsafe { libc::writev(fd.as_raw_fd(), buffers.iov.as_ptr(), buffers.count) })
}

/// Reads from `offset` of a file into guest memory; see [`readv`].
///
/// # Errors
/// The system's answer; `EFAULT` for spans outside guest memory.
pub fn preadv(
    memory: &GuestMemory,
    spans: &[Span],
    fd: BorrowedFd<'_>,
    offset: u64,
) -> io::Result<usize> {
    let buffers = Buffers::new(memory, spans)?;
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: as in `readv`.
    result(unsafe { libc::preadv(fd.as_raw_fd(), buffers.iov.as_ptr(), buffers.count, offset) })
}

/// Writes guest memory to `offset` of a file; see [`writev`].
///
/// # Errors
/// The system's answer; `EFAULT` for spans outside guest memory.
pub fn pwritev(
    memory: &GuestMemory,
    spans: &[Span],
    fd: BorrowedFd<'_>,
    offset: u64,
) -> io::Result<usize> {
    let buffers = Buffers::new(memory, spans)?;
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: as in `readv`.
    result(unsafe { libc::pwritev(fd.as_raw_fd(), buffers.iov.as_ptr(), buffers.count, offset) })
}

/// Drops the first `count` bytes of `spans`, in place.
pub fn advance(spans: &mut Vec<Span>, count: usize) {
    let mut left = count;
    let mut done = 0;
    for span in spans.iter_mut() {
        let len = span.len as usize;
        if left < len {
            // `left` is below a u32.
            let part = u32::try_from(left).unwrap_or(span.len);
            span.address.0 += u64::from(part);
            span.len -= part;
            break;
        }
        left -= len;
        done += 1;
    }
    spans.drain(..done);
}
