//! A layer, read once: compressed stream -> digest check -> decompression ->
//! diff_id check -> tar -> *blob* (file contents, each at a 4 KiB boundary) and
//! *index* (everything else).
//!
//! Nothing here touches paths of the host: an entry's path is data.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::blob::BlobWriter;
use crate::digest::Digest;
use crate::limits::Limits;
use crate::pipeline::{self, Measured};
use crate::tar::{Header, Kind, MAX_PATH, Reader, TarError};

/// Granule of file contents in a blob, in bytes: a block of the disk.
pub(crate) const BLOCK_SIZE: u64 = 4096;
/// Longest name of a directory entry (Linux `NAME_MAX`).
const MAX_NAME: usize = 255;
/// Longest name of an extended attribute (Linux `XATTR_NAME_MAX`).
const MAX_XATTR_NAME: usize = 255;
/// Most bytes of extended attributes of one entry.
const MAX_XATTRS: usize = 64 << 10;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names that AUFS kept for itself.
const AUFS: &[u8] = b".wh..wh.";

/// What a layer says about a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EntryKind {
    /// Contents are in the layer's blob.
    File {
        offset: u64,
        size: u64,
    },
    Directory,
    Symlink(Vec<u8>),
    /// Another name of a path, in this layer or below.
    Hardlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    /// The path is not there any more (OCI image-spec layer.md, "Whiteouts").
    Whiteout,
    /// Nothing that lower layers have in this directory is there any more.
    Opaque,
}

/// Owner, mode, times and extended attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Meta {
    /// Permission bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since the epoch and nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One entry. `path` has no empty, `.` or `..` component; it is empty for the
/// root itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) meta: Meta,
}

/// What a layer contains, in its own order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerIndex {
    pub(crate) entries: Vec<Entry>,
    /// Length of the blob in bytes; a multiple of [`BLOCK_SIZE`].
    pub(crate) blob_len: u64,
    /// Length of the tar stream in bytes.
    pub(crate) tar_len: u64,
}

/// What is written down about a layer before it is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// Digest of the stream as it is stored, and the layer's name in errors.
    pub(crate) digest: Digest,
    /// Its size; where it is not written down, `digest` is not that of the
    /// stream either, and the diff_id alone decides.
    pub(crate) size: Option<u64>,
    /// Digest of the tar stream in it.
    pub(crate) diff_id: Digest,
}

/// Converts a layer. `progress` is called with bytes of the stored stream read.
pub(crate) fn convert(
    stream: impl Read + Send,
    expected: &Expected,
    limits: Limits,
    blob: &File,
    progress: &mut dyn FnMut(u64),
) -> Result<LayerIndex, Error> {
    let layer = expected.digest;
    // One byte more than there should be shows that there is more.
    let most = expected
        .size
        .map_or(u64::MAX, |size| size.saturating_add(1));
    let outcome = pipeline::run(stream, most, limits, progress, |plain| {
        let mut reader = Reader::new(&mut *plain);
        let index = read_entries(&mut reader, blob, layer, limits)?;
        // What follows the end of the archive is part of the diff_id.
        plain.drain().map_err(|error| unreadable(layer, &error))?;
        Ok(index)
    });
    let stored = match (outcome.stored, &outcome.made) {
        (Ok(stored), _) => stored,
        (Err(error), Ok(_)) => return Err(unreadable(layer, &error)),
        (Err(_), Err(_)) => return outcome.made,
    };
    // A damaged stream is called that, whatever was stumbled over first.
    let as_stated = |size| size == stored.size && stored.digest == expected.digest;
    if !expected.size.is_none_or(as_stated) {
        return Err(damaged(expected, stored));
    }
    let mut index = outcome.made?;
    if outcome.plain.digest != expected.diff_id {
        return Err(Error::Layer {
            layer: layer.to_string(),
            reason: format!(
                "its contents have diff_id {}, the image's configuration says {}",
                outcome.plain.digest, expected.diff_id
            ),
        });
    }
    index.tar_len = outcome.plain.size;
    Ok(index)
}

