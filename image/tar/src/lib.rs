//! Reading, writing and extracting tar archives: ustar, pax and GNU long names.
//!
//! [`TarReader`] is for untrusted input. It is strict where leniency could be exploited: a
//! header's checksum must be right, a stream must not end inside an entry, and extended
//! headers are limited. Where other readers differ, it behaves like Go's `archive/tar`,
//! which Docker and containerd use.
//!
//! [`ExtractOptions::extract`] creates the files of an archive of untrusted origin below a
//! directory, which it never leaves. [`TarWriter`] writes archives of files of the host;
//! [`DirectoryTar`] is the same as a reader, for one directory.
//!
//! Architecture invariant: memory does not grow with an archive, except with the number of
//! its files that have several names.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod describe;
mod directory;
mod extract;
mod number;
mod pax;
mod sparse;
mod write;
mod writer;

use std::io::{self, Read};

use thiserror::Error;

pub use self::directory::DirectoryTar;
pub use self::extract::{ExtractOptions, Extracted, ExtractionError, XattrPolicy};
use self::number::{number, signed, small};
use self::pax::{Extended, by_name, pax_record};
use self::sparse::{PaxSparse, SparseMap};
pub use self::write::{END, encode, padding};
pub use self::writer::TarWriter;

const BLOCK: usize = 512;
/// Maximum size of an extended header in bytes.
const MAX_EXTENDED: u64 = 1 << 20;
/// Maximum length of a path or link target in bytes (Linux `PATH_MAX` without the zero).
pub const MAX_PATH: usize = 4095;
/// Maximum number of consecutive extended headers.
const MAX_HEADERS: u32 = 8;

/// Type of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A hard link to the entry with this path.
    Hardlink(Vec<u8>),
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// TarHeader of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarHeader {
    /// Path, as in the archive.
    pub path: Vec<u8>,
    /// Type, with the data that depends on it.
    pub kind: TarKind,
    /// Permission bits.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Seconds since the epoch and nanoseconds.
    pub mtime: (i64, u32),
    /// Size of the contents in bytes; 0 if it is no file.
    pub size: u64,
    /// For a sparse file: offset and length of each part with data, in order. The data of
    /// all parts is contiguous in the archive.
    pub sparse: Option<Vec<(u64, u64)>>,
    /// Extended attributes, sorted by name, each name once.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The reason why a stream is not a valid tar archive.
#[derive(Debug, Error)]
#[error("{}{reason}", prefix(.entry.as_deref()))]
pub struct TarError {
    /// Path of the entry, if it is known.
    pub entry: Option<Vec<u8>>,
    /// The reason.
    pub reason: TarReason,
}

fn prefix(entry: Option<&[u8]>) -> String {
    entry.map_or_else(String::new, |entry| format!("{}: ", shown(entry)))
}

/// Returns the text for a path of an archive, which may have any bytes.
fn shown(path: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(path))
}

/// The reason of a [`TarError`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TarReason {
    /// The archive is malformed, or exceeds a limit; a clause about it.
    #[error("{0}")]
    Malformed(String),
    /// The stream cannot be read.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof => TarReason::Malformed("it is truncated".to_owned()),
            _ => TarReason::Io(error),
        };
        Self {
            entry: None,
            reason,
        }
    }
}

fn invalid(reason: impl Into<String>) -> TarError {
    TarError {
        entry: None,
        reason: TarReason::Malformed(reason.into()),
    }
}

/// Reader of the entries of a stream.
pub struct TarReader<R> {
    inner: R,
    /// Number of unread bytes of the current entry's data, and of the padding after it.
    left: u64,
    padding: u64,
    /// Number of bytes consumed so far.
    position: u64,
}

