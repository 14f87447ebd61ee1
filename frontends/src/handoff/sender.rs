//! The router's side of handing connections over.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::MAX_PAYLOAD;

/// A router's connection to a handoff socket.
///
/// The VM hangs up on routers that have been silent for a while when others wait:
/// [`Self::connect`] again when [`Self::send`] says so.
#[derive(Debug)]
pub struct HandoffSender {
    stream: UnixStream,
    /// A handoff broke off in the middle: what would follow is taken for the rest
    /// of it.
    broken_off: bool,
}

impl HandoffSender {
    /// Connects to a VM's handoff socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).map(Self::from)
    }

    /// Whether nothing can be sent any more, because a handoff broke off in the
    /// middle.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken_off
    }

    /// Hands a stream socket over, with the 1 to [`MAX_PAYLOAD`] bytes that were
    /// read from it already. Waits while the VM is busy, unless the connection was
    /// made from a stream that does not block or has a timeout.
    ///
    /// The socket stays open here, too: drop it once this has returned. It does
    /// not block any more, as that is a property of the connection.
    ///
    /// # Errors
    /// The payload's length is not that, or the VM is gone. When some bytes had
    /// been sent before ([`Self::is_broken`]), the VM gets neither this socket nor
    /// anything more from this sender; make another.
    pub fn send(&mut self, socket: impl AsFd, payload: &[u8]) -> io::Result<()> {
        if self.broken_off {
            return Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "an earlier handoff broke off in the middle: connect again",
            ));
        }
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if !(1..=MAX_PAYLOAD).contains(&payload.len()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a payload has 1 byte to 1 MiB",
            ));
        }
        self.send_all(&length.to_be_bytes(), None)?;
        self.send_all(payload, Some(socket.as_fd()))?;
        self.broken_off = false;
        Ok(())
    }

    /// Sends bytes, the first of them with a descriptor.
    fn send_all(&mut self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds: &[_] = fd.as_slice();
            if sent == 0 && !fds.is_empty() {
                let rights = SendAncillaryMessage::ScmRights(fds);
                if !control.push(rights) {
                    return Err(io::Error::other("no room for a file descriptor"));
                }
            }
            let rest = IoSlice::new(bytes.get(sent..).unwrap_or_default());
            match sendmsg(&self.stream, &[rest], &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    sent += count;
                    // Until all of the handoff is sent.
                    self.broken_off = true;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl From<UnixStream> for HandoffSender {
    /// A connection that was made already.
    fn from(stream: UnixStream) -> Self {
        Self {
            stream,
            broken_off: false,
        }
    }
}
