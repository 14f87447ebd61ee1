//! Conversion of a layer in one pass: compressed stream -> digest check -> decompression
//! -> diff_id check -> tar -> *blob* (file contents, each at a 4 KiB boundary), *small
//! files* (contents that go into the metadata image), *index* (everything else), and
//! *skeleton* (which permits reconstruction of the tar stream).
//!
//! The conversion accesses no paths of the host: an entry's path is data.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::rc::Rc;

use crate::Error;
use crate::blob::{BlobWriter, SmallWriter};
use crate::digest::{Digest, HashingReader};
use crate::error::{Cause, ErrorKind, printable};
use crate::index::{
    ContentLocation, Entry, EntryKind, IndexWriter, Meta, SMALL, Totals, Xattrs, encode_xattrs,
};
use crate::limits::Limits;
use crate::pipeline::{self, Decoders, Measured};
use crate::skeleton::Tap;
use sm_tar::{MAX_PATH, TarError, TarHeader, TarKind, TarReader};

/// Maximum length of a directory entry's name (Linux `NAME_MAX`).
const MAX_NAME: usize = 255;
/// Maximum length of an extended attribute's name (Linux `XATTR_NAME_MAX`).
const MAX_XATTR_NAME: usize = 255;
/// Maximum size of the extended attributes of an entry in bytes.
const MAX_XATTRS: usize = 64 << 10;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of other names reserved by AUFS.
const AUFS: &[u8] = b".wh..wh.";

/// Expected properties of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// Digest of the stored stream, and the layer's name in errors.
    pub(crate) digest: Digest,
    /// Size of the stored stream. If it is unknown, `digest` is not that of the stream
    /// either, and only the diff_id is checked.
    pub(crate) size: Option<u64>,
    /// Digest of the contained tar stream, if known.
    pub(crate) diff_id: Option<Digest>,
}

/// The empty files that a layer is converted to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerFiles<'a> {
    pub(crate) blob: &'a File,
    pub(crate) small: &'a File,
    pub(crate) index: &'a File,
    pub(crate) skeleton: &'a File,
}

/// Result of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Converted {
    pub(crate) totals: Totals,
    /// Digest of the tar stream.
    pub(crate) diff_id: Digest,
}

/// Converts a layer. `progress` is called with the number of bytes read of the stored
/// stream.
pub(crate) fn convert(
    stream: impl Read + Send,
    expected: &Expected,
    limits: Limits,
    decoders: &Decoders,
    files: LayerFiles<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Converted, Error> {
    let layer = expected.digest;
    // One more byte than expected is read, to detect a longer stream.
    let longest = limits.stored_bytes();
    let stated = expected.size.unwrap_or(longest);
    check_stated(layer, stated, limits)?;
    let most = stated.saturating_add(1);
    let outcome = pipeline::run(stream, most, limits, decoders, progress, |plain| {
        write(plain, layer, limits, files, false)
    });
    let stored = match (outcome.stored, &outcome.result) {
        (Ok(stored), _) => Some(stored),
        (Err(error), Ok(_)) => return Err(unreadable(layer, &error)),
        // The error of the conversion takes precedence.
        (Err(_), Err(_)) => None,
    };
    // The decompressed stream may be almost empty, and so pass all other limits.
    if let Some(stored) = stored.filter(|_| expected.size.is_none()) {
        check_stated(layer, stored.size, limits)?;
    }
    // A mismatch of digest or size takes precedence over errors that it caused.
    let as_stated =
        |size, stored: Measured| size == stored.size && stored.digest == expected.digest;
    if let Some(stored) = stored
        && !expected.size.is_none_or(|size| as_stated(size, stored))
    {
        return Err(damaged(expected, stored));
    }
    let totals = outcome.result?;
    let diff_id = outcome.uncompressed.digest;
    if let Some(stated) = expected.diff_id.filter(|stated| *stated != diff_id) {
        let text =
            format!("its contents have diff_id {diff_id}, the image's configuration says {stated}");
        return Err(Error::Layer {
            layer: layer.to_string(),
            reason: text.into(),
        });
    }
    Ok(Converted { totals, diff_id })
}

/// Checks the length of a stored layer, as its source announces it or as it was read,
/// against the limits.
pub(crate) fn check_stated(layer: Digest, size: u64, limits: Limits) -> Result<(), Error> {
    limits.check_stored(size).map_err(|error| Error::Layer {
        layer: layer.to_string(),
        reason: Cause::of(&error),
    })
}

/// Result of recreating an index.
#[derive(Debug)]
pub(crate) struct Recreated {
    /// Digest of the whole tar stream, which was read to its end.
    pub(crate) diff_id: Digest,
    /// The totals, or the reason why there is no complete index.
    pub(crate) index: Result<Totals, Error>,
}

/// A reader that stores the error that ends it, which parsers convert to text.
struct Watched<'e, R> {
    inner: R,
    error: &'e RefCell<Option<io::Error>>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.error.borrow_mut().get_or_insert(error);
            }
            kind.into()
        })
    }
}

