//! Frames over a non-blocking stream, without copies on the fast path.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::net::{RecvFlags, recv};
use sm_guest_proto::frame::{
    BULK_PAYLOAD, FrameDecoder, FrameHeader, FrameType, HEADER_LEN, encode,
};

use crate::reactor::{Readiness, Watched};
use crate::sending::{Refusal, send_bytes};

/// Size of the scratch buffer for [`Framed::send_bulk`]: a header and one bulk payload.
/// One buffer serves all connections.
pub(crate) const SCRATCH_LEN: usize = HEADER_LEN + BULK_PAYLOAD;

/// Result of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// Bytes arrived.
    Some,
    /// No bytes are available now.
    Nothing,
    /// The peer closed, or the connection was reset.
    Closed,
}

/// Returns true if reading from a ready socket yields bytes, the end or an error.
pub(crate) fn may_read(ready: Readiness) -> bool {
    ready.readable || ready.hangup || ready.error
}

/// A framed connection. It buffers output that the socket does not accept immediately;
/// callers produce no more output until [`Framed::is_flushed`].
#[derive(Debug)]
pub(crate) struct Framed {
    pub(crate) socket: Watched,
    pub(crate) decoder: FrameDecoder,
    /// Complete frames; the bytes before `sent` have been passed to the socket.
    out: Vec<u8>,
    sent: usize,
    broken: bool,
}

impl Framed {
    /// Creates a connection; `limit` returns the maximum payload for each frame type in
    /// bytes.
    pub(crate) fn new(socket: OwnedFd, limit: fn(FrameType) -> usize) -> Self {
        Self {
            socket: Watched::new(socket),
            decoder: FrameDecoder::with_limits(limit),
            out: Vec::new(),
            sent: 0,
            broken: false,
        }
    }

    /// Reads once into the decoder.
    pub(crate) fn fill(&mut self, scratch: &mut [u8]) -> Filled {
        match recv(&self.socket, &mut *scratch, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Filled::Closed,
            Ok((count, _)) => {
                self.decoder.push(scratch.get(..count).unwrap_or_default());
                Filled::Some
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Filled::Nothing,
            Err(_) => Filled::Closed,
        }
    }

    /// Returns true if the socket has accepted all output.
    pub(crate) fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }

    /// Returns true if sending has failed permanently, or the stream is invalid.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Ends the use of a connection whose stream is invalid: it counts as broken.
    pub(crate) fn invalidate(&mut self) {
        self.broken = true;
    }

    /// Sends a small frame. A payload that exceeds the protocol's limit, which no caller
    /// creates, is dropped and breaks the connection.
    pub(crate) fn send(&mut self, kind: FrameType, payload: &[u8]) {
        if encode(kind, payload, &mut self.out).is_err() {
            self.broken = true;
        }
        self.flush();
    }

    /// Sends `scratch[HEADER_LEN..HEADER_LEN + len]` as one frame. The header is written
    /// before it, so that one `send` takes both.
    pub(crate) fn send_bulk(&mut self, kind: FrameType, scratch: &mut [u8], len: usize) {
        let header = FrameHeader { kind, len }.encode();
        let (Ok(header), Some(frame)) = (header, scratch.get_mut(..HEADER_LEN + len)) else {
            self.broken = true;
            return;
        };
        frame[..HEADER_LEN].copy_from_slice(&header);
        if !self.out.is_empty() {
            self.out.extend_from_slice(frame);
            self.flush();
            return;
        }
        let count = self.send_some(frame, 0);
        if count < frame.len() {
            self.out.extend_from_slice(frame);
            self.sent = count;
        }
    }

    /// Passes as much pending output to the socket as it accepts.
    pub(crate) fn flush(&mut self) {
        let out = std::mem::take(&mut self.out);
        self.sent += self.send_some(&out, self.sent);
        if self.sent < out.len() {
            self.out = out;
        } else {
            self.sent = 0;
            // A buffer that held a bulk frame is released.
            if out.capacity() <= 4096 {
                self.out = out;
                self.out.clear();
            }
        }
    }

    fn send_some(&mut self, bytes: &[u8], from: usize) -> usize {
        if self.broken {
            return 0;
        }
        let rest = bytes.get(from..).unwrap_or_default();
        let (count, refusal) = send_bytes(self.socket.as_fd(), rest);
        self.broken = refusal == Some(Refusal::Broken);
        self.socket.set_starved(refusal == Some(Refusal::Starved));
        count
    }

