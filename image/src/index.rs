//! The *index* of a layer: everything in it except file contents, in the order of the
//! layer.
//!
//! An index is a file of records that is written and read as a stream, without memory for
//! each entry. All numbers are little-endian. Every record starts at a multiple of eight
//! bytes, so that the file can also be mapped and traversed in place.
//!
//! ```text
//! header   magic, version, counts and lengths (see `IndexHeader`)
//! record   fixed part (see `Fixed`), path, target of a link, extended attributes
//! ...
//! ```
//!
//! An extended attribute consists of two lengths (`u16` each), its name and its value.
//!
//! The header is written last, because it marks an index as complete. A reader checks
//! every record nevertheless.

mod encoding;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;

use self::encoding::{FIXED_LEN, Fixed, HEADER_BYTES, IndexHeader};

const MAGIC: [u8; 8] = *b"sm-layer";
/// Format version. After a change, layers of other versions are converted again.
const VERSION: u32 = 3;
const ALIGN: usize = 8;
const HEADER_LEN: u64 = HEADER_BYTES as u64;
/// Maximum length of a record in bytes, far above that of valid entries.
const MAX_RECORD: usize = 256 << 10;
const BUFFER: usize = 256 << 10;

/// Maximum size of contents in the metadata image, in bytes. Larger contents start a
/// block of the blob, where they are shared by all images with the layer and waste at
/// most half a block.
pub(crate) const SMALL: u64 = 2048;
/// Alignment of contents in the blob, in bytes.
const BLOCK: u64 = 4096;

/// Owner, mode and times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch and nanoseconds.
    pub(crate) mtime: (i64, u32),
}

/// Location of a file's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentLocation {
    /// Offset in the layer's blob, at a block boundary.
    Blob(u64),
    /// Offset in the contents of the layer's small files, without alignment.
    Small(u64),
}

/// Type of a layer's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind<'a> {
    File {
        location: ContentLocation,
        size: u64,
    },
    Directory,
    Symlink(&'a [u8]),
    /// Another name for a path in this layer or below.
    Hardlink(&'a [u8]),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    /// The path is removed (OCI image-spec layer.md, "Whiteouts").
    Whiteout,
    /// The contents of this directory in lower layers are removed.
    Opaque,
}

/// An entry. `path` has no empty, `.` or `..` component; it is empty for the root itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) kind: EntryKind<'a>,
    pub(crate) meta: Meta,
    pub(crate) xattrs: Xattrs<'a>,
}

/// Encoded extended attributes of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Xattrs<'a>(&'a [u8]);

impl<'a> Xattrs<'a> {
    /// Wraps encoded attributes.
    pub(crate) fn encoded(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(self) -> &'a [u8] {
        self.0
    }

    /// Iterates over names and values, up to the first invalid one.
    pub(crate) fn iter(self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (name_len, after) = rest.split_first_chunk()?;
            let (value_len, after) = after.split_first_chunk()?;
            let (name_len, value_len) = (
                u16::from_le_bytes(*name_len),
                u16::from_le_bytes(*value_len),
            );
            let (name, after) = after.split_at_checked(usize::from(name_len))?;
            let (value, after) = after.split_at_checked(usize::from(value_len))?;
            rest = after;
            Some((name, value))
        })
    }
}

/// Encodes extended attributes. Returns `None` if a name or value is longer than 65535
/// bytes.
pub(crate) fn encode_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for (name, value) in xattrs {
        bytes.extend_from_slice(&u16::try_from(name.len()).ok()?.to_le_bytes());
        bytes.extend_from_slice(&u16::try_from(value.len()).ok()?.to_le_bytes());
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(value);
    }
    Some(bytes)
}

/// Totals of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) entries: u64,
    /// Length of the blob in bytes; a multiple of the block size.
    pub(crate) blob_len: u64,
    /// Length of the small files' contents in bytes.
    pub(crate) small_len: u64,
    /// Length of the tar stream in bytes.
    pub(crate) tar_len: u64,
}

const FILE: u16 = 1;
const SMALL_FILE: u16 = 2;
const DIRECTORY: u16 = 3;
const SYMLINK: u16 = 4;
const HARDLINK: u16 = 5;
const CHAR_DEVICE: u16 = 6;
const BLOCK_DEVICE: u16 = 7;
const FIFO: u16 = 8;
const WHITEOUT: u16 = 9;
const OPAQUE: u16 = 10;