impl<R: Read> TarReader<R> {
    /// Creates a reader of the archive in `inner`.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            left: 0,
            padding: 0,
            position: 0,
        }
    }

    /// Returns the underlying stream.
    pub fn stream(&mut self) -> &mut R {
        &mut self.inner
    }

    /// Returns the underlying stream.
    pub fn into_stream(self) -> R {
        self.inner
    }

    /// Reads the stream to its end and returns its length.
    ///
    /// # Errors
    /// The stream cannot be read.
    pub fn drain(&mut self) -> io::Result<u64> {
        self.position += io::copy(&mut self.inner, &mut io::sink())?;
        Ok(self.position)
    }

    /// Returns the offset of the next byte in the stream.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Reads the next entry. Its data is then read from the reader itself; unread data of
    /// the previous entry is skipped.
    ///
    /// # Errors
    /// The archive is malformed, exceeds a limit, or cannot be read.
    pub fn next_entry(&mut self) -> Result<Option<TarHeader>, TarError> {
        self.skip_rest()?;
        let mut extended = Extended::default();
        // GNU long names take precedence over those of pax headers.
        let (mut long_path, mut long_link) = (None, None);
        // An extended header is part of an entry.
        let mut in_extended_header = false;
        for _ in 0..MAX_HEADERS {
            let Some(block) = self.header_block()? else {
                return match in_extended_header {
                    true => Err(invalid("it ends after an extended header")),
                    false => Ok(None),
                };
            };
            in_extended_header = matches!(block[156], b'x' | b'L' | b'K');
            let size = number(field(&block, 124, 12))?;
            match block[156] {
                b'x' => extended = self.read_pax(size)?,
                // Go, Docker and containerd treat a global header as a separate entry and
                // ignore it: its defaults do not apply to later entries, and headers
                // before it have no effect.
                b'g' => {
                    self.read_records(size, |_, _| Ok(()))?;
                    extended = Extended::default();
                    (long_path, long_link) = (None, None);
                }
                b'L' => long_path = Some(until_nul(&self.read_small(size)?).to_vec()),
                b'K' => long_link = Some(until_nul(&self.read_small(size)?).to_vec()),
                kind => {
                    let long = |name: &Vec<u8>| !name.is_empty();
                    extended.path = long_path.filter(long).or(extended.path);
                    extended.link = long_link.filter(long).or(extended.link);
                    return self.entry(&block, kind, size, extended).map(Some);
                }
            }
        }
        Err(invalid("too many extended headers before an entry"))
    }

    /// Skips unread data of the current entry by seeking. The whole stream has `len`
    /// bytes.
    ///
    /// # Errors
    /// The data is longer than the stream, or the stream cannot be positioned.
    pub fn seek_over_data(&mut self, len: u64) -> Result<(), TarError>
    where
        R: io::Seek,
    {
        let end = self.position.checked_add(self.left);
        // The system permits seeking beyond the end.
        if end.is_none_or(|end| end > len) {
            return Err(invalid("it is truncated"));
        }
        let distance = i64::try_from(self.left).map_err(|_| invalid("a size is out of range"))?;
        self.inner.seek_relative(distance)?;
        self.position += self.left;
        self.left = 0;
        Ok(())
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        kind: u8,
        size: u64,
        mut extended: Extended,
    ) -> Result<TarHeader, TarError> {
        let path = extended
            .sparse
            .name
            .take()
            .or(extended.path.take())
            .unwrap_or_else(|| ustar_path(block));
        match self.entry_of(block, kind, size, extended, &path) {
            Ok(header) => Ok(TarHeader { path, ..header }),
            Err(error) => Err(TarError {
                entry: Some(path),
                ..error
            }),
        }
    }

    /// Returns the header of the entry `path`, without the path itself.
    fn entry_of(
        &mut self,
        block: &[u8; BLOCK],
        kind: u8,
        size: u64,
        extended: Extended,
        path: &[u8],
    ) -> Result<TarHeader, TarError> {
        if path.len() > MAX_PATH {
            return Err(invalid("its path is longer than 4095 bytes"));
        }
        let mtime = match extended.mtime {
            Some(mtime) => mtime,
            None => (signed(field(block, 136, 12))?, 0),
        };
        let mode = small(field(block, 100, 8))? & 0o7777;
        let mut header = TarHeader {
            kind: read_kind(block, kind, path, &extended)?,
            mode: u16::try_from(mode).unwrap_or(0),
            uid: extended
                .uid
                .map_or_else(|| small(field(block, 108, 8)), Ok)?,
            gid: extended
                .gid
                .map_or_else(|| small(field(block, 116, 8)), Ok)?,
            mtime,
            size: 0,
            sparse: None,
            xattrs: by_name(extended.xattrs),
            path: Vec::new(),
        };
        // Only files have data, even if the size of another entry is not 0.
        let data = match header.kind {
            TarKind::File => extended.size.unwrap_or(size),
            _ => 0,
        };
        if header.kind == TarKind::File {
            let map = self.sparse_map(block, kind, extended.sparse, data)?;
            match map {
                Some(map) => {
                    header.size = map.size;
                    header.sparse = Some(map.extents);
                }
                None => {
                    header.size = data;
                    self.expect_data(data)?;
                }
            }
        } else {
            self.expect_data(data)?;
        }
        Ok(header)
    }

    /// Reads the map of a sparse file, after which its data follows.
    fn sparse_map(
        &mut self,
        block: &[u8; BLOCK],
        kind: u8,
        pax: PaxSparse,
        data: u64,
    ) -> Result<Option<SparseMap>, TarError> {
        if kind == b'S' {
            let mut counting = CountingReader(&mut self.inner, 0);
            let map = sparse::old_gnu(block, &mut counting)?;
            self.position += counting.1;
            self.expect_data(data)?;
            return map.check(data).map(Some);
        }
        self.expect_data(data)?;
        // The map is read through the entry's data, so that it cannot exceed the data.
        match pax.map(self)? {
            Some((map, len)) => map.check(data.saturating_sub(len)).map(Some),
            None => Ok(None),
        }
    }

    fn expect_data(&mut self, size: u64) -> Result<(), TarError> {
        let block = BLOCK as u64;
        let padded = size
            .checked_next_multiple_of(block)
            .ok_or_else(|| invalid("a size is out of range"))?;
        self.left = size;
        self.padding = padded - size;
        Ok(())
    }

    /// Skips unread data of an entry, and its padding. The stream may end after the data:
    /// some writers omit the padding of the last entry (`umoci insert` 0.4), and all
    /// readers of layers accept this.
    fn skip_rest(&mut self) -> Result<(), TarError> {
        let (data, padding) = (self.left, self.padding);
        (self.left, self.padding) = (0, 0);
        let skipped = match usize::try_from(data + padding) {
            Ok(rest) if rest < BLOCK => read_full(&mut self.inner, &mut [0; BLOCK][..rest])? as u64,
            _ => io::copy(
                &mut self.inner.by_ref().take(data + padding),
                &mut io::sink(),
            )?,
        };
        self.position += skipped;
        if skipped < data {
            return Err(invalid("it is truncated"));
        }
        Ok(())
    }

    /// Reads a header block; `None` at the end: two zero blocks, or the end of the stream
    /// at the start of a header (some writers omit the zero blocks).
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        match read_full(&mut self.inner, &mut block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(invalid("it is truncated")),
        }
        self.position += BLOCK as u64;
        if is_zero(&block) {
            let second = read_full(&mut self.inner, &mut block)?;
            self.position += second as u64;
            return match second == 0 || is_zero(&block) {
                true => Ok(None),
                // Some readers would see later entries and others would not.
                false => Err(invalid("it continues after a zero block")),
            };
        }
        let stated = number(field(&block, 148, 8))?;
        if !has_checksum(&block, stated) {
            return Err(invalid(
                "a header's checksum is wrong: it is not a tar archive",
            ));
        }
        number::check(&block)?;
        Ok(Some(block))
    }

    fn read_small(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENDED {
            return Err(invalid("an extended header is larger than 1 MiB"));
        }
        self.expect_data(size)?;
        let mut bytes = Vec::new();
        self.by_ref().take(size).read_to_end(&mut bytes)?;
        if u64::try_from(bytes.len()).ok() != Some(size) {
            return Err(invalid("it is truncated"));
        }
        self.skip_rest()?;
        Ok(bytes)
    }

    fn read_pax(&mut self, size: u64) -> Result<Extended, TarError> {
        let mut extended = Extended::default();
        self.read_records(size, |key, value| extended.apply(key, value))?;
        Ok(extended)
    }

    /// Reads pax records: `LENGTH KEY=VALUE\n` (POSIX pax, "pax Extended Header").
    fn read_records(
        &mut self,
        size: u64,
        mut apply: impl FnMut(&[u8], &[u8]) -> Result<(), TarError>,
    ) -> Result<(), TarError> {
        let bytes = self.read_small(size)?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (key, value, after) =
                pax_record(rest).ok_or_else(|| invalid("a pax header is malformed"))?;
            rest = after;
            apply(key, value)?;
        }
        Ok(())
    }
}