/// Recreates the index of a tar stream, without its contents.
///
/// # Errors
/// The stream cannot be read to its end.
pub(crate) fn index_again(stream: impl Read, index: &File) -> io::Result<Recreated> {
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    let files = LayerFiles {
        blob: &null,
        small: &null,
        index,
        skeleton: &null,
    };
    let unknown = Digest::of(b"");
    let error = RefCell::new(None);
    let watched = Watched {
        inner: stream,
        error: &error,
    };
    let mut stream = HashingReader::new(watched, Rc::default());
    let index = write(&mut stream, unknown, Limits::NONE, files, true);
    // The digest is that of the whole stream, however much of it was parsed.
    if error.borrow().is_none() {
        // Its error is in `error`, too.
        let _ = stream.drain();
    }
    let (diff_id, _) = stream.finish();
    match error.take() {
        Some(error) => Err(error),
        None => Ok(Recreated { diff_id, index }),
    }
}

/// Writes the files of a layer from its tar stream. If `dry`, contents are not written.
fn write(
    stream: impl Read,
    layer: Digest,
    limits: Limits,
    files: LayerFiles<'_>,
    dry: bool,
) -> Result<Totals, Error> {
    let unwritable = |error| unwritable(layer, &error);
    let tap = Tap::new(stream, files.skeleton).map_err(unwritable)?;
    let mut writer = LayerWriter {
        reader: TarReader::new(tap),
        blob: match dry {
            true => BlobWriter::dry(files.blob),
            false => BlobWriter::new(files.blob),
        },
        small: SmallWriter::new(files.small),
        index: IndexWriter::new(files.index).map_err(unwritable)?,
        layer,
        limits,
    };
    writer.entries()?;
    writer.finish()
}

fn unreadable(layer: Digest, error: &io::Error) -> Error {
    Error::Layer {
        layer: layer.to_string(),
        reason: match error.kind() {
            io::ErrorKind::UnexpectedEof => "it is truncated".into(),
            _ => Cause::of(error),
        },
    }
}

fn damaged(expected: &Expected, stored: Measured) -> Error {
    let stated = expected.size.unwrap_or_default();
    let reason = match stored.size.cmp(&stated) {
        Ordering::Less => format!("it has {} bytes instead of {stated}", stored.size),
        Ordering::Greater => format!("it has more than {stated} bytes"),
        Ordering::Equal => format!("its contents have digest {}", stored.digest),
    };
    Error::Blob {
        digest: expected.digest.to_string(),
        reason,
    }
}

fn unwritable(layer: Digest, error: &io::Error) -> Error {
    Error::Layer {
        layer: layer.to_string(),
        reason: write_failure(error),
    }
}

fn write_failure(error: &io::Error) -> Cause {
    Cause::with(format!("the store cannot be written: {error}"), error).or(ErrorKind::Io)
}

