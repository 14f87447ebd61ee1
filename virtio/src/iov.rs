//! Vectored I/O between host descriptors and guest memory, without a copy.

#![expect(
    unsafe_code,
    reason = "the kernel reads and writes guest memory by address"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, VolatileSlice};

use crate::GuestMemory;
use crate::queue::Span;

/// Maximum number of buffers in one system call; longer lists take several.
pub const MAX_SPANS: usize = 128;

/// `SIOCATMARK` (linux/sockios.h), which the libc crate does not have.
const SIOCATMARK: libc::Ioctl = 0x8905;

/// A contiguous part of the bytes in a list of spans.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    spans: &'a [Span],
    /// Bytes of the first span that precede the window.
    skip: u32,
    len: u32,
}

impl<'a> Window<'a> {
    /// Returns the bytes `skip..skip + len` of `spans`, as far as they exist.
    #[must_use]
    pub fn new(spans: &'a [Span], skip: u32, len: u32) -> Self {
        let total = spans
            .iter()
            .fold(0u32, |sum, span| sum.saturating_add(span.len));
        let mut window = Self {
            spans,
            skip: 0,
            len: total,
        };
        window.advance(skip);
        window.take(len)
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Returns true if there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the first `len` bytes, as far as they exist.
    #[must_use]
    pub fn take(mut self, len: u32) -> Self {
        self.len = self.len.min(len);
        self
    }

    /// Removes the first `count` bytes.
    pub fn advance(&mut self, count: u32) {
        let count = count.min(self.len);
        self.len -= count;
        let mut skip = u64::from(self.skip) + u64::from(count);
        while let Some((first, rest)) = self.spans.split_first()
            && skip >= u64::from(first.len)
        {
            skip -= u64::from(first.len);
            self.spans = rest;
        }
        // `skip` is less than the first span's length now, or no span is left.
        self.skip = u32::try_from(skip).unwrap_or(0);
    }

    /// Returns the window's ranges of guest memory.
    pub fn spans(&self) -> impl Iterator<Item = Span> + use<'a> {
        let (mut skip, mut left) = (self.skip, self.len);
        self.spans.iter().map_while(move |span| {
            let len = (span.len - skip).min(left);
            let address = GuestAddress(span.address.0 + u64::from(skip));
            skip = 0;
            left -= len;
            (len > 0 || left > 0).then_some(Span { address, len })
        })
    }

