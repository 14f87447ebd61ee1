//! Sequential output to a file.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};

const BUFFER: usize = 1 << 20;
const ZEROS: [u8; 4096] = [0; 4096];

pub(super) struct Output<'a> {
    out: BufWriter<&'a File>,
    position: u64,
}

impl<'a> Output<'a> {
    pub(super) fn new(file: &'a File) -> Self {
        Self {
            out: BufWriter::with_capacity(BUFFER, file),
            position: 0,
        }
    }

    /// Returns the number of bytes written so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Writes zeros up to `position`, which must not be before the current position.
    pub(super) fn pad_to(&mut self, position: u64) -> io::Result<()> {
        let mut left = position.saturating_sub(self.position);
        while left > 0 {
            let len = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.bytes(&ZEROS[..len])?;
            left -= len as u64;
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.out.flush()
    }
}
