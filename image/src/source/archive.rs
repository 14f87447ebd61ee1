//! A tar file as named files: its headers are read once, contents in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::{Files, Session, spool};
use crate::Error;
use crate::reference::Reference;
use crate::tar::{Header, Kind, Reader};

/// Most files in an archive.
const MAX_FILES: usize = 100_000;
/// Links followed to a file (`docker save` links equal layers).
const MAX_LINKS: usize = 8;

enum Item {
    File { offset: u64, size: u64 },
    Link(String),
}

/// A tar file.
pub(super) struct Archive {
    file: File,
    items: HashMap<String, Item>,
}

impl Archive {
    /// Reads the headers of a tar file.
    ///
    /// # Errors
    /// A sentence about what is wrong with it.
    pub(super) fn new(mut file: File) -> Result<Self, String> {
        let items = list(&mut file)?;
        Ok(Self { file, items })
    }

    /// The archive at `path`, or for `-` that on the standard input, compressed
    /// or not.
    pub(super) fn open(
        path: &Path,
        reference: &Reference,
        session: Session<'_>,
    ) -> Result<Self, Error> {
        let unknown = |reason: String| Error::Unknown {
            reference: reference.to_string(),
            reason: format!("{path:?}: {reason}"),
        };
        let file = spool::open(path, session).map_err(|error| unknown(error.to_string()))?;
        Self::new(file).map_err(unknown)
    }
}

fn list(file: &mut File) -> Result<HashMap<String, Item>, String> {
    let mut items = HashMap::new();
    let mut reader = Reader::new(Skipping(BufReader::new(&*file)));
    while let Some(header) = reader.next_entry().map_err(|error| error.reason)? {
        if items.len() >= MAX_FILES {
            return Err(format!("it has more than {MAX_FILES} files"));
        }
        let Some(name) = clean(&header) else { continue };
        let item = match header.kind {
            Kind::File => Item::File {
                offset: reader.position(),
                size: header.size,
            },
            Kind::Symlink(target) => match String::from_utf8(target) {
                Ok(target) => Item::Link(join(&name, &target)),
                Err(_) => continue,
            },
            Kind::Hardlink(target) => match String::from_utf8(target) {
                Ok(target) => Item::Link(join("", &target)),
                Err(_) => continue,
            },
            _ => continue,
        };
        items.insert(name, item);
    }
    file.seek(SeekFrom::Start(0))
        .map_err(|error| error.to_string())?;
    Ok(items)
}

/// Reading over contents by seeking would save little: page cache reads are
/// cheap next to hashing, and pipes cannot seek.
struct Skipping<R>(R);

impl<R: Read> Read for Skipping<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

fn clean(header: &Header) -> Option<String> {
    let text = std::str::from_utf8(&header.path).ok()?;
    Some(join("", text))
}

/// `target` seen from the directory of `name`; `..` stops at the top.
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

impl Files for Archive {
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        self.open_file(path)
    }
}

/// [`Layout`](super::layout::Layout)s and others can be several over one archive.
impl Files for &Archive {
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        self.open_file(path)
    }
}

impl Archive {
    /// Opens a file by its path; `None` if there is none.
    pub(super) fn open_file<'a>(
        &'a self,
        path: &str,
    ) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        let path = join("", path);
        let mut name = path.as_str();
        for _ in 0..MAX_LINKS {
            match self.items.get(name) {
                None => return Ok(None),
                Some(Item::Link(target)) => name = target,
                Some(Item::File { offset, size }) => {
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
            "it is a link to a link, and so on, in its archive",
        ))
    }
}

/// A part of a file, read by position so that several can be read at once.
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
    use super::*;

    #[test]
    fn links_are_resolved_inside() {
        assert_eq!(join("a/layer.tar", "../b/layer.tar"), "b/layer.tar");
        assert_eq!(join("", "../../etc/passwd"), "etc/passwd");
        assert_eq!(join("", "./manifest.json"), "manifest.json");
    }
}