/// The state of converting a tar stream to a layer's files.
struct LayerWriter<'f, R> {
    reader: TarReader<Tap<'f, R>>,
    blob: BlobWriter<'f>,
    small: SmallWriter<'f>,
    index: IndexWriter<'f>,
    layer: Digest,
    limits: Limits,
}

impl<R: Read> LayerWriter<'_, R> {
    fn entries(&mut self) -> Result<(), Error> {
        let (layer, limits) = (self.layer, self.limits);
        let refuse = |path: &[u8], reason: Cause| Error::Entry {
            layer: layer.to_string(),
            entry: printable(path),
            reason,
        };
        let whole = |reason: Cause| Error::Layer {
            layer: layer.to_string(),
            reason,
        };
        let tar_error = |error: TarError| match error.entry {
            Some(path) => refuse(&path, error.reason.into()),
            None => whole(error.reason.into()),
        };
        while let Some(header) = self.reader.next_entry().map_err(tar_error)? {
            limits
                .check_entries(self.index.entries(), self.index.len())
                .map_err(whole)?;
            self.entry(&header)
                .map_err(|reason| refuse(&header.path, reason))?;
        }
        Ok(())
    }

    /// Writes an entry to the index, and its data to the blob or the small files.
    fn entry(&mut self, header: &TarHeader) -> Result<(), Cause> {
        let path = normalize(&header.path)?;
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        if name.starts_with(WHITEOUT) {
            let Some((path, kind)) = whiteout(&path, name)? else {
                return Ok(());
            };
            return self.push(&path, kind, Meta::default(), &[]);
        }
        let target;
        let kind = match &header.kind {
            TarKind::File => {
                let location = self.contents(header).map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => "the layer is truncated here".into(),
                    _ => Cause::of(&error),
                })?;
                EntryKind::File {
                    location,
                    size: header.size,
                }
            }
            TarKind::Directory => EntryKind::Directory,
            TarKind::Symlink(target) if target.is_empty() => {
                return Err("it is a symbolic link without a target".into());
            }
            TarKind::Symlink(target) => EntryKind::Symlink(target),
            TarKind::Hardlink(linked) => {
                target = normalize(linked)
                    .map_err(|reason| format!("it is a hard link, and {reason}"))?;
                EntryKind::Hardlink(&target)
            }
            TarKind::CharDevice(major, minor) => EntryKind::CharDevice(*major, *minor),
            TarKind::BlockDevice(major, minor) => EntryKind::BlockDevice(*major, *minor),
            TarKind::Fifo => EntryKind::Fifo,
        };
        if path.is_empty() && kind != EntryKind::Directory {
            return Err("the root of the file system is not a directory".into());
        }
        check_xattrs(&header.xattrs)?;
        let meta = Meta {
            mode: header.mode,
            uid: header.uid,
            gid: header.gid,
            mtime: header.mtime,
        };
        self.push(&path, kind, meta, &header.xattrs)
    }

    fn push(
        &mut self,
        path: &[u8],
        kind: EntryKind<'_>,
        meta: Meta,
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), Cause> {
        let xattrs = encode_xattrs(xattrs).ok_or("an extended attribute is too long")?;
        let entry = Entry {
            path,
            kind,
            meta,
            xattrs: Xattrs::encoded(&xattrs),
        };
        self.index
            .push(&entry)
            .map_err(|error| write_failure(&error))
    }

    /// Moves a file's data to the blob or the small files.
    fn contents(&mut self, header: &TarHeader) -> io::Result<ContentLocation> {
        let before = self.blob.position().saturating_add(self.small.position());
        self.limits
            .check_contents(before.saturating_add(header.size))?;
        if let Some(extents) = &header.sparse {
            return self.sparse(header.size, extents);
        }
        let size = header.size;
        self.reader.stream().start_contents();
        let location = match size <= SMALL {
            true => {
                let location = ContentLocation::Small(self.small.position());
                self.small.append(&mut self.reader, size)?;
                location
            }
            false => {
                let location = ContentLocation::Blob(self.blob.position());
                self.blob.append(&mut self.reader, size)?;
                self.blob.pad()?;
                location
            }
        };
        self.reader.stream().end_contents(location, size)?;
        Ok(location)
    }

    /// Writes a file with holes, which is always in the blob.
    fn sparse(&mut self, size: u64, extents: &[(u64, u64)]) -> io::Result<ContentLocation> {
        let begin = self.blob.position();
        let mut at = 0;
        for (offset, len) in extents {
            self.blob.append_zeros(offset - at)?;
            let location = ContentLocation::Blob(self.blob.position());
            self.reader.stream().start_contents();
            self.blob.append(&mut self.reader, *len)?;
            self.reader.stream().end_contents(location, *len)?;
            at = offset + len;
        }
        self.blob.append_zeros(size - at)?;
        self.blob.pad()?;
        Ok(ContentLocation::Blob(begin))
    }

    /// Reads the data after the end of the archive, which is part of the diff_id, and
    /// completes the files.
    fn finish(mut self) -> Result<Totals, Error> {
        let layer = self.layer;
        let entries = self.index.entries();
        let tar_len = self
            .reader
            .drain()
            .map_err(|error| unreadable(layer, &error))?;
        let complete = || -> io::Result<Totals> {
            let totals = Totals {
                entries,
                blob_len: self.blob.finish()?,
                small_len: self.small.finish()?,
                tar_len,
            };
            self.index.finish(totals)?;
            self.reader.into_stream().finish()?;
            Ok(totals)
        };
        complete().map_err(|error| unwritable(layer, &error))
    }
}

