//! Frames: `[u8 type][u32 BE length][payload]`.

use thiserror::Error;

/// Length of a frame header in bytes.
pub const HEADER_LEN: usize = 5;

/// Maximum accepted payload in bytes (16 MiB).
pub const MAX_PAYLOAD: usize = 16 * 1024 * 1024;

/// Payload size for senders of bulk data, in bytes.
///
/// It is large enough to amortise the header and small enough to bound a receiver's
/// buffer.
pub const BULK_PAYLOAD: usize = 64 * 1024;

/// Maximum payload of a message on a session or on the agent's control connection, in
/// bytes. Messages are far shorter.
pub const MESSAGE_PAYLOAD: usize = 64 * 1024;

/// Returns the maximum payload in bytes of a type of frame, for receivers of frames from a
/// guest, from a VMM, and from clients of a VMM. Such receivers buffer a complete frame.
#[must_use]
pub fn payload_limit(kind: FrameType) -> usize {
    match kind {
        FrameType::Stdin | FrameType::Stdout | FrameType::Stderr => BULK_PAYLOAD,
        FrameType::Control | FrameType::Request | FrameType::Error => MESSAGE_PAYLOAD,
        FrameType::Resize | FrameType::Signal | FrameType::Exit => 16,
    }
}

/// The content of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameType {
    /// Bytes for the command's standard input; an empty payload is end of file.
    Stdin = 0,
    /// Bytes the command wrote to standard output (or its terminal).
    Stdout = 1,
    /// Bytes the command wrote to standard error.
    Stderr = 2,
    /// New terminal size: columns then rows, two `u16` BE.
    Resize = 3,
    /// Signal for the command: one `u8` signal number.
    Signal = 4,
    /// Exit of the command: `u32` BE status, optionally `u64` BE peak RSS in KiB.
    Exit = 5,
    /// The reason why the request failed (UTF-8).
    Error = 6,
    /// A control message (JSON).
    Control = 0xfe,
    /// An exec request (JSON).
    Request = 0xff,
}

impl TryFrom<u8> for FrameType {
    type Error = FrameError;

    fn try_from(value: u8) -> Result<Self, FrameError> {
        Ok(match value {
            0 => Self::Stdin,
            1 => Self::Stdout,
            2 => Self::Stderr,
            3 => Self::Resize,
            4 => Self::Signal,
            5 => Self::Exit,
            6 => Self::Error,
            0xfe => Self::Control,
            0xff => Self::Request,
            other => return Err(FrameError::UnknownType(other)),
        })
    }
}

/// Failure to decode a frame.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameError {
    /// The type byte is not a [`FrameType`].
    #[error("unknown frame type {0:#04x}")]
    UnknownType(u8),
    /// The length field exceeds [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes exceeds the limit of {MAX_PAYLOAD} bytes")]
    TooLong(u32),
    /// The length field exceeds the receiver's limit for this type.
    #[error("{kind:?} frame of {len} bytes exceeds the limit of {limit} bytes")]
    OverLimit {
        /// The frame's type.
        kind: FrameType,
        /// The announced length in bytes.
        len: usize,
        /// The receiver's limit in bytes.
        limit: usize,
    },
    /// The payload's length does not match its type.
    #[error("malformed {0:?} frame payload of {1} bytes")]
    BadPayload(FrameType, usize),
}

/// A decoded frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Type of the frame.
    pub kind: FrameType,
    /// Payload length in bytes, at most [`MAX_PAYLOAD`].
    pub len: usize,
}