fn unreadable(layer: Digest, error: &io::Error) -> Error {
    Error::Layer {
        layer: layer.to_string(),
        reason: match error.kind() {
            io::ErrorKind::UnexpectedEof => "it is truncated".to_owned(),
            _ => error.to_string(),
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

fn read_entries<R: Read>(
    reader: &mut Reader<R>,
    blob: &File,
    layer: Digest,
    limits: Limits,
) -> Result<LayerIndex, Error> {
    let mut writer = BlobWriter::new(blob);
    let mut entries = Vec::new();
    let refuse = |path: &[u8], reason: String| Error::Entry {
        layer: layer.to_string(),
        entry: String::from_utf8_lossy(path).into_owned(),
        reason,
    };
    let tar_error = |error: TarError| match error.entry {
        Some(path) => refuse(&path, error.reason),
        None => Error::Layer {
            layer: layer.to_string(),
            reason: error.reason,
        },
    };
    while let Some(header) = reader.next_entry().map_err(tar_error)? {
        if entries.len() >= limits.entries {
            return Err(Error::Layer {
                layer: layer.to_string(),
                reason: format!("it has more than {} entries", limits.entries),
            });
        }
        let path = header.path.clone();
        let entry =
            entry(header, reader, &mut writer, limits).map_err(|reason| refuse(&path, reason))?;
        entries.extend(entry);
    }
    let blob_len = writer.finish().map_err(|error| Error::Layer {
        layer: layer.to_string(),
        reason: format!("its contents cannot be written: {error}"),
    })?;
    Ok(LayerIndex {
        entries,
        blob_len,
        tar_len: 0,
    })
}

/// Turns a header into an entry, moving its data to the blob. `None` for what
/// has no meaning here.
fn entry<R: Read>(
    header: Header,
    reader: &mut Reader<R>,
    blob: &mut BlobWriter<'_>,
    limits: Limits,
) -> Result<Option<Entry>, String> {
    let path = normalize(&header.path)?;
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    if name.starts_with(WHITEOUT) {
        return whiteout(&path, name).map(|marked| {
            marked.map(|(path, kind)| Entry {
                path,
                kind,
                meta: Meta::default(),
            })
        });
    }
    let kind = match header.kind {
        Kind::File => {
            let offset = blob.position();
            contents(&header, reader, blob, limits).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => "the layer is truncated here".to_owned(),
                _ => error.to_string(),
            })?;
            EntryKind::File {
                offset,
                size: header.size,
            }
        }
        Kind::Directory => EntryKind::Directory,
        Kind::Symlink(target) if target.is_empty() => {
            return Err("it is a symbolic link to nothing".to_owned());
        }
        Kind::Symlink(target) => EntryKind::Symlink(target),
        Kind::Hardlink(target) => EntryKind::Hardlink(
            normalize(&target).map_err(|reason| format!("it is a hard link, and {reason}"))?,
        ),
        Kind::CharDevice(major, minor) => EntryKind::CharDevice(major, minor),
        Kind::BlockDevice(major, minor) => EntryKind::BlockDevice(major, minor),
        Kind::Fifo => EntryKind::Fifo,
    };
    if path.is_empty() && kind != EntryKind::Directory {
        return Err("the root of the file system is not a directory".to_owned());
    }
    check_xattrs(&header.xattrs)?;
    Ok(Some(Entry {
        path,
        kind,
        meta: Meta {
            mode: header.mode,
            uid: header.uid,
            gid: header.gid,
            mtime: header.mtime,
            xattrs: header.xattrs,
        },
    }))
}

/// Moves a file's data to the blob.
fn contents<R: Read>(
    header: &Header,
    reader: &mut Reader<R>,
    blob: &mut BlobWriter<'_>,
    limits: Limits,
) -> io::Result<()> {
    limits.check_contents(blob.position().saturating_add(header.size))?;
    match &header.sparse {
        None => blob.append(reader, header.size)?,
        Some(extents) => {
            let mut at = 0;
            for (offset, len) in extents {
                blob.append_zeros(offset - at)?;
                blob.append(reader, *len)?;
                at = offset + len;
            }
            blob.append_zeros(header.size - at)?;
        }
    }
    blob.pad()
}

fn check_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), String> {
    let bytes: usize = xattrs.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > MAX_XATTRS {
        return Err("its extended attributes are larger than 64 KiB".to_owned());
    }
    if xattrs.iter().any(|(name, _)| name.len() > MAX_XATTR_NAME) {
        return Err("the name of an extended attribute is longer than 255 bytes".to_owned());
    }
    Ok(())
}

