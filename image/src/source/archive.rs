//! Random access to the files of a tar file. Headers are read once, contents in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::{Files, Session, spool};
use crate::Error;
use crate::error::{Cause, ErrorKind};
use crate::reference::Reference;
use sm_tar::{TarHeader, TarKind, TarReader};

/// Maximum number of files in an archive.
const MAX_FILES: usize = 100_000;
/// Maximum total size of their names and links in bytes.
const MAX_NAMES: usize = 16 << 20;
/// Maximum length of a listed name or link. The names of an image's files are digests.
const MAX_NAME: usize = 512;
/// Maximum number of links followed to a file (`docker save` links equal layers).
const MAX_LINKS: usize = 8;

enum ArchiveItem {
    File { offset: u64, size: u64 },
    Link(String),
}

impl ArchiveItem {
    /// Returns the number of stored name bytes.
    fn len(&self) -> usize {
        match self {
            Self::File { .. } => 0,
            Self::Link(target) => target.len(),
        }
    }
}

/// A tar file.
pub(super) struct TarArchive {
    file: File,
    items: HashMap<String, ArchiveItem>,
}

impl TarArchive {
    /// Reads the headers of a tar file.
    ///
    /// # Errors
    /// A sentence that describes the problem.
    pub(super) fn new(mut file: File) -> Result<Self, Cause> {
        let items = list(&mut file)?;
        Ok(Self { file, items })
    }

    /// Opens the archive at `path`, or on the standard input for `-`. It may be
    /// compressed.
    pub(super) fn open(
        path: &Path,
        reference: &Reference,
        session: Session<'_>,
    ) -> Result<Self, Error> {
        let unknown = |reason: Cause| Error::unknown(reference, reason.after(path));
        let file = spool::open(path, session).map_err(|error| {
            unknown(match error.kind() {
                io::ErrorKind::NotFound => Cause::of(&error),
                _ => Cause::of_stream(&error),
            })
        })?;
        Self::new(file).map_err(|cause| unknown(cause.or(ErrorKind::Damaged)))
    }
}

fn list(file: &mut File) -> Result<HashMap<String, ArchiveItem>, Cause> {
    let text = |error: io::Error| Cause::of(&error);
    let len = file.metadata().map_err(text)?.len();
    let mut items = HashMap::new();
    let mut names = 0;
    file.seek(SeekFrom::Start(0)).map_err(text)?;
    let mut reader = TarReader::new(BufReader::new(&*file));
    while let Some(header) = reader.next_entry().map_err(|error| error.reason)? {
        let listed = item(&header, reader.position());
        reader.seek_over_data(len).map_err(|error| error.reason)?;
        let Some((name, item)) = listed else {
            continue;
        };
        if items.len() >= MAX_FILES {
            let text = format!("it has more than {MAX_FILES} files");
            return Err(Cause::new(ErrorKind::LimitExceeded, text));
        }
        names += name.len() + item.len();
        if names > MAX_NAMES {
            let text = format!("it has more than {MAX_NAMES} bytes of names");
            return Err(Cause::new(ErrorKind::LimitExceeded, text));
        }
        items.insert(name, item);
    }
    file.seek(SeekFrom::Start(0)).map_err(text)?;
    Ok(items)
}

/// Converts a header to a file or link; `None` for an entry that no document of an image
/// can name.
fn item(header: &TarHeader, offset: u64) -> Option<(String, ArchiveItem)> {
    let short = |bytes: &[u8]| bytes.len() <= MAX_NAME;
    let name = std::str::from_utf8(&header.path).ok();
    let name = join("", name.filter(|name| short(name.as_bytes()))?);
    let link = |from: &str, target: &[u8]| {
        let target = std::str::from_utf8(target).ok();
        let target = target.filter(|target| short(target.as_bytes()))?;
        Some(ArchiveItem::Link(join(from, target)))
    };
    let item = match &header.kind {
        TarKind::File => ArchiveItem::File {
            offset,
            size: header.size,
        },
        TarKind::Symlink(target) => link(&name, target)?,
        TarKind::Hardlink(target) => link("", target)?,
        _ => return None,
    };
    Some((name, item))
}

