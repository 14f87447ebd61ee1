//! Conversion of a host directory to a tar stream, which depends only on the contents:
//! entries are sorted by name, and access times and inode numbers of the host are left
//! out.

use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::TarKind;
use super::describe::{FirstNames, describe, open};
use super::write::{END, encode, padding};

/// A reader that produces a tar archive of a directory's contents, with their owners.
pub struct DirectoryTar {
    root: PathBuf,
    /// Paths that remain to be written, relative to `root`. The next one is last.
    pending: Vec<PathBuf>,
    links: FirstNames,
    /// TarHeader or padding that precedes further contents of the file.
    head: Cursor<Vec<u8>>,
    file: Option<FileContents>,
    ended: bool,
}

struct FileContents {
    file: File,
    left: u64,
    padding: usize,
}

impl DirectoryTar {
    /// Creates an archive of the directory `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            pending: vec![PathBuf::new()],
            links: FirstNames::new(),
            head: Cursor::default(),
            file: None,
            ended: false,
        }
    }

    /// Advances to the next entry; `false` at the end.
    fn advance(&mut self) -> io::Result<bool> {
        while let Some(relative) = self.pending.pop() {
            let path = self.root.join(&relative);
            let written = self
                .entry(&relative, &path)
                .map_err(|error| io::Error::new(error.kind(), format!("{path:?}: {error}")))?;
            if written {
                return Ok(true);
            }
        }
        if self.ended {
            return Ok(false);
        }
        self.ended = true;
        self.head = Cursor::new(END.to_vec());
        Ok(true)
    }

    fn entry(&mut self, relative: &Path, path: &Path) -> io::Result<bool> {
        let name = match relative.as_os_str().as_bytes() {
            b"" => b".".to_vec(),
            name => name.to_vec(),
        };
        let Some(header) = describe(path, name, &mut self.links)? else {
            return Ok(false);
        };
        if header.kind == TarKind::Directory {
            self.push_children(relative, path)?;
        }
        let size = header.size;
        self.file = (size > 0)
            .then(|| {
                Ok::<_, io::Error>(FileContents {
                    file: open(path)?,
                    left: size,
                    padding: padding(size),
                })
            })
            .transpose()?;
        self.head = Cursor::new(encode(&header));
        Ok(true)
    }

    fn push_children(&mut self, relative: &Path, path: &Path) -> io::Result<()> {
        let mut children = fs::read_dir(path)?
            .map(|child| Ok(relative.join(child?.file_name())))
            .collect::<io::Result<Vec<_>>>()?;
        children.sort_unstable_by(|a, b| b.cmp(a));
        self.pending.append(&mut children);
        Ok(())
    }
}

impl Read for DirectoryTar {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let count = self.head.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            let Some(contents) = &mut self.file else {
                match self.advance()? {
                    true => continue,
                    false => return Ok(0),
                }
            };
            let count = (&contents.file).take(contents.left).read(buffer)?;
            if count == 0 {
                return Err(io::Error::other("a file became shorter while it was read"));
            }
            contents.left -= count as u64;
            if contents.left == 0 {
                self.head = Cursor::new(vec![0; contents.padding]);
                self.file = None;
            }
            return Ok(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{XattrFlags, setxattr};

    use super::super::TarReader;
    use super::*;

    #[test]
    fn a_directory_is_archived_completely() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/a"), b"hello").unwrap();
        let attribute = (b"user.a".to_vec(), b"x".to_vec());
        let none = XattrFlags::empty();
        setxattr(at("d/a"), "user.a", b"x", none).unwrap();
        fs::hard_link(at("d/a"), at("z")).unwrap();
        symlink("/nowhere", at("link")).unwrap();
        fs::write(at("big"), vec![5; 3000]).unwrap();
        let mut bytes = Vec::new();
        DirectoryTar::new(root.path())
            .read_to_end(&mut bytes)
            .unwrap();
        assert_eq!(bytes.len() % 512, 0);
        let mut reader = TarReader::new(bytes.as_slice());
        let mut seen = Vec::new();
        while let Some(header) = reader.next_entry().unwrap() {
            let mut data = Vec::new();
            reader.read_to_end(&mut data).unwrap();
            let path = String::from_utf8(header.path).unwrap();
            let linked = matches!(path.as_str(), "d/a" | "z");
            assert_eq!(header.xattrs.contains(&attribute), linked, "{path}");
            seen.push((path, header.kind, data.len()));
        }
        let expect = |path: &str, kind, len| (path.to_owned(), kind, len);
        assert_eq!(
            seen,
            [
                expect("./", TarKind::Directory, 0),
                expect("big", TarKind::File, 3000),
                expect("d/", TarKind::Directory, 0),
                expect("d/a", TarKind::File, 5),
                expect("link", TarKind::Symlink(b"/nowhere".to_vec()), 0),
                expect("z", TarKind::Hardlink(b"d/a".to_vec()), 0),
            ]
        );
    }
}
