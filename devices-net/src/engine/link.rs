//! The link between guest and engine: a virtio-net device, or a TAP.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
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
        // Empty descriptors take no room.
        let mut pieces = window.spans().filter(|span| span.len > 0);
        for (slot, span) in spans.iter_mut().zip(pieces.by_ref()) {
            *slot = span;
            count += 1;
        }
        if pieces.next().is_some() {
            // More pieces than any driver uses. A datagram has to be sent in one call.
            let mut bytes = vec![0; window.len() as usize];
            if !window.copy_out(self.memory, &mut bytes) {
                return Err(Errno::FAULT.into());
            }
            return bytes.as_slice().send(0, bytes.len(), socket);
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixDatagram;

    use sm_virtio::GuestMemory;
    use sm_virtio::iov::Window;
    use vm_memory::Bytes as _;

    use super::*;

    /// A ring has twice as many descriptors as one call takes.
    #[test]
    fn a_frame_in_many_descriptors_is_sent_in_one_piece() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(1000).collect();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let piece = |start: usize, len: usize| Span {
            address: GuestAddress(start as u64),
            len: u32::try_from(len).unwrap(),
        };
        let mut empty = vec![piece(0, 100)];
        empty.extend([NO_SPAN; MAX_SPANS]);
        empty.push(piece(100, 900));
        let small = (0..250).map(|number| piece(4 * number, 4)).collect();
        for spans in [empty, small] {
            let frame = NetFrame {
                header: NetHeader::default(),
                bytes: Window::new(&spans, 0, u32::MAX),
                memory: &memory,
            };
            assert_eq!(frame.len(), bytes.len());
            let (near, far) = UnixDatagram::pair().unwrap();
            let sent = frame.send(10, 900, near.as_fd());
            assert_eq!(sent.unwrap(), 900);
            let mut received = [0; 1000];
            assert_eq!(far.recv(&mut received).unwrap(), 900);
            assert!(received[..900] == bytes[10..910]);
        }
    }
}
