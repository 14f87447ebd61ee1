//! What clients send, for fuzz targets: not part of the interface.

use std::os::fd::{AsFd, OwnedFd};

use crate::handoff::parcel::Parcel;
use crate::hybrid::line::{self, Line};

/// Reads a request line of the hybrid protocol: the port, and how long the line is.
/// `None` if more bytes may make it one.
///
/// # Errors
/// It is no request, whatever follows.
pub fn hybrid_line(bytes: &[u8]) -> Result<Option<(u32, usize)>, ()> {
    match line::read(bytes) {
        Line::Part => Ok(None),
        Line::Request { port, len } => Ok(Some((port, len))),
        Line::Nonsense => Err(()),
    }
}

/// A router's connection, read handoff by handoff.
#[derive(Debug, Default)]
pub struct HandoffReader(Parcel);

impl HandoffReader {
    /// Reads from a router until a handoff is complete.
    ///
    /// # Errors
    /// As for a connection of a router; `WouldBlock` is the only one after which it
    /// goes on.
    pub fn read_from(&mut self, router: impl AsFd) -> std::io::Result<(OwnedFd, Vec<u8>)> {
        while !self.0.read_from(&router)? {}
        std::mem::take(&mut self.0).open()
    }
}