/// Resolves `target` relative to the directory of `name`. `..` stops at the top.
fn join(name: &str, target: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
    for part in directory.split('/').chain(target.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

impl Files for TarArchive {
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        self.open_file(path)
    }
}

/// Several [`Layout`](super::layout::Layout)s and other sources can share one archive.
impl Files for &TarArchive {
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        self.open_file(path)
    }
}

impl TarArchive {
    /// Opens a file by its path; `None` if it does not exist.
    pub(super) fn open_file<'a>(
        &'a self,
        path: &str,
    ) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        let path = join("", path);
        let mut name = path.as_str();
        for _ in 0..MAX_LINKS {
            match self.items.get(name) {
                None => return Ok(None),
                Some(ArchiveItem::Link(target)) => name = target,
                Some(ArchiveItem::File { offset, size }) => {
                    return Ok(Some(Box::new(BufReader::new(Slice {
                        file: &self.file,
                        at: *offset,
                        left: *size,
                    }))));
                }
            }
        }
        Err(Error::document(
            path,
            "it is a chain of too many links in its archive",
        ))
    }
}

/// A part of a file, read with offsets so that several parts can be read concurrently.
struct Slice<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Slice<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.left).unwrap_or(usize::MAX);
        let len = buffer.len().min(limit);
        let count = self
            .file
            .read_at(buffer.get_mut(..len).unwrap_or_default(), self.at)?;
        let count64 = u64::try_from(count).unwrap_or(u64::MAX);
        self.at += count64;
        self.left -= count64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn archive(build: impl FnOnce(&mut tar::Builder<&File>)) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut builder = tar::Builder::new(&file);
        build(&mut builder);
        builder.into_inner().unwrap();
        file
    }

    fn add_link(builder: &mut tar::Builder<&File>, path: &str, target: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        builder.append_link(&mut header, path, target).unwrap();
    }

    #[test]
    fn names_have_a_byte_budget() {
        let target = "t".repeat(MAX_NAME - 6);
        let directory = "d".repeat(MAX_NAME - 100);
        let file = archive(|builder| {
            for number in 0..20_000 {
                add_link(builder, &format!("{directory}/{number}"), &target);
            }
        });
        let error = TarArchive::new(file).err().unwrap();
        assert_eq!(
            error.to_string(),
            format!("it has more than {MAX_NAMES} bytes of names")
        );
    }

    #[test]
    fn names_that_are_too_long_are_not_listed() {
        let long = "n".repeat(MAX_NAME + 1);
        let file = archive(|builder| {
            add_link(builder, &long, "a");
            add_link(builder, "b", &long);
            add_link(builder, "c", "a");
        });
        let archive = TarArchive::new(file).unwrap();
        assert_eq!(archive.items.keys().collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn contents_are_not_read_while_listing() {
        // Reading 8 TiB of holes would take hours.
        let size = 8u64 << 40;
        let mut file = tempfile::tempfile().unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_path("large").unwrap();
        header.set_size(size);
        header.set_cksum();
        file.write_all(header.as_bytes()).unwrap();
        if file.set_len(512 + size).is_err() {
            // This file system does not support sparse files of this size.
            return;
        }
        file.seek(SeekFrom::End(0)).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_path("behind").unwrap();
        header.set_size(0);
        header.set_cksum();
        file.write_all(header.as_bytes()).unwrap();
        let archive = TarArchive::new(file).unwrap();
        assert_eq!(archive.items.len(), 2);
    }

    #[test]
    fn contents_beyond_the_end_are_truncation() {
        let mut file = tempfile::tempfile().unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_path("large").unwrap();
        header.set_size(4096);
        header.set_cksum();
        file.write_all(header.as_bytes()).unwrap();
        file.write_all(&[1; 4095]).unwrap();
        let error = TarArchive::new(file).err().unwrap();
        assert_eq!(error.to_string(), "it is truncated");
    }

    #[test]
    fn links_are_resolved_inside() {
        assert_eq!(join("a/layer.tar", "../b/layer.tar"), "b/layer.tar");
        assert_eq!(join("", "../../etc/passwd"), "etc/passwd");
        assert_eq!(join("", "./manifest.json"), "manifest.json");
    }
}