/// Reads the current entry's data.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.by_ref().take(self.left).read(buffer)?;
        if count == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count64 = u64::try_from(count).unwrap_or(u64::MAX);
        self.left -= count64;
        self.position += count64;
        Ok(count)
    }
}

/// A reader that counts the bytes read.
struct CountingReader<'a, R>(&'a mut R, u64);

impl<R: Read> Read for CountingReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1 += count as u64;
        Ok(count)
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// Returns true if `stated` is the checksum of a header: the sum of its bytes, of which the
/// checksum's own count as spaces. Old writers add up signed bytes.
fn has_checksum(block: &[u8; BLOCK], stated: u64) -> bool {
    fn total(block: &[u8; BLOCK], of: impl Fn(u8) -> u32) -> u64 {
        let others = [field(block, 0, 148), field(block, 156, BLOCK - 156)];
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| of(*byte)).sum::<u32>();
        others.map(|bytes| u64::from(sum(bytes))).iter().sum()
    }
    let unsigned = total(block, u32::from) + 8 * u64::from(b' ');
    // A byte above 127 counts 256 less if it is signed. A negative sum cannot be stated.
    let signed = || unsigned.checked_sub(256 * total(block, |byte| u32::from(byte >> 7)));
    unsigned == stated || signed() == Some(stated)
}

