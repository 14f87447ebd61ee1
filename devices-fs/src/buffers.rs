//! The buffers of a descriptor chain as those of a FUSE request: the server reads what the
//! device may read, and writes what it may write.

use std::io;
use std::os::fd::BorrowedFd;

use sm_fs_server::{Buffers, WritePosition};
use sm_virtio::GuestMemory;
use sm_virtio::iov::{self, Window};
use sm_virtio::queue::{DescriptorChain, Span};

/// A chain in guest memory.
pub(crate) struct ChainBuffers<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) chain: &'a DescriptorChain,
}

/// Returns the bytes `offset..offset + len` of `spans`, if all of them exist.
fn window(spans: &[Span], offset: usize, len: usize) -> Option<Window<'_>> {
    let (offset, len) = (u32::try_from(offset).ok()?, u32::try_from(len).ok()?);
    let window = Window::new(spans, offset, len);
    (window.len() == len).then_some(window)
}

/// `EFAULT`, as for an address that does not exist.
fn fault() -> io::Error {
    io::Error::from_raw_os_error(14)
}

/// Returns a number of bytes. `usize` has at least 32 bits on the hosts of this crate.
fn count(bytes: u32) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Buffers for ChainBuffers<'_> {
    fn request_len(&self) -> usize {
        count(self.chain.readable_len())
    }

    fn reply_capacity(&self) -> usize {
        count(self.chain.writable_len())
    }

    fn read_request(&self, offset: usize, bytes: &mut [u8]) -> bool {
        window(&self.chain.readable, offset, bytes.len())
            .is_some_and(|window| window.copy_out(self.memory, bytes))
    }

    fn write_reply(&mut self, offset: usize, bytes: &[u8]) -> bool {
        window(&self.chain.writable, offset, bytes.len())
            .is_some_and(|window| window.copy_in(self.memory, bytes))
    }

    fn read_file(
        &mut self,
        file: BorrowedFd<'_>,
        position: u64,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let window = window(&self.chain.writable, offset, len).ok_or_else(fault)?;
        iov::read_at(self.memory, window, file, position).map(count)
    }

    fn write_file(
        &self,
        file: BorrowedFd<'_>,
        position: WritePosition,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        let window = window(&self.chain.readable, offset, len).ok_or_else(fault)?;
        let position = match position {
            WritePosition::At(at) => Some(at),
            WritePosition::End => None,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        iov::write_at(self.memory, window, file, position).map(count)
    }
}