    /// Returns frames that the socket has not accepted completely, from the start of the
    /// first one. A connection that replaces this one must send them first.
    pub(crate) fn unsent(&self) -> Vec<u8> {
        let mut start = 0;
        while let Some(rest) = self.out.get(start..)
            && let Some(header) = rest.first_chunk::<HEADER_LEN>()
            && let Ok(header) = FrameHeader::decode(*header)
            && start + HEADER_LEN + header.len <= self.sent
        {
            start += HEADER_LEN + header.len;
        }
        self.out.get(start..).unwrap_or_default().to_vec()
    }

    /// Appends frames of another connection, returned by [`Framed::unsent`].
    pub(crate) fn resend(&mut self, frames: &[u8]) {
        self.out.extend_from_slice(frames);
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    #![expect(
        clippy::cast_possible_truncation,
        reason = "small numbers of a test's own making"
    )]
    use super::*;
    use crate::sending::shortage;
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    fn pair() -> (Framed, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Framed::new(ours.into(), |_| BULK_PAYLOAD), theirs)
    }

    #[test]
    fn a_shortage_of_memory_breaks_nothing() {
        let (mut framed, mut theirs) = pair();
        shortage::begin(1);
        framed.send(FrameType::Exit, &[0, 0, 0, 7]);
        assert!(!framed.is_flushed() && !framed.is_broken());
        framed.flush();
        assert!(framed.is_flushed());
        let mut bytes = [0; HEADER_LEN + 4];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[HEADER_LEN..], [0, 0, 0, 7]);
    }

    #[test]
    fn a_slow_reader_gets_every_frame_in_order() {
        let (mut framed, mut theirs) = pair();
        let mut scratch = vec![0; SCRATCH_LEN];
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            theirs.read_to_end(&mut bytes).unwrap();
            let mut decoder = FrameDecoder::new();
            decoder.push(&bytes);
            let mut seen = Vec::new();
            while let Some(frame) = decoder.next_frame().unwrap() {
                seen.push((
                    frame.kind,
                    frame.payload.len(),
                    frame.payload.first().copied(),
                ));
            }
            seen
        });
        for round in 0..40u8 {
            scratch[HEADER_LEN..].fill(round);
            framed.send_bulk(FrameType::Stdout, &mut scratch, BULK_PAYLOAD);
            while !framed.is_flushed() {
                framed.flush();
                std::thread::yield_now();
            }
        }
        framed.send(FrameType::Exit, &[0, 0, 0, 7]);
        while !framed.is_flushed() {
            framed.flush();
            std::thread::yield_now();
        }
        drop(framed);
        let seen = reader.join().unwrap();
        assert_eq!(seen.len(), 41);
        for (round, frame) in seen[..40].iter().enumerate() {
            assert_eq!(*frame, (FrameType::Stdout, BULK_PAYLOAD, Some(round as u8)));
        }
        assert_eq!(seen[40].0, FrameType::Exit);
    }

    #[test]
    fn an_unfinished_frame_is_sent_again_from_its_start() {
        let (mut framed, theirs) = pair();
        let mut scratch = vec![7; SCRATCH_LEN];
        while framed.is_flushed() {
            framed.send_bulk(FrameType::Stdout, &mut scratch, BULK_PAYLOAD);
        }
        framed.send(FrameType::Exit, &[0; 4]);
        drop(theirs);
        let rest = framed.unsent();
        let mut decoder = FrameDecoder::new();
        decoder.push(&rest);
        assert_eq!(
            decoder.next_frame().unwrap().unwrap().payload.len(),
            BULK_PAYLOAD
        );
        assert_eq!(decoder.next_frame().unwrap().unwrap().kind, FrameType::Exit);
        assert!(decoder.next_frame().unwrap().is_none());
        framed.flush();
        assert!(framed.is_broken());
    }

    #[test]
    fn a_reset_reads_as_closed() {
        let (mut framed, theirs) = pair();
        assert_eq!(framed.fill(&mut [0; 16]), Filled::Nothing);
        drop(theirs);
        assert_eq!(framed.fill(&mut [0; 16]), Filled::Closed);
    }
}
