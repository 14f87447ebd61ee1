//! A connection with framing for a poll loop.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use sm_guest_proto::frame::{self, FrameDecoder, FrameType, payload_limit};

/// Limit of unsent bytes above which a connection accepts no more bulk data and its
/// source has to wait.
pub(crate) const HIGH_WATER: usize = 256 * 1024;

const READ_SIZE: usize = 64 * 1024;

/// A non-blocking stream with framing.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: UnixStream,
    pub(crate) decoder: FrameDecoder,
    output: SendBuffer,
    ended: bool,
}

/// Bytes that the socket has not taken yet.
#[derive(Debug, Default)]
struct SendBuffer {
    bytes: Vec<u8>,
    sent: usize,
    /// The kernel lacked memory at the last attempt.
    starved: bool,
}

/// Size of the pieces that are sent where the kernel lacked memory for a larger one, in
/// bytes.
const SMALL: usize = 4096;

impl Conn {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            decoder: FrameDecoder::with_limits(payload_limit),
            output: SendBuffer::default(),
            ended: false,
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Returns true if the peer has closed its sending direction.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Reads all available bytes, for a peer that will send no more.
    pub(crate) fn read_available(&mut self) {
        while self.read_some() > 0 {}
    }

    /// Reads once; complete frames are then in [`Self::decoder`].
    ///
    /// One read per wake-up bounds memory and is fair between connections: the caller
    /// does not poll for input while the consumer of the frames is behind.
    pub(crate) fn read(&mut self) {
        self.read_some();
    }

    fn read_some(&mut self) -> usize {
        if self.ended {
            return 0;
        }
        let mut buffer = [0; READ_SIZE];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.ended = true,
            Ok(count) => {
                self.decoder.push(buffer.get(..count).unwrap_or_default());
                return count;
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                _ => self.ended = true,
            },
        }
        0
    }

    /// Queues a frame. Payloads come from a decoder or are small, so they never exceed
    /// the maximum of a frame.
    pub(crate) fn queue(&mut self, kind: FrameType, payload: &[u8]) {
        if let Err(error) = frame::encode(kind, payload, &mut self.output.bytes) {
            tracing::error!(%error, "dropped a frame");
        }
    }

    /// Queues a JSON message.
    pub(crate) fn queue_json(&mut self, kind: FrameType, message: &impl Serialize) {
        match serde_json::to_vec(message) {
            Ok(json) => self.queue(kind, &json),
            Err(error) => tracing::error!(%error, "cannot encode a message"),
        }
    }

    pub(crate) fn unsent(&self) -> usize {
        self.output.bytes.len() - self.output.sent
    }

    pub(crate) fn is_full(&self) -> bool {
        self.unsent() >= HIGH_WATER
    }

    /// Returns true if the kernel lacked memory for the next bytes. The socket counts as
    /// writable then, so [`Self::flush`] is to be called again after a while.
    pub(crate) fn is_starved(&self) -> bool {
        self.output.starved
    }

    /// Returns true if [`Self::flush`] can send more as soon as the socket is writable.
    pub(crate) fn has_sendable(&self) -> bool {
        self.unsent() > 0 && !self.is_starved()
    }

    /// Writes as many bytes as the peer accepts.
    ///
    /// # Errors
    /// The peer has disconnected.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let mut stream = &self.stream;
        self.output.flush(|bytes| {
            #[cfg(any(test, feature = "testing"))]
            shortage::check()?;
            stream.write(bytes)
        })
    }
}

impl SendBuffer {
    fn flush(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        let mut most = usize::MAX;
        self.starved = false;
        while let Some(rest) = self.bytes.get(self.sent..)
            && !rest.is_empty()
        {
            let piece = rest.get(..most).unwrap_or(rest);
            match write(piece) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.compact();
                    return Ok(());
                }
                // For the moment: no reason to hang up on the peer.
                Err(error) if lacks_memory(&error) => {
                    if piece.len() > SMALL {
                        most = SMALL;
                        continue;
                    }
                    self.starved = true;
                    self.compact();
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(())
    }

    /// Bounds the memory that is used besides the unsent bytes.
    fn compact(&mut self) {
        if self.sent >= HIGH_WATER {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

fn lacks_memory(error: &io::Error) -> bool {
    let errno = rustix::io::Errno::from_io_error(error);
    matches!(
        errno,
        Some(rustix::io::Errno::NOMEM | rustix::io::Errno::NOBUFS)
    )
}

/// Lets sends of the current thread fail for want of memory.
#[cfg(any(test, feature = "testing"))]
pub(crate) mod shortage {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static FAILING: Cell<u32> = const { Cell::new(0) };
    }

    /// Refuses the next `count` sends of this thread.
    pub(crate) fn begin(count: u32) {
        FAILING.set(count);
    }

    pub(super) fn check() -> io::Result<()> {
        match FAILING.get() {
            0 => Ok(()),
            left => {
                FAILING.set(left - 1);
                Err(rustix::io::Errno::NOBUFS.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_memory_is_no_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut conn = Conn::new(ours).unwrap();
        conn.queue(FrameType::Stdout, &[7; 10_000]);
        // A large piece and a small one are refused.
        shortage::begin(2);
        conn.flush().unwrap();
        assert!(conn.is_starved() && !conn.has_sendable());
        assert_eq!(conn.unsent(), 10_005);
        conn.flush().unwrap();
        assert!(!conn.is_starved());
        assert_eq!(conn.unsent(), 0);
        let mut bytes = vec![0; 10_005];
        theirs.read_exact(&mut bytes).unwrap();
        assert!(bytes[5..] == [7; 10_000]);
        drop(theirs);
        conn.queue(FrameType::Stdout, b"x");
        assert!(conn.flush().is_err());
    }

    #[test]
    fn a_large_piece_that_is_refused_is_sent_in_small_ones() {
        let mut output = SendBuffer {
            bytes: vec![7; 10_000],
            ..SendBuffer::default()
        };
        let mut sizes = Vec::new();
        output
            .flush(|piece| {
                sizes.push(piece.len());
                match piece.len() {
                    ..=SMALL => Ok(piece.len()),
                    _ => Err(rustix::io::Errno::NOMEM.into()),
                }
            })
            .unwrap();
        assert_eq!(sizes, [10_000, SMALL, SMALL, 10_000 - 2 * SMALL]);
    }
}