fn check_device(major: u32, minor: u32) -> Result<(), TarError> {
    device_in_range(major, minor).map_err(invalid)
}

/// Checks that a device number fits Linux's 12 and 20 bits. Truncation would produce the
/// number of another device.
///
/// # Errors
/// It does not fit; a clause.
pub fn device_in_range(major: u32, minor: u32) -> Result<(), String> {
    match major < 1 << 12 && minor < 1 << 20 {
        true => Ok(()),
        false => Err(format!("its device number {major}:{minor} is out of range")),
    }
}

/// Fills `to` as far as possible and returns the number of bytes before the end.
fn read_full(from: &mut impl Read, to: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = to.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn read_kind(
    block: &[u8; BLOCK],
    kind: u8,
    path: &[u8],
    extended: &Extended,
) -> Result<TarKind, TarError> {
    let link = || {
        let link = extended
            .link
            .clone()
            .unwrap_or_else(|| until_nul(field(block, 157, 100)).to_vec());
        match link.len() > MAX_PATH {
            true => Err(invalid("its link target is longer than 4095 bytes")),
            false => Ok(link),
        }
    };
    let device = || -> Result<(u32, u32), TarError> {
        let (major, minor) = (small(field(block, 329, 8))?, small(field(block, 337, 8))?);
        check_device(major, minor)?;
        Ok((major, minor))
    };
    Ok(match kind {
        // Before POSIX, a directory was a file whose name ends in a slash.
        0 if path.ends_with(b"/") => TarKind::Directory,
        b'0' | 0 | b'7' | b'S' => TarKind::File,
        b'1' => TarKind::Hardlink(link()?),
        b'2' => TarKind::Symlink(link()?),
        b'3' => device().map(|(major, minor)| TarKind::CharDevice(major, minor))?,
        b'4' => device().map(|(major, minor)| TarKind::BlockDevice(major, minor))?,
        b'5' => TarKind::Directory,
        b'6' => TarKind::Fifo,
        other => {
            let text = format!("its type {:?} is not known", char::from(other));
            return Err(invalid(text));
        }
    })
}

fn field(block: &[u8; BLOCK], start: usize, len: usize) -> &[u8] {
    block.get(start..start + len).unwrap_or_default()
}

/// Returns the bytes before the first zero byte.
fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0);
    bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default()
}

/// Returns the path with its prefix, which only POSIX ustar has; GNU stores times there.
fn ustar_path(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(field(block, 0, 100));
    let prefix = until_nul(field(block, 345, 155));
    if field(block, 257, 6) == b"ustar\0" && !prefix.is_empty() {
        [prefix, b"/", name].concat()
    } else {
        name.to_vec()
    }
}

#[cfg(test)]
mod tests;
