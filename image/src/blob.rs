//! Writing of a layer's blob: the contents of files, each starting at a block boundary.
//! Runs of zeros become holes of the host's file.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write as _};
use std::os::unix::fs::FileExt as _;

/// Alignment of file contents in a blob in bytes: the block size of the disk.
pub(crate) const BLOCK_SIZE: u64 = 4096;
/// Number of bytes buffered before a write; a multiple of the block size.
const BUFFER: usize = 1 << 20;
const SMALL_BUFFER: usize = 256 << 10;
/// Granularity of the search for zeros in bytes.
const HOLE: usize = 64 << 10;

/// Writer that appends to a blob.
pub(crate) struct BlobWriter<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Number of valid bytes in `buffer`.
    filled: usize,
    /// Offset in the file of the buffer's first byte.
    flushed: u64,
    /// Count bytes without writing.
    dry: bool,
}

impl<'a> BlobWriter<'a> {
    pub(crate) fn new(file: &'a File) -> Self {
        Self {
            file,
            buffer: vec![0; BUFFER],
            filled: 0,
            flushed: 0,
            dry: false,
        }
    }

    /// Creates a writer that counts bytes without writing them.
    pub(crate) fn dry(file: &'a File) -> Self {
        Self {
            dry: true,
            ..Self::new(file)
        }
    }

    /// Returns the length of the blob so far in bytes.
    pub(crate) fn position(&self) -> u64 {
        self.flushed + self.filled as u64
    }

    /// Appends exactly `len` bytes of `reader`.
    pub(crate) fn append(&mut self, reader: &mut impl Read, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            if self.filled == BUFFER {
                self.flush()?;
            }
            let room = BUFFER - self.filled;
            let count = usize::try_from(left).map_or(room, |left| left.min(room));
            let end = self.filled + count;
            reader.read_exact(&mut self.buffer[self.filled..end])?;
            self.filled = end;
            left -= count as u64;
        }
        Ok(())
    }

    /// Appends `len` zeros. Long runs take neither time nor space.
    pub(crate) fn append_zeros(&mut self, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            if self.filled == 0 && left >= BUFFER as u64 {
                let whole = left - left % BUFFER as u64;
                self.flushed += whole;
                left -= whole;
                continue;
            }
            let room = BUFFER - self.filled;
            let count = usize::try_from(left).map_or(room, |left| left.min(room));
            let end = self.filled + count;
            self.buffer[self.filled..end].fill(0);
            self.filled = end;
            left -= count as u64;
            if self.filled == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Pads the last block with zeros.
    pub(crate) fn pad(&mut self) -> io::Result<()> {
        let position = self.position();
        self.append_zeros(position.next_multiple_of(BLOCK_SIZE) - position)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.dry {
            self.flushed += self.filled as u64;
            self.filled = 0;
            return Ok(());
        }
        let bytes = &self.buffer[..self.filled];
        let mut start = 0;
        let mut at = 0;
        // Adjacent pieces with data are written in one call.
        for piece in bytes.chunks(HOLE) {
            let end = at + piece.len();
            if is_zero(piece) {
                self.file
                    .write_all_at(&bytes[start..at], self.flushed + start as u64)?;
                start = end;
            }
            at = end;
        }
        self.file
            .write_all_at(&bytes[start..], self.flushed + start as u64)?;
        self.flushed += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Writes the remaining bytes and returns the blob's length.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.flush()?;
        if !self.dry {
            self.file.set_len(self.flushed)?;
        }
        Ok(self.flushed)
    }
}

/// Writer for the contents of small files, without alignment.
pub(crate) struct SmallWriter<'a> {
    out: BufWriter<&'a File>,
    position: u64,
    buffer: Vec<u8>,
}

impl<'a> SmallWriter<'a> {
    pub(crate) fn new(file: &'a File) -> Self {
        Self {
            out: BufWriter::with_capacity(SMALL_BUFFER, file),
            position: 0,
            buffer: Vec::new(),
        }
    }

    /// Returns the number of bytes so far.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Appends exactly `len` bytes of `reader`, which are buffered in memory.
    pub(crate) fn append(&mut self, reader: &mut impl Read, len: u64) -> io::Result<()> {
        self.buffer
            .resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        reader.read_exact(&mut self.buffer)?;
        self.out.write_all(&self.buffer)?;
        self.position += len;
        Ok(())
    }

    /// Writes the remaining bytes and returns the length.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.out.flush()?;
        Ok(self.position)
    }
}

/// Returns true if all bytes are zero, by comparing them with themselves at an offset of
/// one, which is a `memcmp`.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && *rest == bytes[..rest.len()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_and_data_have_the_expected_offsets() {
        let file = tempfile::tempfile().unwrap();
        let mut writer = BlobWriter::new(&file);
        let data = vec![7; 3 * BUFFER / 2];
        writer.append(&mut &b"abc"[..], 3).unwrap();
        writer.pad().unwrap();
        writer.append_zeros(5 * BUFFER as u64 + 17).unwrap();
        writer
            .append(&mut data.as_slice(), data.len() as u64)
            .unwrap();
        writer.pad().unwrap();
        let len = writer.finish().unwrap();
        let mut expected = b"abc".to_vec();
        expected.resize(4096 + 5 * BUFFER + 17, 0);
        expected.extend_from_slice(&data);
        expected.resize(expected.len().next_multiple_of(4096), 0);
        let mut found = Vec::new();
        (&file).read_to_end(&mut found).unwrap();
        assert_eq!(len, expected.len() as u64);
        assert!(found == expected);
    }

    #[test]
    fn missing_data_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let error = BlobWriter::new(&file)
            .append(&mut &b"ab"[..], 3)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