    /// Copies the bytes from guest memory; returns false if there are too few of them to
    /// fill `bytes`, or a span is outside guest memory.
    #[must_use]
    pub fn copy_out(&self, memory: &GuestMemory, bytes: &mut [u8]) -> bool {
        let mut rest = bytes;
        for span in self.spans() {
            let len = rest.len().min(span.len as usize);
            let (now, later) = rest.split_at_mut(len);
            if memory.read_slice(now, span.address).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Copies `bytes` into guest memory; returns false if they do not fit.
    #[must_use]
    pub fn copy_in(&self, memory: &GuestMemory, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        for span in self.spans() {
            let (now, later) = rest.split_at(rest.len().min(span.len as usize));
            if memory.write_slice(now, span.address).is_err() {
                return false;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Fills the window with zeroes.
    ///
    /// # Errors
    /// `EFAULT` for spans outside guest memory.
    pub fn zero(&self, memory: &GuestMemory) -> io::Result<()> {
        for span in self.spans() {
            let mut done = 0;
            while done < span.len {
                let len = (span.len - done).min(4096);
                let address = GuestAddress(span.address.0 + u64::from(done));
                memory
                    .write_slice(&[0; 4096][..len as usize], address)
                    .map_err(|_| fault())?;
                done += len;
            }
        }
        Ok(())
    }
}

fn fault() -> io::Error {
    io::Error::from_raw_os_error(libc::EFAULT)
}

/// Arguments of one vectored call, on the stack.
struct Buffers {
    iov: [MaybeUninit<libc::iovec>; MAX_SPANS],
    /// At most `MAX_SPANS`.
    count: u16,
}

impl Buffers {
    /// Collects the first buffers of `spans`. Empty spans are left out: a call with only
    /// empty buffers would look like the end of a file.
    fn new(memory: &GuestMemory, spans: impl Iterator<Item = Span>) -> io::Result<Self> {
        let mut buffers = Self {
            iov: [MaybeUninit::uninit(); MAX_SPANS],
            count: 0,
        };
        let spans = spans.filter(|span| span.len > 0);
        for (slot, span) in buffers.iov.iter_mut().zip(spans) {
            let slice: VolatileSlice<'_, _> = memory
                .get_slice(span.address, span.len as usize)
                .map_err(|_| fault())?;
            slot.write(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            buffers.count += 1;
        }
        Ok(buffers)
    }

    /// Returns the address of the buffers; the first `count` of them are initialised.
    fn as_ptr(&self) -> *const libc::iovec {
        self.iov.as_ptr().cast()
    }

    /// Returns a message header for the buffers, without a name or control data.
    fn message(&self) -> libc::msghdr {
        // SAFETY: a message header is plain data; zeroes are valid and mean "nothing".
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.as_ptr().cast_mut();
        // The type of `msg_iovlen` differs between C libraries.
        message.msg_iovlen = self.count.into();
        message
    }

    /// Returns the number of buffers in the type that system calls on files take.
    fn count(&self) -> libc::c_int {
        self.count.into()
    }
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Result of receiving from a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Number of bytes.
    pub len: usize,
    /// Ancillary data (descriptors) arrived with the bytes and was discarded; the kernel
    /// ends a read there, although more bytes may follow.
    pub stopped: bool,
}

/// Receives from a stream socket into guest memory; at most 128 spans in one call.
///
/// # Errors
/// The operating system's error; `EFAULT` for spans outside guest memory.
pub fn receive(memory: &GuestMemory, spans: &[Span], fd: BorrowedFd<'_>) -> io::Result<Received> {
    let buffers = Buffers::new(memory, spans.iter().copied())?;
    let mut message = buffers.message();
    // SAFETY: the first `count` buffers are initialised and lie in guest memory, which
    // `memory` keeps mapped, and which is only accessed as volatile. The message has
    // neither room for a name nor for control data.
    let len = result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, 0) })?;
    Ok(Received {
        len,
        stopped: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Returns true if a stream socket has been read up to urgent data (TCP) or an out-of-band
/// byte (Unix sockets): a read ends there, although more bytes may follow. Returns false
/// for descriptors that have no such mark.
#[must_use]
pub fn is_at_mark(fd: BorrowedFd<'_>) -> bool {
    let mut at: libc::c_int = 0;
    // SAFETY: the request writes one integer to the given address.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCATMARK, &raw mut at) };
    result == 0 && at != 0
}

/// Sends guest memory to a socket; at most 128 spans in one call. A closed peer is an error
/// (`EPIPE`) without a signal, independent of the process's handling of SIGPIPE. On a
/// socket that preserves message boundaries, the spans are one message.
///
/// # Errors
/// The operating system's error; `EFAULT` for spans outside guest memory, `EMSGSIZE` for a
/// message of more than 128 spans.
pub fn send(memory: &GuestMemory, spans: &[Span], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let buffers = Buffers::new(memory, spans.iter().copied())?;
    let message = buffers.message();
    // SAFETY: as in `receive`.
    result(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
}

/// Reads from `offset` of a file into guest memory, as much as one call returns; with
/// `cached_only`, only bytes that need no wait for a device.
///
/// # Errors
/// The operating system's error: `WouldBlock` if nothing is cached, `EOPNOTSUPP` from file
/// systems without support for `RWF_NOWAIT`; `EFAULT` for spans outside guest memory.
fn pread(
    memory: &GuestMemory,
    window: Window<'_>,
    fd: BorrowedFd<'_>,
    offset: u64,
    cached_only: bool,
) -> io::Result<u32> {
    let buffers = Buffers::new(memory, window.spans())?;
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    let flags = if cached_only { libc::RWF_NOWAIT } else { 0 };
    // SAFETY: as in `receive`.
    let read = result(unsafe {
        let (fd, iov) = (fd.as_raw_fd(), buffers.as_ptr());
        libc::preadv2(fd, iov, buffers.count(), offset, flags)
    })?;
    u32::try_from(read).map_err(io::Error::other)
}

/// Fills `window` with the file's bytes from `offset` on.
///
/// # Errors
/// `UnexpectedEof` if the file ends before the window is full; otherwise the operating
/// system's error, and `EFAULT` for spans outside guest memory.
pub fn read_exact_at(
    memory: &GuestMemory,
    window: Window<'_>,
    fd: BorrowedFd<'_>,
    offset: u64,
) -> io::Result<()> {
    read_all(memory, window, fd, offset, false)
}

/// Like [`read_exact_at`], but never waits for a device; returns `Ok(false)` if it would
/// have to, or if the file system does not support such reads. Some bytes may have been
/// read in that case.
///
/// A read that ends early counts as one that would have to wait: with `RWF_NOWAIT`, Linux
/// 5.9 and 5.10 return 0 before the end of a file if a page is not cached (preadv2(2),
/// BUGS). [`read_exact_at`] distinguishes the two.
///
/// # Errors
/// As [`read_exact_at`], without `UnexpectedEof`.
pub fn read_cached_at(
    memory: &GuestMemory,
    window: Window<'_>,
    fd: BorrowedFd<'_>,
    offset: u64,
) -> io::Result<bool> {
    match read_all(memory, window, fd, offset, true) {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::UnexpectedEof
            ) || error.raw_os_error() == Some(libc::EOPNOTSUPP) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn read_all(
    memory: &GuestMemory,
    mut window: Window<'_>,
    fd: BorrowedFd<'_>,
    mut offset: u64,
    cached_only: bool,
) -> io::Result<()> {
    while !window.is_empty() {
        match pread(memory, window, fd, offset, cached_only) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                window.advance(read);
                offset += u64::from(read);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `window` to a file from `offset` on.
///
/// # Errors
/// The operating system's error; `EFAULT` for spans outside guest memory.
pub fn write_all_at(
    memory: &GuestMemory,
    mut window: Window<'_>,
    fd: BorrowedFd<'_>,
    mut offset: u64,
) -> io::Result<()> {
    while !window.is_empty() {
        match write_at(memory, window, fd, Some(offset))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                window.advance(written);
                offset += u64::from(written);
            }
        }
    }
    Ok(())
}

/// Reads from `offset` of a file into `window` until it is full or the file ends; returns the
/// number of bytes.
///
/// # Errors
/// The operating system's error, if nothing was read; `EFAULT` for spans outside guest
/// memory.
pub fn read_at(
    memory: &GuestMemory,
    mut window: Window<'_>,
    fd: BorrowedFd<'_>,
    mut offset: u64,
) -> io::Result<u32> {
    let mut done = 0;
    while !window.is_empty() {
        match pread(memory, window, fd, offset, false) {
            Ok(0) => break,
            Ok(read) => {
                window.advance(read);
                offset += u64::from(read);
                done += read;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Writes `window` to a file from `offset` on, or to its end if there is none; returns the
/// number of bytes, which is less than all only if the operating system stores no more.
///
/// # Errors
/// The operating system's error, if nothing was written; `EFAULT` for spans outside guest
/// memory.
pub fn write_at(
    memory: &GuestMemory,
    mut window: Window<'_>,
    fd: BorrowedFd<'_>,
    offset: Option<u64>,
) -> io::Result<u32> {
    let mut done = 0;
    while !window.is_empty() {
        let at = offset.map_or(0, |offset| offset.saturating_add(done.into()));
        let flags = if offset.is_none() {
            libc::RWF_APPEND
        } else {
            0
        };
        match pwrite(memory, window, fd, at, flags) {
            Ok(0) => break,
            Ok(written) => {
                window.advance(written);
                done += written;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Writes to `offset` of a file, as much as one call stores.
fn pwrite(
    memory: &GuestMemory,
    window: Window<'_>,
    fd: BorrowedFd<'_>,
    offset: u64,
    flags: libc::c_int,
) -> io::Result<u32> {
    let buffers = Buffers::new(memory, window.spans())?;
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: as in `receive`.
    let written = result(unsafe {
        let (fd, iov) = (fd.as_raw_fd(), buffers.as_ptr());
        libc::pwritev2(fd, iov, buffers.count(), offset, flags)
    })?;
    u32::try_from(written).map_err(io::Error::other)
}

/// Removes the first `count` bytes of `spans`, in place.
pub fn advance(spans: &mut Vec<Span>, count: usize) {
    let mut left = count;
    let mut done = 0;
    for span in spans.iter_mut() {
        let len = span.len as usize;
        if left < len {
            // `left` is less than a u32.
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

#[cfg(test)]
mod tests;