impl FrameHeader {
    /// Decodes the five header bytes.
    ///
    /// # Errors
    /// The type is unknown, or the length exceeds [`MAX_PAYLOAD`].
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [kind, a, b, c, d] = bytes;
        let kind = FrameType::try_from(kind)?;
        let len = u32::from_be_bytes([a, b, c, d]);
        match usize::try_from(len) {
            Ok(len) if len <= MAX_PAYLOAD => Ok(Self { kind, len }),
            _ => Err(FrameError::TooLong(len)),
        }
    }

    /// Returns the header if its payload is not longer than `limit` returns for its type,
    /// in bytes. A receiver checks this before it allocates memory for the payload.
    ///
    /// # Errors
    /// The payload exceeds the limit.
    pub fn limited(self, limit: impl Fn(FrameType) -> usize) -> Result<Self, FrameError> {
        let Self { kind, len } = self;
        let limit = limit(kind);
        if len > limit {
            return Err(FrameError::OverLimit { kind, len, limit });
        }
        Ok(self)
    }

    /// Encodes the header.
    ///
    /// # Errors
    /// The length exceeds [`MAX_PAYLOAD`].
    pub fn encode(self) -> Result<[u8; HEADER_LEN], FrameError> {
        let len = u32::try_from(self.len).unwrap_or(u32::MAX);
        if self.len > MAX_PAYLOAD {
            return Err(FrameError::TooLong(len));
        }
        let [a, b, c, d] = len.to_be_bytes();
        Ok([self.kind as u8, a, b, c, d])
    }
}

/// Appends one frame to `out`.
///
/// # Errors
/// The payload exceeds [`MAX_PAYLOAD`]; `out` is then unchanged.
pub fn encode(kind: FrameType, payload: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
    let header = FrameHeader {
        kind,
        len: payload.len(),
    }
    .encode()?;
    out.reserve(HEADER_LEN + payload.len());
    out.extend_from_slice(&header);
    out.extend_from_slice(payload);
    Ok(())
}

/// A complete frame, borrowed from a [`FrameDecoder`]'s buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Type of the frame.
    pub kind: FrameType,
    /// Payload of the frame.
    pub payload: &'a [u8],
}

/// Splits a byte stream into frames.
///
/// The caller pushes bytes as they arrive and takes frames until none is complete. Memory
/// is bounded by the largest announced frame plus the bytes pushed beyond it: a reader
/// that pushes one `read` of a bounded buffer at a time uses at most [`MAX_PAYLOAD`], or
/// the largest limit of [`FrameDecoder::with_limits`], plus the size of that buffer.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    start: usize,
    limit: fn(FrameType) -> usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::with_limits(|_| MAX_PAYLOAD)
    }
}

impl FrameDecoder {
    /// Creates a decoder with an empty buffer and no limits besides [`MAX_PAYLOAD`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a decoder that refuses a frame as soon as its header announces a payload
    /// longer than `limit` returns for its type, in bytes.
    #[must_use]
    pub fn with_limits(limit: fn(FrameType) -> usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            limit,
        }
    }

    /// Appends received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next complete frame; `None` while it is incomplete.
    ///
    /// # Errors
    /// The stream contains no valid frame. It cannot be resynchronised, so the caller
    /// should close it.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let pending = self.buffer.get(self.start..).unwrap_or_default();
        let Some(header) = pending.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let FrameHeader { kind, len } = FrameHeader::decode(*header)?.limited(self.limit)?;
        let end = HEADER_LEN + len;
        if pending.len() < end {
            return Ok(None);
        }
        let begin = self.start + HEADER_LEN;
        self.start += end;
        Ok(Some(Frame {
            kind,
            payload: &self.buffer[begin..self.start],
        }))
    }

    /// Returns bytes that were pushed and not yet taken, to continue the stream as raw
    /// bytes.
    #[must_use]
    pub fn remaining(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }
}

/// Encodes a RESIZE payload: columns, then rows.
#[must_use]
pub fn resize_payload(columns: u16, rows: u16) -> [u8; 4] {
    let [a, b] = columns.to_be_bytes();
    let [c, d] = rows.to_be_bytes();
    [a, b, c, d]
}

/// Decodes a RESIZE payload as columns and rows.
///
/// # Errors
/// The payload is not four bytes long.
pub fn parse_resize(payload: &[u8]) -> Result<(u16, u16), FrameError> {
    match payload {
        [a, b, c, d] => Ok((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]))),
        _ => Err(FrameError::BadPayload(FrameType::Resize, payload.len())),
    }
}