/// Returns the number of a kind, the values of `a` and `b`, and the link.
fn describe<'a>(kind: &EntryKind<'a>) -> (u16, u64, u64, &'a [u8]) {
    let none: &[u8] = &[];
    match *kind {
        EntryKind::File {
            location: ContentLocation::Blob(at),
            size,
        } => (FILE, at, size, none),
        EntryKind::File {
            location: ContentLocation::Small(at),
            size,
        } => (SMALL_FILE, at, size, none),
        EntryKind::Directory => (DIRECTORY, 0, 0, none),
        EntryKind::Symlink(target) => (SYMLINK, 0, 0, target),
        EntryKind::Hardlink(target) => (HARDLINK, 0, 0, target),
        EntryKind::CharDevice(a, b) => (CHAR_DEVICE, a.into(), b.into(), none),
        EntryKind::BlockDevice(a, b) => (BLOCK_DEVICE, a.into(), b.into(), none),
        EntryKind::Fifo => (FIFO, 0, 0, none),
        EntryKind::Whiteout => (WHITEOUT, 0, 0, none),
        EntryKind::Opaque => (OPAQUE, 0, 0, none),
    }
}

/// Writer of an index.
pub(crate) struct IndexWriter<'a> {
    file: &'a File,
    out: BufWriter<&'a File>,
    record: Vec<u8>,
    entries: u64,
    records_len: u64,
    hides: bool,
}

impl<'a> IndexWriter<'a> {
    /// Starts an index in an empty file.
    pub(crate) fn new(file: &'a File) -> io::Result<Self> {
        let mut out = BufWriter::with_capacity(BUFFER, file);
        out.seek(SeekFrom::Start(HEADER_LEN))?;
        Ok(Self {
            file,
            out,
            record: Vec::new(),
            entries: 0,
            records_len: 0,
            hides: false,
        })
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Returns the length of all records so far in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.records_len
    }

    pub(crate) fn push(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let too_long = |_| io::Error::other("an entry is too long for the index");
        let (kind, a, b, link) = describe(&entry.kind);
        let xattrs = entry.xattrs.bytes();
        let len = FIXED_LEN + entry.path.len() + link.len() + xattrs.len();
        let len = len.next_multiple_of(ALIGN);
        let fixed = Fixed {
            len: u32::try_from(len).map_err(too_long)?,
            kind,
            mode: entry.meta.mode,
            uid: entry.meta.uid,
            gid: entry.meta.gid,
            seconds: entry.meta.mtime.0,
            nanoseconds: entry.meta.mtime.1,
            xattrs_len: u32::try_from(xattrs.len()).map_err(too_long)?,
            path_len: u16::try_from(entry.path.len()).map_err(too_long)?,
            link_len: u16::try_from(link.len()).map_err(too_long)?,
            a,
            b,
        };
        self.record.clear();
        fixed.encode(&mut self.record);
        for part in [entry.path, link, xattrs] {
            self.record.extend_from_slice(part);
        }
        self.record.resize(len, 0);
        self.out.write_all(&self.record)?;
        self.hides |= matches!(entry.kind, EntryKind::Whiteout | EntryKind::Opaque);
        self.entries += 1;
        self.records_len += len as u64;
        Ok(())
    }

    /// Writes the header, which completes the index.
    pub(crate) fn finish(mut self, totals: Totals) -> io::Result<()> {
        self.out.flush()?;
        let header = IndexHeader {
            magic: MAGIC,
            version: VERSION,
            hides: self.hides.into(),
            records_len: self.records_len,
            totals: Totals {
                entries: self.entries,
                ..totals
            },
        };
        self.file.write_all_at(&header.encode(), 0)
    }
}

/// Reader of an index, which can be rewound.
#[derive(Debug)]
pub(crate) struct IndexReader {
    input: BufReader<File>,
    record: Vec<u8>,
    totals: Totals,
    records_len: u64,
    /// Length of the records that have not been read yet.
    left: u64,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the index of a layer is damaged: {what}"),
    )
}

