//! The *skeleton* of a layer: its tar stream without the contents of files.
//!
//! The tar stream can be reconstructed byte for byte from the skeleton and the layer's
//! other files, to verify a stored layer against its diff_id, to save it, or to push it.
//!
//! A skeleton is a Zstandard stream of pieces: raw bytes (tag 0, `u32` length), bytes of
//! the blob (tag 1, `u64` offset and length) or bytes of the small files (tag 2, as tag
//! 1). Numbers are little-endian.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt as _;

use crate::index::ContentLocation;

const RAW: u8 = 0;
const BLOB: u8 = 1;
const SMALL: u8 = 2;
/// Maximum number of raw bytes buffered before they are written as a piece.
const PIECE: usize = 64 << 10;
const BUFFER: usize = 256 << 10;
/// Headers are very similar, so a higher level gains little.
const LEVEL: i32 = 1;

/// A reader that passes a tar stream through, and writes its skeleton.
pub(crate) struct Tap<'f, R> {
    inner: R,
    out: zstd::stream::write::Encoder<'static, BufWriter<&'f File>>,
    raw: Vec<u8>,
    /// The bytes being read are the contents of a file and not raw bytes.
    contents: bool,
}

impl<'f, R> Tap<'f, R> {
    /// Starts a skeleton in an empty file.
    pub(crate) fn new(inner: R, file: &'f File) -> io::Result<Self> {
        let file = BufWriter::with_capacity(BUFFER, file);
        Ok(Self {
            inner,
            out: zstd::stream::write::Encoder::new(file, LEVEL)?,
            raw: Vec::with_capacity(PIECE),
            contents: false,
        })
    }

    /// Marks the following bytes as contents, which are stored elsewhere.
    pub(crate) fn start_contents(&mut self) {
        self.contents = true;
    }

    /// Ends the contents, of which `len` bytes are stored at `location`.
    pub(crate) fn end_contents(&mut self, location: ContentLocation, len: u64) -> io::Result<()> {
        self.contents = false;
        if len == 0 {
            return Ok(());
        }
        self.flush_raw()?;
        let (tag, offset) = match location {
            ContentLocation::Blob(offset) => (BLOB, offset),
            ContentLocation::Small(offset) => (SMALL, offset),
        };
        self.out.write_all(&[tag])?;
        self.out.write_all(&offset.to_le_bytes())?;
        self.out.write_all(&len.to_le_bytes())
    }

    fn flush_raw(&mut self) -> io::Result<()> {
        if self.raw.is_empty() {
            return Ok(());
        }
        // The buffer is at most `PIECE` plus one read long.
        let len = u32::try_from(self.raw.len()).map_err(io::Error::other)?;
        self.out.write_all(&[RAW])?;
        self.out.write_all(&len.to_le_bytes())?;
        self.out.write_all(&self.raw)?;
        self.raw.clear();
        Ok(())
    }

    /// Completes the skeleton.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.flush_raw()?;
        self.out.finish()?.flush()
    }
}

impl<R: Read> Read for Tap<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if !self.contents {
            self.raw
                .extend_from_slice(buffer.get(..count).unwrap_or_default());
            if self.raw.len() >= PIECE {
                self.flush_raw()?;
            }
        }
        Ok(count)
    }
}

/// The reconstructed tar stream of a stored layer.
pub(crate) struct Assembler {
    skeleton: zstd::stream::read::Decoder<'static, BufReader<File>>,
    blob: File,
    small: File,
    piece: SkeletonPiece,
}

#[derive(Clone, Copy)]
enum SkeletonPiece {
    Raw(u64),
    Blob { at: u64, left: u64 },
    Small { at: u64, left: u64 },
    End,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the skeleton of a layer is damaged: {what}"),
    )
}

/// Marks a lack of memory of the decompressor, which otherwise looks like an error in the
/// compressed data.
fn decoding_error(error: io::Error) -> io::Error {
    // ZSTD_error_memory_allocation, which the library returns as a negative number.
    const MEMORY_ALLOCATION: usize = 64;
    let name = zstd::zstd_safe::get_error_name(MEMORY_ALLOCATION.wrapping_neg());
    match error.raw_os_error().is_none() && error.to_string() == name {
        true => io::ErrorKind::OutOfMemory.into(),
        false => error,
    }
}

/// Returns true if an error of an [`Assembler`] proves that a layer is damaged: its bytes
/// were read, and have no meaning. Errors of the system prove nothing about the bytes.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    error.raw_os_error().is_none() && error.kind() != io::ErrorKind::OutOfMemory
}

impl Assembler {
    pub(crate) fn new(skeleton: File, blob: File, small: File) -> io::Result<Self> {
        Ok(Self {
            skeleton: zstd::stream::read::Decoder::new(skeleton)?,
            blob,
            small,
            piece: SkeletonPiece::Raw(0),
        })
    }

    /// Reads the next piece.
    fn advance(&mut self) -> io::Result<()> {
        let mut tag = [0];
        if self.skeleton.read(&mut tag).map_err(decoding_error)? == 0 {
            self.piece = SkeletonPiece::End;
            return Ok(());
        }
        let mut number = |len: usize| -> io::Result<u64> {
            let mut bytes = [0; 8];
            let part = bytes.get_mut(..len).unwrap_or_default();
            self.skeleton.read_exact(part).map_err(decoding_error)?;
            Ok(u64::from_le_bytes(bytes))
        };
        self.piece = match tag {
            [RAW] => SkeletonPiece::Raw(number(4)?),
            [BLOB] => SkeletonPiece::Blob {
                at: number(8)?,
                left: number(8)?,
            },
            [SMALL] => SkeletonPiece::Small {
                at: number(8)?,
                left: number(8)?,
            },
            _ => return Err(damaged("a tag")),
        };
        Ok(())
    }
}

