//! A buffer for the headers of one packet.

use zerocopy::{Immutable, IntoBytes};

use super::HEAD;

/// Headers that are written one after the other; what exceeds [`HEAD`] bytes is left out.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEAD],
    /// At most `HEAD`.
    len: usize,
}

impl Default for Head {
    fn default() -> Self {
        Self::new()
    }
}

impl Head {
    /// No headers.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            bytes: [0; HEAD],
            len: 0,
        }
    }

    /// Appends a header.
    pub fn push(&mut self, header: &(impl IntoBytes + Immutable)) {
        self.extend(header.as_bytes());
    }

    /// Appends bytes, as far as there is room.
    pub fn extend(&mut self, bytes: &[u8]) {
        let room = self.bytes.get_mut(self.len..).unwrap_or_default();
        let len = room.len().min(bytes.len());
        room[..len].copy_from_slice(&bytes[..len]);
        self.len += len;
    }

    /// The headers.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Returns true if there are no headers.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Replaces the big-endian word at `offset`, if it is inside the headers.
    pub fn set_u16(&mut self, offset: usize, value: u16) {
        let headers = &mut self.bytes[..self.len];
        if let Some(word) = headers
            .get_mut(offset..)
            .and_then(|it| it.first_chunk_mut())
        {
            *word = value.to_be_bytes();
        }
    }
}
