//! The bytes of one request and the space for its reply, wherever a transport has them.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use rustix::io::ReadWriteFlags;

/// Position of a write in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WritePosition {
    /// Bytes from the start of the file.
    At(u64),
    /// The end of the file at the time of the write.
    End,
}

/// One request, and the space that its driver has left for the reply.
///
/// The bytes of a request may change while they are read, if the driver is a guest: the
/// server copies what it decides on. Contents of files are not copied: [`Self::read_file`]
/// and [`Self::write_file`] move them between a file and the buffers of the transport.
pub trait Buffers {
    /// Returns the length of the request in bytes, its header included.
    fn request_len(&self) -> usize;

    /// Returns the maximum length of the reply in bytes, its header included.
    fn reply_capacity(&self) -> usize;

    /// Fills `bytes` with the request's bytes from `offset` on; returns false if there are
    /// too few.
    #[must_use]
    fn read_request(&self, offset: usize, bytes: &mut [u8]) -> bool;

    /// Stores `bytes` in the reply at `offset`; returns false if there is no space.
    #[must_use]
    fn write_reply(&mut self, offset: usize, bytes: &[u8]) -> bool;

    /// Reads up to `len` bytes of `file` from `position` on into the reply at `offset`;
    /// returns their number, which is less only at the end of the file.
    ///
    /// # Errors
    /// The operating system's error, of which only the number is used; `EFAULT` if there is
    /// no space.
    fn read_file(
        &mut self,
        file: BorrowedFd<'_>,
        position: u64,
        offset: usize,
        len: usize,
    ) -> io::Result<usize>;

    /// Writes `len` bytes of the request from `offset` on to `file`; returns their number,
    /// which is less only if the operating system stores no more.
    ///
    /// # Errors
    /// The operating system's error if nothing was written, of which only the number is
    /// used; `EFAULT` if the request has too few bytes.
    fn write_file(
        &self,
        file: BorrowedFd<'_>,
        position: WritePosition,
        offset: usize,
        len: usize,
    ) -> io::Result<usize>;
}

/// A request and the space for its reply in memory of this process.
#[derive(Debug)]
pub struct SliceBuffers<'a> {
    request: &'a [u8],
    reply: &'a mut [u8],
}

impl<'a> SliceBuffers<'a> {
    /// Creates buffers of a request and of the space for its reply.
    #[must_use]
    pub fn new(request: &'a [u8], reply: &'a mut [u8]) -> Self {
        Self { request, reply }
    }
}

/// Returns the range of `len` bytes at `offset`.
fn range(offset: usize, len: usize) -> Option<std::ops::Range<usize>> {
    Some(offset..offset.checked_add(len)?)
}

fn fault() -> io::Error {
    rustix::io::Errno::FAULT.into()
}

impl Buffers for SliceBuffers<'_> {
    fn request_len(&self) -> usize {
        self.request.len()
    }

    fn reply_capacity(&self) -> usize {
        self.reply.len()
    }

    fn read_request(&self, offset: usize, bytes: &mut [u8]) -> bool {
        let from = range(offset, bytes.len()).and_then(|range| self.request.get(range));
        from.inspect(|from| bytes.copy_from_slice(from)).is_some()
    }

    fn write_reply(&mut self, offset: usize, bytes: &[u8]) -> bool {
        let to = range(offset, bytes.len()).and_then(|range| self.reply.get_mut(range));
        to.map(|to| to.copy_from_slice(bytes)).is_some()
    }

    fn read_file(
        &mut self,
        file: BorrowedFd<'_>,
        position: u64,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let to = range(offset, len).and_then(|range| self.reply.get_mut(range));
        let to = to.ok_or_else(fault)?;
        let mut done = 0;
        while done < to.len() {
            let at = position.saturating_add(done as u64);
            let mut buffers = [IoSliceMut::new(&mut to[done..])];
            match rustix::io::preadv(file, &mut buffers, at) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    fn write_file(
        &self,
        file: BorrowedFd<'_>,
        position: WritePosition,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let from = range(offset, len).and_then(|range| self.request.get(range));
        let from = from.ok_or_else(fault)?;
        let mut done = 0;
        while done < from.len() {
            let (at, flags) = match position {
                WritePosition::At(at) => (at.saturating_add(done as u64), ReadWriteFlags::empty()),
                WritePosition::End => (0, ReadWriteFlags::APPEND),
            };
            let buffers = [IoSlice::new(&from[done..])];
            match rustix::io::pwritev2(file, &buffers, at, flags) {
                Ok(0) => break,
                Ok(written) => done += written,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) if done > 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn bytes_beyond_either_buffer_are_refused() {
        let mut reply = [0; 4];
        let mut buffers = SliceBuffers::new(b"request", &mut reply);
        let mut bytes = [0; 3];
        assert!(buffers.read_request(4, &mut bytes));
        assert_eq!(&bytes, b"est");
        assert!(!buffers.read_request(5, &mut bytes));
        assert!(!buffers.read_request(usize::MAX, &mut bytes));
        assert!(buffers.write_reply(2, b"xy"));
        assert!(!buffers.write_reply(3, b"xy"));
        assert!(!buffers.write_reply(usize::MAX, b"xy"));

        let file = tempfile::tempfile().unwrap();
        let short = buffers.write_file(file.as_fd(), WritePosition::At(0), 5, 3);
        assert_eq!(short.unwrap_err().raw_os_error(), Some(14));
        let short = buffers.read_file(file.as_fd(), 0, 1, 4);
        assert_eq!(short.unwrap_err().raw_os_error(), Some(14));
    }

    #[test]
    fn contents_move_between_file_and_buffers() {
        let file = tempfile::tempfile().unwrap();
        let mut reply = [0; 12];
        let mut buffers = SliceBuffers::new(b"request", &mut reply);
        let at = |position| buffers.write_file(file.as_fd(), position, 0, 7);
        assert_eq!(at(WritePosition::At(0)).unwrap(), 7);
        assert_eq!(at(WritePosition::End).unwrap(), 7);
        assert_eq!(buffers.read_file(file.as_fd(), 5, 2, 10).unwrap(), 9);
        assert_eq!(&reply, b"\0\0strequest\0");
    }
}
