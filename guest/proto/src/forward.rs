//! The forward protocol: one TCP connection inside the guest per connection to guest port
//! [`crate::port::FORWARD`].
//!
//! The host sends a [`ForwardHeader`]. The agent connects to the guest port, retries with
//! backoff until the deadline while nothing listens, and answers with one
//! [`ForwardStatus`] byte. On success the stream carries raw bytes in both directions and
//! half-close is preserved; on failure the agent closes it.

use std::time::Duration;

use thiserror::Error;

/// Length of an encoded [`ForwardHeader`] in bytes.
pub const HEADER_LEN: usize = 12;

const MAGIC: [u8; 4] = *b"smf1";

/// Longest wait that a header can request, in milliseconds (10 minutes).
pub const MAX_WAIT_MS: u32 = 600_000;

/// Destination port and timeout of a forwarded connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardHeader {
    /// TCP port inside the guest; 0 for the first port on which a process listens.
    pub port: u16,
    /// Time to retry while nothing listens, in milliseconds, at most [`MAX_WAIT_MS`]; 0
    /// for a single attempt.
    pub wait_ms: u32,
}

/// Failure to decode a header.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForwardError {
    /// The magic bytes belong to another protocol or version.
    #[error("not a forward header of this version")]
    BadMagic,
    /// The wait exceeds [`MAX_WAIT_MS`].
    #[error("wait of {0} ms exceeds {MAX_WAIT_MS} ms")]
    WaitTooLong(u32),
}

impl ForwardHeader {
    /// Returns the time to retry while nothing listens.
    #[must_use]
    pub fn wait(self) -> Duration {
        Duration::from_millis(self.wait_ms.into())
    }

    /// Encodes the header: magic, `u16` BE port, two zero bytes, `u32` BE wait.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.port.to_be_bytes());
        bytes[8..].copy_from_slice(&self.wait_ms.to_be_bytes());
        bytes
    }

    /// Decodes a header.
    ///
    /// # Errors
    /// The magic is wrong, or the wait exceeds [`MAX_WAIT_MS`].
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, ForwardError> {
        let [m0, m1, m2, m3, p0, p1, _, _, w0, w1, w2, w3] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(ForwardError::BadMagic);
        }
        let wait_ms = u32::from_be_bytes([w0, w1, w2, w3]);
        if wait_ms > MAX_WAIT_MS {
            return Err(ForwardError::WaitTooLong(wait_ms));
        }
        Ok(Self {
            port: u16::from_be_bytes([p0, p1]),
            wait_ms,
        })
    }
}

/// The agent's one-byte answer. An unknown byte is a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u8)]
pub enum ForwardStatus {
    /// The connection is established; raw bytes follow.
    Connected = 0,
    /// Nothing listened on the port until the deadline.
    NoListener = 1,
    /// The header is malformed.
    BadHeader = 2,
    /// The connection failed for another reason.
    Failed = 3,
}

impl From<u8> for ForwardStatus {
    fn from(value: u8) -> Self {
        match value {
            0 => Self::Connected,
            1 => Self::NoListener,
            2 => Self::BadHeader,
            _ => Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_round_trip(port in any::<u16>(), wait_ms in 0..=MAX_WAIT_MS) {
            let header = ForwardHeader { port, wait_ms };
            prop_assert_eq!(ForwardHeader::decode(header.encode()), Ok(header));
        }
    }

    #[test]
    fn foreign_bytes_are_refused() {
        assert_eq!(
            ForwardHeader::decode(*b"GET / HTTP/1"),
            Err(ForwardError::BadMagic)
        );
    }
}