fn whiteout(path: &[u8], name: &[u8]) -> Result<Option<(Vec<u8>, EntryKind)>, String> {
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
        return Err("it is a whiteout of no valid name".to_owned());
    }
    let mut target = parent.to_vec();
    if !target.is_empty() {
        target.push(b'/');
    }
    target.extend_from_slice(hidden);
    Ok(Some((target, EntryKind::Whiteout)))
}

/// Removes leading slashes, `.` and empty components; refuses what has no place
/// in a file system of its own.
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
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, data) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            // The builder refuses some of the paths that we want to see refused.
            let name = &mut header.as_old_mut().name;
            name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn expected(stored: &[u8], tar: &[u8]) -> Expected {
        Expected {
            digest: Digest::of(stored),
            size: Some(stored.len() as u64),
            diff_id: Digest::of(tar),
        }
    }

    fn run(stored: &[u8], expected: &Expected) -> (Result<LayerIndex, Error>, File) {
        let blob = tempfile::tempfile().unwrap();
        (
            convert(stored, expected, Limits::default(), &blob, &mut |_| {}),
            blob,
        )
    }

    #[test]
    fn all_compressions_give_the_same_layer() {
        let tar = tar(&[("a", b"hello"), ("d/b", &[3; 5000])]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
        for stored in [&tar, &gzip, &zstd] {
            let (index, blob) = run(stored, &expected(stored, &tar));
            let index = index.unwrap();
            assert_eq!(index.blob_len, 4096 + 8192);
            assert_eq!(index.tar_len, tar.len() as u64);
            let EntryKind::File { offset, size } = index.entries[1].kind else {
                panic!("a file");
            };
            let mut data = vec![0; usize::try_from(size).unwrap()];
            blob.read_exact_at(&mut data, offset).unwrap();
            assert_eq!((offset, data), (4096, vec![3; 5000]));
        }
    }

    #[test]
    fn damage_is_noticed() {
        let tar = tar(&[("a", b"hello")]);
        let good = expected(&tar, &tar);
        let wrong_digest = Expected {
            digest: Digest::of(b"x"),
            ..good
        };
        assert!(matches!(
            run(&tar, &wrong_digest).0,
            Err(Error::Blob { .. })
        ));
        let wrong_size = Expected {
            size: Some(7000),
            ..good
        };
        assert!(run(&tar, &wrong_size).0.is_err());
        let wrong_diff = Expected {
            diff_id: Digest::of(b"x"),
            ..good
        };
        let error = run(&tar, &wrong_diff).0.unwrap_err().to_string();
        assert!(error.contains("diff_id"), "{error}");
        let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
        let cut = &zstd[..zstd.len() - 5];
        assert!(run(cut, &expected(cut, &tar)).0.is_err());
    }

    #[test]
    fn hostile_paths_are_refused_by_name() {
        for path in ["../x", "a/../../x", "/../x", "a/.wh..", "b/.wh."] {
            let tar = tar(&[(path, b"x")]);
            let error = run(&tar, &expected(&tar, &tar)).0.unwrap_err();
            let text = error.to_string();
            assert!(
                matches!(error, Error::Entry { .. }) && text.contains(path),
                "{text}"
            );
        }
    }

    #[test]
    fn whiteouts_become_entries() {
        let tar = tar(&[
            ("d/.wh.gone", b""),
            ("d/.wh..wh..opq", b""),
            (".wh.top", b""),
            (".wh..wh.plnk", b""),
            ("/abs/./x", b""),
        ]);
        let index = run(&tar, &expected(&tar, &tar)).0.unwrap();
        let seen: Vec<_> = index
            .entries
            .iter()
            .map(|e| (String::from_utf8_lossy(&e.path).into_owned(), &e.kind))
            .collect();
        assert_eq!(seen[0], ("d/gone".into(), &EntryKind::Whiteout));
        assert_eq!(seen[1], ("d".into(), &EntryKind::Opaque));
        assert_eq!(seen[2], ("top".into(), &EntryKind::Whiteout));
        assert_eq!(seen[3].0, "abs/x");
        assert_eq!(seen.len(), 4);
    }

    #[test]
    fn zeros_take_no_space() {
        use std::os::unix::fs::MetadataExt as _;
        let tar = tar(&[("z", &vec![0; 8 << 20]), ("a", b"x")]);
        let (index, blob) = run(&tar, &expected(&tar, &tar));
        assert_eq!(index.unwrap().blob_len, (8 << 20) + 4096);
        assert!(blob.metadata().unwrap().blocks() * 512 < 1 << 20);
    }
}
