//! A partially received handoff: `[u32 BE length][payload]` and a descriptor.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::sockopt::socket_type;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketType, recvmsg,
};

use super::{HEADER, MAX_PAYLOAD};

/// Most bytes per read.
const CHUNK: usize = 64 << 10;

/// A partially received handoff.
#[derive(Debug, Default)]
pub(crate) struct HandoffMessage {
    header: [u8; HEADER],
    /// Bytes of the header received so far.
    read: usize,
    length: usize,
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// Returns the error of a protocol violation.
pub(crate) fn broken(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl HandoffMessage {
    /// Returns true if at least one byte was received.
    pub(crate) fn has_begun(&self) -> bool {
        self.read > 0
    }

    /// Returns the socket and the payload of a complete handoff.
    ///
    /// # Errors
    /// No socket was attached.
    pub(crate) fn into_parts(self) -> io::Result<(OwnedFd, Vec<u8>)> {
        let fd = self.fd.ok_or_else(|| broken("no descriptor is attached"))?;
        Ok((fd, self.payload))
    }

    /// Reads from a router. Returns true if the handoff is complete.
    ///
    /// # Errors
    /// `WouldBlock` when no bytes are available, `UnexpectedEof` when the router closed
    /// its connection after a complete handoff, `InvalidData` for protocol violations.
    pub(crate) fn read_from(&mut self, router: impl AsFd) -> io::Result<bool> {
        // Reads never cross the end of a handoff: descriptors arrive with their bytes.
        if self.read < HEADER {
            let mut header = self.header;
            let rest = header.get_mut(self.read..).unwrap_or_default();
            let count = self.receive(router, rest)?;
            self.header = header;
            self.read += count;
            if self.read == HEADER {
                self.length =
                    usize::try_from(u32::from_be_bytes(self.header)).unwrap_or(usize::MAX);
                if !(1..=MAX_PAYLOAD).contains(&self.length) {
                    return Err(broken("the length is not from 1 to 1 MiB"));
                }
            }
            return Ok(false);
        }
        let mut chunk = [0; CHUNK];
        let most = (self.length - self.payload.len()).min(CHUNK);
        let buffer = chunk.get_mut(..most).unwrap_or_default();
        let count = self.receive(router, buffer)?;
        self.payload
            .extend_from_slice(chunk.get(..count).unwrap_or_default());
        Ok(self.payload.len() == self.length)
    }

    fn receive(&mut self, router: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
        // Space for one descriptor more than is allowed, to detect a second one.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            router,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        // From here on, the received descriptors are owned, and closed on errors.
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > 1 {
            return Err(broken("more than one descriptor is attached at once"));
        }
        if let Some(fd) = fds.pop() {
            if self.fd.is_some() {
                return Err(broken("two descriptors are attached to one payload"));
            }
            if socket_type(&fd).ok() != Some(SocketType::STREAM) {
                return Err(broken("the descriptor is not a stream socket"));
            }
            self.fd = Some(fd);
        }
        match received.bytes {
            0 if self.read == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            0 => Err(broken("the router closed its connection within a handoff")),
            count => Ok(count),
        }
    }
}