/// Checks that an entry's extended attributes do not exceed the limits of an inode.
pub(crate) fn check_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), String> {
    let bytes: usize = xattrs.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > MAX_XATTRS {
        return Err("its extended attributes are larger than 64 KiB".to_owned());
    }
    if xattrs.iter().any(|(name, _)| name.len() > MAX_XATTR_NAME) {
        return Err("the name of an extended attribute is longer than 255 bytes".to_owned());
    }
    Ok(())
}

fn whiteout(path: &[u8], name: &[u8]) -> Result<Option<(Vec<u8>, EntryKind<'static>)>, String> {
    let parent = path.get(..path.len() - name.len()).unwrap_or_default();
    let parent = parent.strip_suffix(b"/").unwrap_or(parent);
    if name == OPAQUE {
        return Ok(Some((parent.to_vec(), EntryKind::Opaque)));
    }
    if name.starts_with(AUFS) {
        return Ok(None);
    }
    let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
    if matches!(hidden, b"" | b"." | b"..") {
        return Err("it is a whiteout of an invalid name".to_owned());
    }
    let mut target = parent.to_vec();
    if !target.is_empty() {
        target.push(b'/');
    }
    target.extend_from_slice(hidden);
    Ok(Some((target, EntryKind::Whiteout)))
}

/// Removes leading slashes, `.` and empty components. Paths that are not valid in a file
/// system are refused.
fn normalize(path: &[u8]) -> Result<Vec<u8>, String> {
    let mut normal = Vec::with_capacity(path.len());
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return Err("its path leaves the file system (\"..\")".to_owned()),
            part if part.len() > MAX_NAME => {
                return Err("a name in its path is longer than 255 bytes".to_owned());
            }
            part if part.contains(&0) => return Err("its path contains a zero byte".to_owned()),
            part => {
                if !normal.is_empty() {
                    normal.push(b'/');
                }
                normal.extend_from_slice(part);
            }
        }
    }
    if normal.len() > MAX_PATH {
        return Err("its path is longer than 4095 bytes".to_owned());
    }
    Ok(normal)
}

#[cfg(test)]
mod tests;