/// Reads at most `left` bytes at `at`, and at least one.
fn read_at(file: &File, buffer: &mut [u8], at: &mut u64, left: &mut u64) -> io::Result<usize> {
    let most = usize::try_from(*left).map_or(buffer.len(), |left| left.min(buffer.len()));
    let count = file.read_at(buffer.get_mut(..most).unwrap_or_default(), *at)?;
    if count == 0 {
        return Err(damaged("it names bytes that are not there"));
    }
    *at = at.saturating_add(count as u64);
    *left -= count as u64;
    Ok(count)
}

impl Read for Assembler {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match &mut self.piece {
                SkeletonPiece::End => return Ok(0),
                SkeletonPiece::Raw(0)
                | SkeletonPiece::Blob { left: 0, .. }
                | SkeletonPiece::Small { left: 0, .. } => {}
                SkeletonPiece::Raw(left) => {
                    let most = usize::try_from(*left).map_or(buffer.len(), |n| n.min(buffer.len()));
                    let part = buffer.get_mut(..most).unwrap_or_default();
                    let count = self.skeleton.read(part).map_err(decoding_error)?;
                    if count == 0 {
                        return Err(damaged("it is truncated"));
                    }
                    *left -= count as u64;
                    return Ok(count);
                }
                SkeletonPiece::Blob { at, left } => return read_at(&self.blob, buffer, at, left),
                SkeletonPiece::Small { at, left } => return read_at(&self.small, buffer, at, left),
            }
            self.advance()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a stream of raw bytes and contents at various offsets, and returns the
    /// stream.
    fn written(skeleton: &File) -> (Vec<u8>, File, File) {
        let blob = tempfile::tempfile().unwrap();
        let small = tempfile::tempfile().unwrap();
        blob.write_all_at(&[1; 9000], 4096).unwrap();
        small.write_all_at(b"..small..", 0).unwrap();
        let mut stream = vec![b'h'; 200_000];
        stream.extend_from_slice(&[1; 9000]);
        stream.extend_from_slice(b"between");
        stream.extend_from_slice(b"small");
        stream.extend_from_slice(&[0; 1024]);
        let mut tap = Tap::new(stream.as_slice(), skeleton).unwrap();
        let take = |tap: &mut Tap<'_, &[u8]>, len: usize| {
            tap.read_exact(&mut vec![0; len]).unwrap();
        };
        take(&mut tap, 200_000);
        tap.start_contents();
        take(&mut tap, 9000);
        tap.end_contents(ContentLocation::Blob(4096), 9000).unwrap();
        take(&mut tap, 7);
        tap.start_contents();
        take(&mut tap, 5);
        tap.end_contents(ContentLocation::Small(2), 5).unwrap();
        take(&mut tap, 1024);
        tap.finish().unwrap();
        (stream, blob, small)
    }

    fn clone(file: &File) -> File {
        file.try_clone().unwrap()
    }

    fn rewound(file: &File) -> File {
        use std::io::Seek as _;
        let mut file = file.try_clone().unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn a_stream_is_reconstructed() {
        let skeleton = tempfile::tempfile().unwrap();
        let (stream, blob, small) = written(&skeleton);
        assert!(skeleton.metadata().unwrap().len() < 1000);
        let mut assembled = Vec::new();
        Assembler::new(rewound(&skeleton), clone(&blob), clone(&small))
            .unwrap()
            .read_to_end(&mut assembled)
            .unwrap();
        assert!(assembled == stream);
    }

    #[test]
    fn only_bytes_that_were_read_prove_damage() {
        let of_code = |code: usize| {
            let name = zstd::zstd_safe::get_error_name(code.wrapping_neg());
            decoding_error(io::Error::other(name))
        };
        // ZSTD_error_memory_allocation and ZSTD_error_corruption_detected.
        assert!(!is_damage(&of_code(64)));
        assert!(is_damage(&of_code(20)));
        assert!(is_damage(&damaged("a tag")));
        assert!(is_damage(&io::ErrorKind::UnexpectedEof.into()));
        for errno in [rustix::io::Errno::IO, rustix::io::Errno::NOMEM] {
            assert!(!is_damage(&errno.into()), "{errno}");
        }
    }

    #[test]
    fn missing_bytes_are_an_error() {
        let skeleton = tempfile::tempfile().unwrap();
        let (_, blob, small) = written(&skeleton);
        small.set_len(3).unwrap();
        let error = Assembler::new(rewound(&skeleton), clone(&blob), clone(&small))
            .unwrap()
            .read_to_end(&mut Vec::new())
            .unwrap_err();
        assert!(error.to_string().contains("not there"), "{error}");
        skeleton
            .set_len(skeleton.metadata().unwrap().len() - 4)
            .unwrap();
        assert!(
            Assembler::new(rewound(&skeleton), clone(&blob), clone(&blob))
                .unwrap()
                .read_to_end(&mut Vec::new())
                .is_err()
        );
    }
}
