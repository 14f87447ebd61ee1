//! The router's side of handoffs.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::geteuid;

use super::MAX_PAYLOAD;

/// A router's connection to a handoff socket.
///
/// The VM disconnects routers that have been idle for a while when others wait: call
/// [`Self::connect`] again when [`Self::send`] fails.
#[derive(Debug)]
pub struct HandoffSender {
    stream: UnixStream,
    /// True after a handoff was sent partially: the VM would take further bytes for the
    /// rest of its payload.
    broken_off: bool,
}

impl HandoffSender {
    /// Connects to the handoff socket of a VM of this process's user, or of root. Another
    /// user's process gets no clients, although it may listen at `path` before the VM does.
    ///
    /// # Errors
    /// No VM listens on `path`, or another user's process does (`PermissionDenied`).
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::connect_to_user(path, geteuid().as_raw())
    }

    /// Connects to the handoff socket of a VM of the user with the ID `user`, or of root:
    /// for a router that runs as root.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_to_user(path: &Path, user: u32) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        // The credentials are those of the process at the time when it began to listen.
        let listener = socket_peercred(&stream)?.uid;
        if listener.as_raw() != user && !listener.is_root() {
            let text = format!("a process of user {} listens there", listener.as_raw());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(Self::from(stream))
    }

    /// Returns true if no more handoffs can be sent, because one was sent partially.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken_off
    }

    /// Hands over a stream socket, with the 1 to [`MAX_PAYLOAD`] bytes that were already
    /// read from it. Blocks while the VM is busy, unless this sender was created from a
    /// stream that is non-blocking or has a timeout.
    ///
    /// The caller's descriptor stays open: drop it after this call. The socket becomes
    /// non-blocking, which is a property of the open file description that both share.
    ///
    /// # Errors
    /// The length of the payload is out of range, or the VM is gone. If some bytes had
    /// been sent ([`Self::is_broken`]), the VM receives neither this socket nor anything
    /// more from this sender; create another.
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

    /// Sends bytes, with a descriptor attached to the first of them.
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
                    // Reset when the handoff was sent completely.
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
    /// Creates a sender from a connected stream.
    fn from(stream: UnixStream) -> Self {
        Self {
            stream,
            broken_off: false,
        }
    }
}
