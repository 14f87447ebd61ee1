//! Reconstruction of a layer's tar stream from tar-split data and the files that it was
//! unpacked to.
//!
//! Each line is a JSON object: either bytes of the stream (headers and padding), or the
//! name and size of a file whose contents follow. The reader checks the result against
//! the layer's diff_id; this module ensures only that no file outside the layer's
//! directory is read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::read::MultiGzDecoder;
use serde::Deserialize;

/// Maximum length of a line in bytes: the headers of one entry, including PAX headers.
const MAX_LINE: u64 = 4 << 20;

/// Type of an entry with a file's contents.
const FILE: u64 = 1;
/// Type of an entry with bytes of the stream.
const SEGMENT: u64 = 2;

#[derive(Deserialize)]
struct SplitEntry {
    #[serde(rename = "type")]
    kind: u64,
    #[serde(default)]
    name: String,
    /// A name that is not UTF-8, in base64.
    name_raw: Option<String>,
    #[serde(default)]
    size: u64,
    payload: Option<String>,
    position: u64,
}

/// State of reading.
enum SplitState {
    /// The next entry must be read.
    Between,
    Bytes(io::Cursor<Vec<u8>>),
    File {
        file: File,
        left: u64,
    },
}

/// The reconstructed stream.
pub(super) struct TarSplit {
    entries: BufReader<MultiGzDecoder<BufReader<File>>>,
    /// The directory that the layer was unpacked to.
    root: OwnedFd,
    piece: SplitState,
    position: u64,
}

impl TarSplit {
    /// Creates the stream from a gzip-compressed file of entries and the layer's
    /// directory.
    pub(super) fn new(entries: File, root: OwnedFd) -> Self {
        Self {
            entries: BufReader::new(MultiGzDecoder::new(BufReader::new(entries))),
            root,
            piece: SplitState::Between,
            position: 0,
        }
    }

    /// Reads the next entry; `false` if there is none.
    fn next_entry(&mut self) -> io::Result<bool> {
        let mut line = Vec::new();
        let mut limited = (&mut self.entries).take(MAX_LINE);
        limited.read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(false);
        }
        if line.last() != Some(&b'\n') && limited.limit() == 0 {
            return Err(invalid("a line is too long"));
        }
        let entry: SplitEntry =
            serde_json::from_slice(&line).map_err(|error| invalid(error.to_string()))?;
        if entry.position != self.position {
            return Err(invalid("its entries are out of order"));
        }
        self.position += 1;
        let decode = |text: &str| {
            STANDARD
                .decode(text)
                .map_err(|error| invalid(error.to_string()))
        };
        self.piece = match entry.kind {
            SEGMENT => {
                let bytes = decode(entry.payload.as_deref().unwrap_or_default())?;
                SplitState::Bytes(io::Cursor::new(bytes))
            }
            FILE if entry.size == 0 => SplitState::Between,
            FILE => {
                let name = match &entry.name_raw {
                    Some(raw) => decode(raw)?,
                    None => entry.name.into_bytes(),
                };
                SplitState::File {
                    file: open_below(&self.root, &name)?,
                    left: entry.size,
                }
            }
            kind => return Err(invalid(format!("an entry is of type {kind}"))),
        };
        Ok(true)
    }
}

fn invalid(reason: impl Into<String>) -> io::Error {
    let reason = reason.into();
    io::Error::other(format!("its tar-split is damaged: {reason}"))
}

/// Opens a regular file below a directory. Symbolic links are followed within the
/// directory, because upper layers may have replaced a directory of the path by a link.
#[cfg(target_os = "linux")]
fn open_below(root: &OwnedFd, name: &[u8]) -> io::Result<File> {
    use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

    let failed = |error: io::Error| {
        let name = String::from_utf8_lossy(name).into_owned();
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => "; it belongs to another user of the storage",
            _ => "",
        };
        io::Error::other(format!("its file {name:?} cannot be read: {error}{hint}"))
    };
    let open = |flags: OFlags| {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let below = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let file = openat2(root, name, flags, Mode::empty(), below)?;
        let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
        match kind {
            FileType::RegularFile => Ok(file),
            _ => Err(io::Error::other("it is not a regular file")),
        }
    };
    // The type is checked first, because opening a device can have side effects.
    open(OFlags::PATH).map_err(failed)?;
    let file = open(OFlags::RDONLY | OFlags::NONBLOCK).map_err(failed)?;
    Ok(File::from(file))
}

#[cfg(not(target_os = "linux"))]
fn open_below(_: &OwnedFd, _: &[u8]) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