/// Exit status and resource usage of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// The exit status; 128+n when signal n terminated the command.
    pub status: u32,
    /// Peak resident set size in KiB, if the agent knows it.
    pub peak_rss_kib: Option<u64>,
}

impl ExitStatus {
    /// Encodes the EXIT payload.
    #[must_use]
    pub fn to_payload(self) -> Vec<u8> {
        let mut payload = self.status.to_be_bytes().to_vec();
        if let Some(rss) = self.peak_rss_kib {
            payload.extend_from_slice(&rss.to_be_bytes());
        }
        payload
    }

    /// Decodes an EXIT payload.
    ///
    /// # Errors
    /// The payload is neither 4 nor 12 bytes long.
    pub fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let bad = FrameError::BadPayload(FrameType::Exit, payload.len());
        let (status, rest) = payload.split_first_chunk::<4>().ok_or(bad)?;
        let peak_rss_kib = match rest {
            [] => None,
            rest => Some(u64::from_be_bytes(rest.try_into().map_err(|_| bad)?)),
        };
        Ok(Self {
            status: u32::from_be_bytes(*status),
            peak_rss_kib,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TYPES: [FrameType; 9] = [
        FrameType::Stdin,
        FrameType::Stdout,
        FrameType::Stderr,
        FrameType::Resize,
        FrameType::Signal,
        FrameType::Exit,
        FrameType::Error,
        FrameType::Control,
        FrameType::Request,
    ];

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(
            frames in prop::collection::vec((0usize..TYPES.len(), prop::collection::vec(any::<u8>(), 0..300)), 0..20),
            cut in 1usize..64,
        ) {
            let mut wire = Vec::new();
            for (kind, payload) in &frames {
                encode(TYPES[*kind], payload, &mut wire).unwrap();
            }
            let mut decoder = FrameDecoder::new();
            let mut seen = Vec::new();
            for chunk in wire.chunks(cut) {
                decoder.push(chunk);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push((frame.kind, frame.payload.to_vec()));
                }
            }
            let expected: Vec<_> = frames.into_iter().map(|(k, p)| (TYPES[k], p)).collect();
            prop_assert_eq!(seen, expected);
            prop_assert!(decoder.remaining().is_empty());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut decoder = FrameDecoder::new();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
        }

        #[test]
        fn exit_round_trips(status in any::<u32>(), rss in any::<Option<u64>>()) {
            let exit = ExitStatus { status, peak_rss_kib: rss };
            prop_assert_eq!(ExitStatus::parse(&exit.to_payload()).unwrap(), exit);
        }
    }

    #[test]
    fn a_frame_over_its_types_limit_is_refused_before_its_payload_arrives() {
        let mut decoder = FrameDecoder::with_limits(|kind| match kind {
            FrameType::Request => 1000,
            _ => 3,
        });
        let mut wire = Vec::new();
        encode(FrameType::Request, &[7; 1000], &mut wire).unwrap();
        encode(FrameType::Stdin, &[7; 3], &mut wire).unwrap();
        decoder.push(&wire);
        for len in [1000, 3] {
            assert_eq!(decoder.next_frame().unwrap().unwrap().payload.len(), len);
        }
        decoder.push(&[FrameType::Stdin as u8, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Ok(None));
        decoder.push(&[4]);
        let refused = FrameError::OverLimit {
            kind: FrameType::Stdin,
            len: 4,
            limit: 3,
        };
        assert_eq!(decoder.next_frame(), Err(refused));
        assert_eq!(
            refused.to_string(),
            "Stdin frame of 4 bytes exceeds the limit of 3 bytes"
        );
    }

    #[test]
    fn oversized_and_unknown_frames_are_refused() {
        assert_eq!(
            FrameHeader::decode([1, 0x01, 0, 0, 1]),
            Err(FrameError::TooLong(0x0100_0001))
        );
        assert_eq!(
            FrameHeader::decode([9, 0, 0, 0, 0]),
            Err(FrameError::UnknownType(9))
        );
        assert!(ExitStatus::parse(&[0; 5]).is_err());
        assert!(parse_resize(&[0; 3]).is_err());
    }
}
