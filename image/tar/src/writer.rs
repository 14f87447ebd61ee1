//! Archives of files of the host.

use std::fs::{self, File};
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::describe::{FirstNames, describe, open};
use super::write::{END, encode, padding};
use super::{TarHeader, TarKind};

/// Size of the buffer for contents in bytes.
const CHUNK: usize = 128 << 10;

/// Writes an archive, entry by entry.
///
/// Files may change while they are read, as files of a running system do: one that
/// disappears is left out, one that becomes shorter is continued with zeros, and one that
/// becomes longer is cut.
///
/// ```
/// use sm_tar::{TarReader, TarWriter};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let directory = tempfile::tempdir()?;
/// std::fs::write(directory.path().join("a"), "hello")?;
/// let mut writer = TarWriter::new(Vec::new());
/// writer.append_tree(directory.path(), b"d", &|_| false)?;
/// let archive = writer.finish()?;
///
/// let mut reader = TarReader::new(archive.as_slice());
/// let mut names = Vec::new();
/// while let Some(entry) = reader.next_entry()? {
///     names.push(String::from_utf8(entry.path)?);
/// }
/// assert_eq!(names, ["d/", "d/a"]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TarWriter<W> {
    out: W,
    links: FirstNames,
    chunk: Vec<u8>,
}

impl<W: Write> TarWriter<W> {
    /// Starts an archive.
    #[must_use]
    pub fn new(out: W) -> Self {
        Self {
            out,
            links: FirstNames::new(),
            chunk: vec![0; CHUNK],
        }
    }

