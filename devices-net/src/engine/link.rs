//! The link between guest and engine: a virtio-net device, or a TAP.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::net::SendFlags;
use sm_virtio::iov::{self, MAX_SPANS};
use sm_virtio::queue::Span;
use vm_memory::GuestAddress;

use crate::backend::NetFrame;
use crate::header::NetHeader;
use crate::receive::{ReceiveRing, ReserveError};

/// A frame of the guest, without its virtio-net header.
///
/// The guest may change its memory meanwhile: the engine copies headers out once, and judges
/// the copy.
pub trait GuestFrame {
    /// Length in bytes.
    fn len(&self) -> usize;

    /// Returns true if there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the bytes from `offset` on; returns false if there are too few of them to fill
    /// `bytes`.
    #[must_use]
    fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> bool;

    /// Sends `len` bytes from `offset` on to a socket, without a copy on the way; returns how
    /// many of them it took.
    ///
    /// # Errors
    /// The operating system's, which is never `EINTR`.
    fn send(&self, offset: usize, len: usize, socket: BorrowedFd<'_>) -> io::Result<usize>;
}

impl GuestFrame for &[u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> bool {
        let from = self.get(offset..).and_then(|rest| rest.get(..bytes.len()));
        from.is_some_and(|from| {
            bytes.copy_from_slice(from);
            true
        })
    }

    fn send(&self, offset: usize, len: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let bytes = self.get(offset..).and_then(|rest| rest.get(..len));
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        let send = || rustix::net::send(socket, bytes, SendFlags::NOSIGNAL);
        Ok(rustix::io::retry_on_intr(send)?)
    }
}

impl GuestFrame for NetFrame<'_> {
    fn len(&self) -> usize {
        self.bytes.len() as usize
    }

    fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> bool {
        let mut window = self.bytes;
        let (Ok(skip), Ok(len)) = (u32::try_from(offset), u32::try_from(bytes.len())) else {
            return false;
        };
        window.advance(skip);
        window.take(len).copy_out(self.memory, bytes)
    }

    fn send(&self, offset: usize, len: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut window = self.bytes;
        window.advance(u32::try_from(offset).unwrap_or(u32::MAX));
        let window = window.take(u32::try_from(len).unwrap_or(u32::MAX));
        let mut spans = [NO_SPAN; MAX_SPANS];
        let mut count = 0;
        for (slot, span) in spans.iter_mut().zip(window.spans()) {
            *slot = span;
            count += 1;
        }
        loop {
            match iov::send(self.memory, &spans[..count], socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

const NO_SPAN: Span = Span {
    address: GuestAddress(0),
    len: 0,
};

/// Features of the guest's side of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkOffloads {
    /// It completes checksums of frames that it receives.
    pub checksum: bool,
    /// It accepts TCP segments of IPv4 that are larger than a packet.
    pub tso_v4: bool,
    /// It accepts TCP segments of IPv6 that are larger than a packet.
    pub tso_v6: bool,
}

impl LinkOffloads {
    /// All of them.
    pub const ALL: Self = Self {
        checksum: true,
        tso_v4: true,
        tso_v6: true,
    };
    /// None of them.
    pub const NONE: Self = Self {
        checksum: false,
        tso_v4: false,
        tso_v6: false,
    };
}

/// The link has no room for a frame now. [`NetEngine::serve`](super::NetEngine::serve) is to be
/// called when it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkFull;

/// The way to the guest.
pub trait GuestLink {
    /// Features of the guest's side.
    fn offloads(&self) -> LinkOffloads;

    /// Sends one frame, whose parts are `frame`.
    ///
    /// # Errors
    /// There is no room; nothing was sent.
    fn transmit(&mut self, header: &NetHeader, frame: &[IoSlice<'_>]) -> Result<(), LinkFull>;
}

/// The receive buffers of a device as a link.
pub(crate) struct RingLink<'r, 'a> {
    pub(crate) ring: &'r mut ReceiveRing<'a>,
    pub(crate) offloads: LinkOffloads,
}

impl GuestLink for RingLink<'_, '_> {
    fn offloads(&self) -> LinkOffloads {
        self.offloads
    }

    fn transmit(&mut self, header: &NetHeader, frame: &[IoSlice<'_>]) -> Result<(), LinkFull> {
        let len: usize = frame.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len).map_err(|_| LinkFull)?;
        let memory = self.ring.memory();
        let buffers = match self.ring.reserve(len) {
            Ok(buffers) => buffers,
            // The driver will never have room for it, as if its queue had dropped the frame.
            Err(ReserveError::TooLong) => return Ok(()),
            Err(_) => return Err(LinkFull),
        };
        let mut window = buffers.window();
        for part in frame {
            let now = u32::try_from(part.len()).map_err(|_| LinkFull)?;
            // The buffers were checked to be in guest memory when they were taken; a window
            // that is not leaves the frame as it is.
            let _ = window.take(now).copy_in(memory, part);
            window.advance(now);
        }
        buffers.deliver(header, len);
        Ok(())
    }
}