impl IndexReader {
    /// Opens an index. Returns `None` if it has another version or is incomplete.
    pub(crate) fn open(file: File) -> io::Result<Option<Self>> {
        let mut bytes = [0; HEADER_BYTES];
        let len = file.metadata()?.len();
        if len < HEADER_LEN {
            return Ok(None);
        }
        file.read_exact_at(&mut bytes, 0)?;
        let header = IndexHeader::decode(&bytes);
        let records_len = header.records_len;
        if header.magic != MAGIC
            || header.version != VERSION
            || records_len.checked_add(HEADER_LEN) != Some(len)
        {
            return Ok(None);
        }
        let mut reader = Self {
            input: BufReader::with_capacity(BUFFER, file),
            record: Vec::new(),
            totals: header.totals,
            records_len,
            left: 0,
        };
        reader.rewind()?;
        Ok(Some(reader))
    }

    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Continues with the first entry.
    pub(crate) fn rewind(&mut self) -> io::Result<()> {
        self.input.seek(SeekFrom::Start(HEADER_LEN))?;
        self.left = self.records_len;
        Ok(())
    }

    /// Returns the next entry, `None` at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry<'_>>> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut fixed = [0; FIXED_LEN];
        self.input.read_exact(&mut fixed)?;
        let fixed = Fixed::decode(&fixed);
        let len = fixed.len as usize;
        let parts = [
            usize::from(fixed.path_len),
            usize::from(fixed.link_len),
            fixed.xattrs_len as usize,
        ];
        let needed = parts
            .iter()
            .try_fold(FIXED_LEN, |sum, part| sum.checked_add(*part))
            .ok_or_else(|| damaged("a length"))?;
        if len < needed || len > MAX_RECORD || !len.is_multiple_of(ALIGN) {
            return Err(damaged("a length"));
        }
        self.left = self
            .left
            .checked_sub(len as u64)
            .ok_or_else(|| damaged("its end"))?;
        self.record.resize(len - FIXED_LEN, 0);
        self.input.read_exact(&mut self.record)?;
        let rest = self.record.as_slice();
        let cut = |rest: &'_ [u8], len| -> io::Result<()> {
            rest.get(..len).map(drop).ok_or_else(|| damaged("a length"))
        };
        cut(rest, parts[0] + parts[1] + parts[2])?;
        let (path, rest) = rest.split_at(parts[0]);
        let (link, rest) = rest.split_at(parts[1]);
        let xattrs = &rest[..parts[2]];
        check_path(path)?;
        Ok(Some(Entry {
            path,
            kind: kind(&fixed, link, self.totals)?,
            meta: Meta {
                mode: fixed.mode & 0o7777,
                uid: fixed.uid,
                gid: fixed.gid,
                mtime: (fixed.seconds, fixed.nanoseconds.min(999_999_999)),
            },
            xattrs: Xattrs(xattrs),
        }))
    }
}

fn check_path(path: &[u8]) -> io::Result<()> {
    let sound = path.is_empty()
        || path
            .split(|byte| *byte == b'/')
            .all(|part| !matches!(part, b"" | b"." | b"..") && part.len() <= 255);
    sound.then_some(()).ok_or_else(|| damaged("a path"))
}

fn kind<'a>(fixed: &Fixed, link: &'a [u8], totals: Totals) -> io::Result<EntryKind<'a>> {
    let (a, b) = (fixed.a, fixed.b);
    let device = || -> io::Result<(u32, u32)> {
        match (u32::try_from(a), u32::try_from(b)) {
            (Ok(major), Ok(minor)) => Ok((major, minor)),
            _ => Err(damaged("a device")),
        }
    };
    let inside = |total: u64| match a.checked_add(b).is_some_and(|end| end <= total) {
        true => Ok(()),
        false => Err(damaged("a file's place")),
    };
    Ok(match fixed.kind {
        FILE => {
            inside(totals.blob_len)?;
            if !a.is_multiple_of(BLOCK) {
                return Err(damaged("a file's place"));
            }
            EntryKind::File {
                location: ContentLocation::Blob(a),
                size: b,
            }
        }
        SMALL_FILE => {
            inside(totals.small_len)?;
            if b > SMALL {
                return Err(damaged("a file's size"));
            }
            EntryKind::File {
                location: ContentLocation::Small(a),
                size: b,
            }
        }
        DIRECTORY => EntryKind::Directory,
        SYMLINK => EntryKind::Symlink(link),
        HARDLINK => EntryKind::Hardlink(link),
        CHAR_DEVICE => device().map(|(major, minor)| EntryKind::CharDevice(major, minor))?,
        BLOCK_DEVICE => device().map(|(major, minor)| EntryKind::BlockDevice(major, minor))?,
        FIFO => EntryKind::Fifo,
        WHITEOUT => EntryKind::Whiteout,
        OPAQUE => EntryKind::Opaque,
        _ => return Err(damaged("a kind")),
    })
}

#[cfg(test)]
mod tests;
