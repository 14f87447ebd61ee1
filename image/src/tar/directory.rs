//! Conversion of a host directory to a tar stream, which depends only on the contents:
//! entries are sorted by name, and access times and inode numbers of the host are left
//! out.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Cursor, Read};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;

use super::write::{END, encode, padding};
use super::{Header, Kind};

/// Maximum size of a list of names, and of a value, of extended attributes (Linux
/// `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const MAX_XATTR: usize = 64 << 10;

/// A reader that produces a tar archive of a directory's contents, with their owners.
pub(crate) struct DirectoryTar {
    root: PathBuf,
    /// Paths that remain to be written, relative to `root`. The next one is last.
    pending: Vec<PathBuf>,
    /// First path of each inode with several names.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// Header or padding that precedes further contents of the file.
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
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            pending: vec![PathBuf::new()],
            links: HashMap::new(),
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
        let meta = fs::symlink_metadata(path)?;
        let name = match relative.as_os_str().as_bytes() {
            b"" => b".".to_vec(),
            name => name.to_vec(),
        };
        let Some(kind) = self.kind(&meta, path, &name)? else {
            return Ok(false);
        };
        if kind == Kind::Directory {
            self.push_children(relative, path)?;
        }
        let size = if kind == Kind::File { meta.len() } else { 0 };
        self.file = (size > 0)
            .then(|| {
                Ok::<_, io::Error>(FileContents {
                    file: open(path)?,
                    left: size,
                    padding: padding(size),
                })
            })
            .transpose()?;
        self.head = Cursor::new(encode(&Header {
            path: name,
            mode: u16::try_from(meta.mode() & 0o7777).unwrap_or(0),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)),
            size,
            sparse: None,
            // A hard link also needs them, because unpacking it changes the owner, which
            // removes the file's capabilities.
            xattrs: xattrs(path)?,
            kind,
        }));
        Ok(true)
    }

    /// Returns `None` for a socket, which is useless without its process.
    fn kind(&mut self, meta: &Metadata, path: &Path, name: &[u8]) -> io::Result<Option<Kind>> {
        let kind = meta.file_type();
        if kind.is_dir() {
            return Ok(Some(Kind::Directory));
        }
        if meta.nlink() > 1 && !kind.is_socket() {
            let inode = (meta.dev(), meta.ino());
            if let Some(first) = self.links.get(&inode) {
                return Ok(Some(Kind::Hardlink(first.clone())));
            }
            self.links.insert(inode, name.to_vec());
        }
        let (major, minor) = (major(meta.rdev()), minor(meta.rdev()));
        Ok(Some(if kind.is_symlink() {
            Kind::Symlink(fs::read_link(path)?.into_os_string().into_vec())
        } else if kind.is_char_device() {
            Kind::CharDevice(major, minor)
        } else if kind.is_block_device() {
            Kind::BlockDevice(major, minor)
        } else if kind.is_fifo() {
            Kind::Fifo
        } else if kind.is_file() {
            Kind::File
        } else {
            return Ok(None);
        }))
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

/// Opens a file without following a link that may have replaced it.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

fn xattrs(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; MAX_XATTR];
    let len = match llistxattr(path, &mut names) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    names.truncate(len);
    let mut found = Vec::new();
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; MAX_XATTR];
        let len = match lgetxattr(path, name, &mut value) {
            Ok(len) => len,
            // Removed concurrently, or not readable by this user.
            Err(Errno::NODATA | Errno::ACCESS | Errno::PERM) => continue,
            Err(error) => return Err(error.into()),
        };
        value.truncate(len);
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{XattrFlags, setxattr};

    use super::super::Reader;
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
        let mut reader = Reader::new(bytes.as_slice());
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
                expect("./", Kind::Directory, 0),
                expect("big", Kind::File, 3000),
                expect("d/", Kind::Directory, 0),
                expect("d/a", Kind::File, 5),
                expect("link", Kind::Symlink(b"/nowhere".to_vec()), 0),
                expect("z", Kind::Hardlink(b"d/a".to_vec()), 0),
            ]
        );
    }
}
