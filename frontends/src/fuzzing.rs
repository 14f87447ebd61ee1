//! Parsers of client input for fuzz targets; not part of the public interface.

use std::os::fd::{AsFd, OwnedFd};

use crate::handoff::message::HandoffMessage;
use crate::hybrid::line::{self, RequestLine};

/// Reads a request line of the hybrid protocol: returns the port and the length of the
/// line in bytes, or `None` if the line is incomplete.
///
/// # Errors
/// The bytes are no prefix of a request.
pub fn hybrid_line(bytes: &[u8]) -> Result<Option<(u32, usize)>, ()> {
    match line::read(bytes) {
        RequestLine::Part => Ok(None),
        RequestLine::Request { port, len } => Ok(Some((port, len))),
        RequestLine::Malformed => Err(()),
    }
}

/// Reads one handoff after the other from a router's connection.
#[derive(Debug, Default)]
pub struct HandoffReader(HandoffMessage);

impl HandoffReader {
    /// Reads from a router until a handoff is complete.
    ///
    /// # Errors
    /// As for a router's connection; only after `WouldBlock` can it be called again.
    pub fn read_from(&mut self, router: impl AsFd) -> std::io::Result<(OwnedFd, Vec<u8>)> {
        while !self.0.read_from(&router)? {}
        std::mem::take(&mut self.0).into_parts()
    }
}