    /// Appends an entry without contents.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub fn append(&mut self, header: &TarHeader) -> io::Result<()> {
        self.out.write_all(&encode(header))
    }

    /// Appends an empty file that root owns.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub fn append_empty(&mut self, name: &[u8]) -> io::Result<()> {
        self.append(&TarHeader {
            path: name.to_vec(),
            kind: TarKind::File,
            mode: 0o600,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size: 0,
            sparse: None,
            xattrs: Vec::new(),
        })
    }

    /// Appends the file at `path`, but not the files in it, as the entry `name`. Symbolic
    /// links are not followed. Returns its type; `None` if it has disappeared or is a
    /// socket.
    ///
    /// # Errors
    /// The file cannot be read, or the archive cannot be written.
    pub fn append_path(&mut self, path: &Path, name: &[u8]) -> io::Result<Option<TarKind>> {
        self.append_with(path, name, |_| true)
    }

    /// As [`Self::append_path`], with the extended attributes whose names `keep` accepts.
    ///
    /// # Errors
    /// As [`Self::append_path`].
    pub fn append_with(
        &mut self,
        path: &Path,
        name: &[u8],
        keep: impl Fn(&[u8]) -> bool,
    ) -> io::Result<Option<TarKind>> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{path:?}: {error}"));
        let described = match describe(path, name.to_vec(), &mut self.links) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            described => described.map_err(named)?,
        };
        let Some(mut header) = described else {
            return Ok(None);
        };
        header.xattrs.retain(|(name, _)| keep(name));
        let file = match header.size {
            0 => None,
            _ => match open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                opened => Some(opened.map_err(named)?),
            },
        };
        self.append(&header)?;
        if let Some(file) = file {
            self.contents(&file, header.size, &named)?;
        }
        Ok(Some(header.kind))
    }

    fn contents(
        &mut self,
        mut file: &File,
        size: u64,
        named: &dyn Fn(io::Error) -> io::Error,
    ) -> io::Result<()> {
        let mut left = size;
        while left > 0 {
            let most =
                usize::try_from(left).map_or(self.chunk.len(), |left| left.min(self.chunk.len()));
            let room = self.chunk.get_mut(..most).unwrap_or_default();
            let count = match file.read(room) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read.map_err(named)?,
            };
            // The header has announced the size.
            let count = match count {
                0 => {
                    room.fill(0);
                    most
                }
                count => count,
            };
            self.out
                .write_all(self.chunk.get(..count).unwrap_or_default())?;
            left = left.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        }
        self.out.write_all(&[0; 512][..padding(size)])
    }

    /// Appends the file at `path` and all files below it, as the entries `name` and
    /// `name/...`, except those whose name in the archive `skip` accepts. With the name
    /// `.`, the names of files below have no prefix.
    ///
    /// # Errors
    /// A file cannot be read, or the archive cannot be written.
    pub fn append_tree(
        &mut self,
        path: &Path,
        name: &[u8],
        skip: &dyn Fn(&[u8]) -> bool,
    ) -> io::Result<()> {
        let mut pending: Vec<(PathBuf, Vec<u8>)> = vec![(path.to_owned(), name.to_vec())];
        while let Some((path, name)) = pending.pop() {
            if skip(&name) || self.append_path(&path, &name)? != Some(TarKind::Directory) {
                continue;
            }
            let first = pending.len();
            let children = match fs::read_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                children => children?,
            };
            for child in children {
                let child = child?.file_name();
                let mut below = match name.as_slice() {
                    b"." => Vec::new(),
                    name => [name, b"/"].concat(),
                };
                below.extend_from_slice(child.as_bytes());
                pending.push((path.join(&child), below));
            }
            if let Some(children) = pending.get_mut(first..) {
                // The next entry is the last one.
                children.sort_unstable_by(|a, b| b.1.cmp(&a.1));
            }
        }
        Ok(())
    }

    /// Writes the end of the archive and returns the output.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&END)?;
        self.out.flush()?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TarReader;

    #[test]
    fn a_file_that_shrinks_or_grows_leaves_the_archive_sound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, b"abc").unwrap();
        let file = File::open(&path).unwrap();
        for announced in [2, 700] {
            let mut writer = TarWriter::new(Vec::new());
            writer
                .append(&TarHeader {
                    path: b"log".to_vec(),
                    size: announced,
                    ..describe(&path, b"log".to_vec(), &mut FirstNames::new())
                        .unwrap()
                        .unwrap()
                })
                .unwrap();
            std::io::Seek::rewind(&mut &file).unwrap();
            writer.contents(&file, announced, &|error| error).unwrap();
            let archive = writer.finish().unwrap();
            let mut reader = TarReader::new(archive.as_slice());
            let entry = reader.next_entry().unwrap().unwrap();
            let mut data = Vec::new();
            reader.read_to_end(&mut data).unwrap();
            assert_eq!((entry.size, data.len() as u64), (announced, announced));
            assert!(data.starts_with(b"ab"));
            assert!(reader.next_entry().unwrap().is_none());
        }
    }

    #[test]
    fn a_missing_file_and_a_socket_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let mut writer = TarWriter::new(Vec::new());
        for name in ["socket", "missing"] {
            let path = directory.path().join(name);
            assert_eq!(writer.append_path(&path, b"x").unwrap(), None);
        }
        writer
            .append_tree(directory.path(), b".", &|name| name == b".")
            .unwrap();
        assert_eq!(writer.finish().unwrap(), END);
    }

    #[test]
    fn a_tree_is_written_in_order_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("b/c")).unwrap();
        fs::write(at("b/c/f"), b"1").unwrap();
        fs::write(at("a"), b"2").unwrap();
        for (name, expected) in [
            (&b"."[..], &["./", "a", "b/", "b/c/", "b/c/f"][..]),
            (
                b"x/y",
                &["x/y/", "x/y/a", "x/y/b/", "x/y/b/c/", "x/y/b/c/f"],
            ),
        ] {
            let mut writer = TarWriter::new(Vec::new());
            writer
                .append_tree(directory.path(), name, &|_| false)
                .unwrap();
            let archive = writer.finish().unwrap();
            let mut reader = TarReader::new(archive.as_slice());
            let mut seen = Vec::new();
            while let Some(entry) = reader.next_entry().unwrap() {
                seen.push(String::from_utf8(entry.path).unwrap());
            }
            assert_eq!(seen, expected);
        }
        let mut writer = TarWriter::new(Vec::new());
        writer.append_tree(&at("a"), b"one", &|_| false).unwrap();
        let archive = writer.finish().unwrap();
        let mut reader = TarReader::new(archive.as_slice());
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!((entry.path, entry.kind), (b"one".to_vec(), TarKind::File));
    }
}