impl Read for TarSplit {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let count = match &mut self.piece {
                SplitState::Between => 0,
                SplitState::Bytes(bytes) => bytes.read(buffer)?,
                SplitState::File { left: 0, .. } => 0,
                SplitState::File { file, left } => {
                    let most = usize::try_from(*left).unwrap_or(usize::MAX);
                    let most = most.min(buffer.len());
                    let count = file.read(buffer.get_mut(..most).unwrap_or_default())?;
                    if count == 0 {
                        return Err(invalid("a file has become shorter"));
                    }
                    *left -= count as u64;
                    count
                }
            };
            if count > 0 {
                return Ok(count);
            }
            if !self.next_entry()? {
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn read(root: &Path, lines: &str) -> io::Result<Vec<u8>> {
        let mut encoder =
            flate2::write::GzEncoder::new(tempfile::tempfile()?, flate2::Compression::new(1));
        encoder.write_all(lines.as_bytes())?;
        let mut entries = encoder.finish()?;
        io::Seek::seek(&mut entries, io::SeekFrom::Start(0))?;
        let root = OwnedFd::from(File::open(root)?);
        let mut bytes = Vec::new();
        TarSplit::new(entries, root).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn file(name: &str, size: usize) -> String {
        format!(
            "{{\"type\": 1, \"name\": {name:?}, \"size\": {size}, \"payload\": null, \"position\": 0}}\n"
        )
    }

    #[test]
    fn segments_and_files_are_combined() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        std::fs::create_dir(root.join("usr")).unwrap();
        std::fs::write(root.join("usr/a"), "contents").unwrap();
        symlink("/usr", root.join("bin")).unwrap();
        std::fs::write(root.join(std::ffi::OsStr::new("odd")), "o").unwrap();
        let lines = format!(
            "{}\n{}\n{}\n{}\n{}\n",
            r#"{"type": 2, "payload": "aGVhZA==", "position": 0}"#,
            r#"{"type": 1, "name": "bin/a", "size": 8, "payload": "AAAAAAAAAAA=", "position": 1}"#,
            r#"{"type": 1, "name": "none", "payload": null, "position": 2}"#,
            r#"{"type": 1, "name_raw": "b2Rk", "size": 1, "position": 3}"#,
            r#"{"type": 2, "payload": "dGFpbA==", "position": 4}"#,
        );
        assert_eq!(read(root, &lines).unwrap(), b"headcontentsotail");
        assert_eq!(read(root, "").unwrap(), b"");
    }

    #[test]
    fn nothing_outside_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(directory.path().join("secret"), "secret").unwrap();
        let outside = directory.path().join("secret");
        symlink(&outside, root.join("link")).unwrap();
        symlink(directory.path(), root.join("up")).unwrap();
        symlink("..", root.join("parent")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, root.join("pipe"), rustix::fs::Mode::RUSR).unwrap();
        for name in [
            "../secret",
            "link",
            "up/secret",
            "parent/secret",
            "/etc/hostname",
            &outside.display().to_string(),
            "/proc/self/fd/0",
            "pipe",
            ".",
            "",
        ] {
            let error = read(&root, &file(name, 6)).unwrap_err().to_string();
            assert!(error.contains("cannot be read"), "{name}: {error}");
        }
    }

    #[test]
    fn corruption_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a"), "short").unwrap();
        let fails = |lines: &str, word: &str| {
            let error = read(directory.path(), lines).unwrap_err().to_string();
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        };
        fails(&file("a", 6), "become shorter");
        fails(&file("gone", 6), "gone");
        fails("{\"type\": 3, \"position\": 0}\n", "type 3");
        fails(
            "{\"type\": 2, \"payload\": \"?\", \"position\": 0}\n",
            "damaged",
        );
        fails("{\"type\": 2, \"position\": 1}\n", "out of order");
        fails("nonsense\n", "damaged");
        let endless = format!("{{\"type\": 2, \"payload\": \"{}", "A".repeat(5 << 20));
        fails(&endless, "too long");
        // A file that is not compressed.
        let plain = directory.path().join("a");
        let root = OwnedFd::from(File::open(directory.path()).unwrap());
        let mut stream = TarSplit::new(File::open(plain).unwrap(), root);
        assert!(stream.read(&mut [0; 10]).is_err());
    }

    proptest! {
        #[test]
        fn any_lines_are_parsed_without_panic(lines in "(\\{\"type\": [0-3], \"name\": \"[./a]{0,4}\", \"size\": [0-9]{1,3}, \"payload\": \"[A=]{0,8}\", \"position\": [0-2]\\}\n|\\PC{0,20}\n){0,6}") {
            let directory = tempfile::tempdir().unwrap();
            let _ = read(directory.path(), &lines);
        }
    }
}
