//! A layer, read once: compressed stream -> digest check -> decompression ->
//! diff_id check -> tar -> *blob* (file contents, each at a 4 KiB boundary) and
//! *index* (everything else).
//!
//! Nothing here touches paths of the host: an entry's path is data.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt as _;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::digest::{Digest, HashingReader};
use crate::tar::{Header, Kind, MAX_PATH, Reader, TarError};

/// Granule of file contents in a blob, in bytes: a block of the disk.
pub(crate) const BLOCK_SIZE: u64 = 4096;
/// Longest name of a directory entry (Linux `NAME_MAX`).
const MAX_NAME: usize = 255;
/// Most bytes that a layer may decompress to.
pub(crate) const MAX_LAYER: u64 = 64 << 30;
/// Most entries of a layer.
const MAX_ENTRIES: usize = 4 << 20;
/// Most bytes of extended attributes of one entry.
const MAX_XATTRS: usize = 64 << 10;
/// Largest window of a zstd stream, as a power of two (32 MiB).
const ZSTD_WINDOW_LOG: u32 = 25;

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
    stream: impl Read,
    expected: &Expected,
    blob: &File,
    progress: &mut dyn FnMut(u64),
) -> Result<LayerIndex, Error> {
    let layer = expected.digest;
    let unreadable = |error: io::Error| Error::Layer {
        layer: layer.to_string(),
        reason: match error.kind() {
            io::ErrorKind::UnexpectedEof => "it is truncated".to_owned(),
            _ => error.to_string(),
        },
    };
    let limit = expected
        .size
        .map_or(u64::MAX, |size| size.saturating_add(1));
    let mut stored = HashingReader::new(stream.take(limit));
    let (mut index, diff_id, tar_len) = {
        let buffered = BufReader::with_capacity(128 * 1024, &mut stored);
        let plain = decompress(buffered).map_err(unreadable)?;
        let mut reader = Reader::new(HashingReader::new(plain.take(MAX_LAYER)));
        let index = read_entries(&mut reader, blob, layer, progress)?;
        let mut rest = reader.into_inner();
        // What follows the end of the archive is part of the diff_id.
        rest.drain().map_err(unreadable)?;
        if rest.count() >= MAX_LAYER {
            return Err(Error::Layer {
                layer: layer.to_string(),
                reason: format!("it decompresses to more than {} GiB", MAX_LAYER >> 30),
            });
        }
        let (diff_id, tar_len) = rest.finish();
        (index, diff_id, tar_len)
    };
    stored.drain().map_err(unreadable)?;
    let (digest, size) = stored.finish();
    let as_stated = |stated| stated == size && digest == expected.digest;
    if !expected.size.is_none_or(as_stated) {
        return Err(Error::Blob {
            digest: layer.to_string(),
            reason: format!("its contents have digest {digest} and are {size} bytes or more"),
        });
    }
    if diff_id != expected.diff_id {
        return Err(Error::Layer {
            layer: layer.to_string(),
            reason: format!(
                "its contents have diff_id {diff_id}, the image's configuration says {}",
                expected.diff_id
            ),
        });
    }
    index.tar_len = tar_len;
    Ok(index)
}

/// By the stream's own first bytes: media types of real images are not always
/// right, and a wrong guess cannot pass the digest checks.
fn decompress<'a>(mut stream: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let head = stream.fill_buf()?;
    Ok(if head.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(stream))
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        Box::new(decoder)
    } else {
        Box::new(stream)
    })
}

fn read_entries<R: Read>(
    reader: &mut Reader<R>,
    blob: &File,
    layer: Digest,
    progress: &mut dyn FnMut(u64),
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
        if entries.len() >= MAX_ENTRIES {
            return Err(Error::Layer {
                layer: layer.to_string(),
                reason: format!("it has more than {MAX_ENTRIES} entries"),
            });
        }
        let path = header.path.clone();
        let entry = entry(header, reader, &mut writer).map_err(|reason| refuse(&path, reason))?;
        entries.extend(entry);
        progress(reader.position());
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
            blob.append(reader, header.size)
                .map_err(|error| match error.kind() {
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
    let bytes: usize = header.xattrs.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > MAX_XATTRS {
        return Err("its extended attributes are larger than 64 KiB".to_owned());
    }
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

/// Writes file contents one after another, each beginning at a block boundary.
/// Runs of zeros become holes of the file.
struct BlobWriter<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Offset in the file of the buffer's first byte.
    flushed: u64,
}

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;
/// Granule in which zeros are looked for.
const HOLE: usize = 64 << 10;

impl<'a> BlobWriter<'a> {
    fn new(file: &'a File) -> Self {
        Self {
            file,
            buffer: Vec::with_capacity(BUFFER),
            flushed: 0,
        }
    }

    fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// Appends exactly `len` bytes of `reader`, and pads to a block.
    fn append(&mut self, reader: &mut impl Read, len: u64) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            if self.buffer.len() >= BUFFER {
                self.flush()?;
            }
            let start = self.buffer.len();
            let room = u64::try_from(BUFFER - start).unwrap_or(u64::MAX).min(left);
            let read = reader.by_ref().take(room).read_to_end(&mut self.buffer)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= u64::try_from(read).unwrap_or(u64::MAX);
        }
        let block = usize::try_from(BLOCK_SIZE).unwrap_or(usize::MAX);
        self.buffer
            .resize(self.buffer.len().next_multiple_of(block), 0);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        for chunk in self.buffer.chunks(HOLE) {
            if chunk.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(chunk, self.flushed)?;
            }
            self.flushed += chunk.len() as u64;
        }
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<u64> {
        self.flush()?;
        self.file.set_len(self.flushed)?;
        Ok(self.flushed)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

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
        (convert(stored, expected, &blob, &mut |_| {}), blob)
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
