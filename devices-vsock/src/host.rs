//! A host socket for the muxer: never blocks, never raises a signal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_socket_oobinline, set_socket_send_buffer_size, socket_domain, socket_passcred, socket_type,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketType, shutdown,
};
use sm_virtio::GuestMemory;
use sm_virtio::iov;
use sm_virtio::queue::Span;

use crate::handle::SocketKind;

/// Result of reading or writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// This number of bytes.
    Bytes(u32),
    /// Nothing now; an event will follow.
    Nothing,
    /// Nothing now, because the system lacks memory. No event reports available memory, so
    /// the caller must retry.
    Retry,
    /// Permanently nothing: the end of the stream, or a peer that does not read.
    Ended,
    /// Permanently nothing in both directions: the socket is broken.
    Broken,
}

#[derive(Debug)]
pub(crate) struct HostSocket {
    fd: OwnedFd,
    pub(crate) kind: SocketKind,
    /// True if a short read has taken all available bytes, unless it stopped at ancillary
    /// data or at a mark (urgent data). Not known for a Unix socket that receives its
    /// peer's credentials.
    short_is_all: bool,
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl HostSocket {
    /// Prepares a socket of the host for use.
    ///
    /// # Errors
    /// The descriptor is not a socket, or is a socket of another type.
    pub(crate) fn new(fd: OwnedFd, largest_message: u32) -> io::Result<Self> {
        let kind = match socket_type(&fd)? {
            SocketType::STREAM => SocketKind::Stream,
            SocketType::SEQPACKET => SocketKind::SeqPacket,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        rustix::io::ioctl_fionbio(&fd, true)?;
        let short_is_all = match socket_domain(&fd)? {
            AddressFamily::INET | AddressFamily::INET6 => true,
            AddressFamily::UNIX => !socket_passcred(&fd)?,
            _ => false,
        };
        if kind == SocketKind::Stream {
            // Virtio sockets have no urgent data: such a byte stays in the stream. Sockets
            // without urgent data refuse the option.
            let _ = set_socket_oobinline(&fd, true);
        }
        if kind == SocketKind::SeqPacket {
            // The kernel doubles it. A message that does not fit is refused later.
            let _ = set_socket_send_buffer_size(&fd, largest_message as usize);
        }
        Ok(Self {
            fd,
            kind,
            short_is_all,
        })
    }

    /// Reads into guest memory that has room for `room` bytes; also returns true if there
    /// may be more.
    pub(crate) fn read(&self, memory: &GuestMemory, spans: &[Span], room: u32) -> (Moved, bool) {
        loop {
            let moved = match iov::receive(memory, spans, self.fd.as_fd()) {
                Ok(received) if received.len == 0 => Moved::Ended,
                Ok(received) => {
                    // At most the length of the spans, which is less than a u32.
                    let len = u32::try_from(received.len).unwrap_or(0);
                    let more = len >= room
                        || received.stopped
                        || !self.short_is_all
                        || iov::is_at_mark(self.fd.as_fd());
                    return (Moved::Bytes(len), more);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Moved::Nothing,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if lacks_memory(Errno::from_io_error(&error)) => Moved::Retry,
                // Permanent (ECONNRESET and others).
                Err(_) => Moved::Broken,
            };
            return (moved, false);
        }
    }

    /// Reads the next message; `Bytes` is its length, which may exceed `room`.
    pub(crate) fn read_message(&self, room: &mut [u8]) -> Moved {
        loop {
            match rustix::net::recv(&self.fd, &mut *room, RecvFlags::TRUNC) {
                // The end, or a message without bytes.
                Ok((_, 0)) if self.has(PollFlags::RDHUP | PollFlags::HUP) => return Moved::Ended,
                Ok((_, len)) => return Moved::Bytes(u32::try_from(len).unwrap_or(u32::MAX)),
                Err(Errno::AGAIN) => return Moved::Nothing,
                Err(Errno::INTR) => {}
                Err(error) if lacks_memory(Some(error)) => return Moved::Retry,
                Err(_) => return Moved::Broken,
            }
        }
    }

    /// Writes guest memory.
    pub(crate) fn write(&self, memory: &GuestMemory, spans: &[Span]) -> Moved {
        loop {
            match iov::send(memory, spans, self.fd.as_fd()) {
                Ok(len) => return Moved::Bytes(u32::try_from(len).unwrap_or(0)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Moved::Nothing,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if lacks_memory(Errno::from_io_error(&error)) => return Moved::Retry,
                Err(error) => {
                    return broken(error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()));
                }
            }
        }
    }

    /// Writes stored bytes.
    pub(crate) fn write_stored(&self, slices: &[io::IoSlice<'_>]) -> Moved {
        loop {
            let mut control = SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&self.fd, slices, &mut control, SendFlags::NOSIGNAL) {
                Ok(len) => return Moved::Bytes(u32::try_from(len).unwrap_or(0)),
                Err(Errno::AGAIN) => return Moved::Nothing,
                Err(Errno::INTR) => {}
                Err(error) if lacks_memory(Some(error)) => return Moved::Retry,
                Err(error) => return broken(error == Errno::MSGSIZE),
            }
        }
    }

    fn has(&self, flags: PollFlags) -> bool {
        let mut polled = [PollFd::new(&self.fd, flags)];
        let polling = poll(&mut polled, Some(&Timespec::default()));
        polling.is_ok() && polled.iter().any(|fd| fd.revents().intersects(flags))
    }

    /// Returns true if the peer neither sends nor reads any more. A TCP peer that is gone
    /// looks like one that only stopped sending, until it sends a reset.
    pub(crate) fn is_gone(&self) -> bool {
        self.has(PollFlags::HUP | PollFlags::ERR)
    }

    /// Returns true if there are bytes to read.
    pub(crate) fn has_bytes(&self) -> bool {
        rustix::io::ioctl_fionread(&self.fd).is_ok_and(|count| count > 0)
    }

    pub(crate) fn shut_down(&self, how: Shutdown) {
        // Fails if the peer is gone; the effect is the same.
        let _ = shutdown(&self.fd, how);
    }
}

/// Returns true if a call failed for lack of memory, which is temporary.
fn lacks_memory(error: Option<Errno>) -> bool {
    matches!(error, Some(Errno::NOBUFS | Errno::NOMEM))
}

/// Classifies an error of writing: a message that is too large is not an end of the stream.
fn broken(too_large: bool) -> Moved {
    if too_large {
        Moved::Broken
    } else {
        Moved::Ended
    }
}
