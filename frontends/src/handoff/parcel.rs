//! One handoff on its way: `[u32 BE length][payload]` and a descriptor.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::sockopt::socket_type;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketType, recvmsg,
};

use super::{HEADER, MAX_PAYLOAD};

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// One handoff on its way.
#[derive(Debug, Default)]
pub(crate) struct Parcel {
    header: [u8; HEADER],
    /// Bytes of the header that are there.
    read: usize,
    length: usize,
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// Why a router is hung up on.
pub(crate) fn broken(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl Parcel {
    /// Whether some of it is there.
    pub(crate) fn has_begun(&self) -> bool {
        self.read > 0
    }

    /// The socket and the payload, once it is complete.
    ///
    /// # Errors
    /// No socket came.
    pub(crate) fn open(self) -> io::Result<(OwnedFd, Vec<u8>)> {
        let fd = self.fd.ok_or_else(|| broken("no descriptor came"))?;
        Ok((fd, self.payload))
    }

    /// Reads some of it from a router. `true` when it is complete.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing now, `UnexpectedEof` when the router has
    /// hung up after its last one, `InvalidData` when it breaks the rules.
    pub(crate) fn read_from(&mut self, router: impl AsFd) -> io::Result<bool> {
        // Exactly what belongs to this handoff: descriptors come with their bytes.
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
        let place = chunk.get_mut(..most).unwrap_or_default();
        let count = self.receive(router, place)?;
        self.payload
            .extend_from_slice(chunk.get(..count).unwrap_or_default());
        Ok(self.payload.len() == self.length)
    }

    fn receive(&mut self, router: impl AsFd, place: &mut [u8]) -> io::Result<usize> {
        // Room for one more than is allowed, so that two are seen.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            router,
            &mut [IoSliceMut::new(place)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        // Whatever came is owned from here on, and closed if it is not wanted.
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > 1 {
            return Err(broken("more than one descriptor came at once"));
        }
        if let Some(fd) = fds.pop() {
            if self.fd.is_some() {
                return Err(broken("two descriptors came with one payload"));
            }
            if socket_type(&fd).ok() != Some(SocketType::STREAM) {
                return Err(broken("the descriptor is not a stream socket"));
            }
            self.fd = Some(fd);
        }
        match received.bytes {
            0 if self.read == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            0 => Err(broken("it hung up in the middle of a handoff")),
            count => Ok(count),
        }
    }
}
