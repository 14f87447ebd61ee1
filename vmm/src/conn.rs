//! A framed connection in a poll loop: bytes in, frames out, and the reverse.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use sm_guest_proto::frame::{self, BULK_PAYLOAD, FrameDecoder, FrameType};

/// Above this many unsent bytes a connection takes no more bulk data; what
/// feeds it waits.
pub(crate) const HIGH_WATER: usize = 256 * 1024;

const READ_SIZE: usize = 64 * 1024;

/// Longest payload of each type of frame that a guest or a client sends, in bytes. A
/// frame is buffered whole, and what a workload writes for each attached client.
fn longest(kind: FrameType) -> usize {
    match kind {
        FrameType::Stdin | FrameType::Stdout | FrameType::Stderr => BULK_PAYLOAD,
        FrameType::Control | FrameType::Request | FrameType::Error => MAX_MESSAGE,
        FrameType::Resize | FrameType::Signal | FrameType::Exit => 16,
    }
}

/// Longest message that is understood, in bytes: far more than any takes.
const MAX_MESSAGE: usize = 64 << 10;

/// A non-blocking stream that carries frames.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: UnixStream,
    pub(crate) decoder: FrameDecoder,
    out: Vec<u8>,
    sent: usize,
    ended: bool,
}

impl Conn {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            decoder: FrameDecoder::with_limits(longest),
            out: Vec::new(),
            sent: 0,
            ended: false,
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether the peer will send nothing more.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Reads until there is nothing more, for a peer that will send no more.
    pub(crate) fn read_available(&mut self) {
        while self.read_some() > 0 {}
    }

    /// Reads once; frames are then in [`Self::decoder`].
    ///
    /// One read per wake-up keeps memory bounded and connections fair: the
    /// caller stops asking while whoever takes the frames is behind.
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

    /// Queues a frame. Payloads come from a decoder or are small, so they never
    /// exceed what a frame can carry.
    pub(crate) fn queue(&mut self, kind: FrameType, payload: &[u8]) {
        if let Err(error) = frame::encode(kind, payload, &mut self.out) {
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
        self.out.len() - self.sent
    }

    pub(crate) fn is_full(&self) -> bool {
        self.unsent() >= HIGH_WATER
    }

    /// Sends what the peer takes now.
    ///
    /// # Errors
    /// The peer is gone.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        // Bound what is kept besides the unsent bytes.
                        if self.sent >= HIGH_WATER {
                            self.out.drain(..self.sent);
                            self.sent = 0;
                        }
                        return Ok(());
                    }
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(())
    }
}
