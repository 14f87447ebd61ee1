//! A connection with framing for a poll loop.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use sm_guest_proto::frame::{self, BULK_PAYLOAD, FrameDecoder, FrameType};

/// Limit of unsent bytes above which a connection accepts no more bulk data and its
/// source has to wait.
pub(crate) const HIGH_WATER: usize = 256 * 1024;

const READ_SIZE: usize = 64 * 1024;

/// Returns the longest payload of each type of frame from a guest or a client, in bytes.
/// Frames are buffered completely, and output of a workload once per attached client.
fn longest(kind: FrameType) -> usize {
    match kind {
        FrameType::Stdin | FrameType::Stdout | FrameType::Stderr => BULK_PAYLOAD,
        FrameType::Control | FrameType::Request | FrameType::Error => MAX_MESSAGE,
        FrameType::Resize | FrameType::Signal | FrameType::Exit => 16,
    }
}

/// Longest message in bytes, far more than any message needs.
const MAX_MESSAGE: usize = 64 << 10;

/// A non-blocking stream with framing.
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

    /// Writes as many bytes as the peer accepts.
    ///
    /// # Errors
    /// The peer has disconnected.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        // Bounds the memory of bytes that were already sent.
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
