//! Conversion of a host directory to a tree.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;

use super::{Entry, EntryKind, Tree, Xattr};
use crate::source::Meta;
use crate::{Error, InodeId};

/// Maximum size of a list of names, and of a value, of extended attributes (Linux
/// `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const MAX_XATTR: usize = 64 << 10;

impl Tree {
    /// Creates the tree of a host directory: all files in it except sockets, with owners,
    /// modes, times and those extended attributes that this user may read. Symbolic links
    /// are stored and not followed. Contents are read when the image is written; the
    /// directory must not change until then.
    ///
    /// # Errors
    /// A file in the directory cannot be read.
    pub fn from_directory(directory: &Path) -> Result<Self, Error> {
        let mut tree = Self::new();
        // Inodes with several names.
        let mut linked: HashMap<(u64, u64), InodeId> = HashMap::new();
        // Paths that remain to be added, relative to `directory`. The next one is last.
        let mut pending = vec![OsString::new()];
        while let Some(relative) = pending.pop() {
            let path = directory.join(&relative);
            let failed = |source| Error::Directory {
                path: path.clone(),
                source,
            };
            let meta = fs::symlink_metadata(&path).map_err(failed)?;
            let has_others = meta.nlink() > 1 && !meta.is_dir();
            let inode = (meta.dev(), meta.ino());
            if let Some(known) = linked.get(&inode).filter(|_| has_others) {
                tree.link_inode(relative.as_bytes(), *known)?;
                continue;
            }
            let Some(kind) = kind(&meta, &path).map_err(failed)? else {
                continue;
            };
            if matches!(kind, EntryKind::Directory) {
                let mut children = fs::read_dir(&path)
                    .and_then(|children| {
                        children
                            .map(|child| Ok(Path::new(&relative).join(child?.file_name())))
                            .collect::<io::Result<Vec<_>>>()
                    })
                    .map_err(failed)?;
                children.sort_unstable_by(|a, b| b.cmp(a));
                pending.extend(children.into_iter().map(Into::into));
            }
            let mut entry = Entry::new(kind).meta(Meta {
                mode: u16::try_from(meta.mode() & 0o7777).unwrap_or(0),
                uid: meta.uid(),
                gid: meta.gid(),
                mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)),
            });
            entry.xattrs = xattrs(&path).map_err(failed)?;
            let id = tree.add(relative.as_bytes(), entry)?;
            if has_others {
                linked.insert(inode, id);
            }
        }
        Ok(tree)
    }
}

/// Returns the type of a file, `None` for a socket, which is useless without its process.
fn kind(meta: &Metadata, path: &Path) -> io::Result<Option<EntryKind>> {
    let kind = meta.file_type();
    let (major, minor) = (major(meta.rdev()), minor(meta.rdev()));
    Ok(Some(if kind.is_dir() {
        EntryKind::Directory
    } else if kind.is_symlink() {
        EntryKind::Symlink(fs::read_link(path)?.into_os_string().into_vec())
    } else if kind.is_char_device() {
        EntryKind::CharDevice(major, minor)
    } else if kind.is_block_device() {
        EntryKind::BlockDevice(major, minor)
    } else if kind.is_fifo() {
        EntryKind::Fifo
    } else if kind.is_file() {
        EntryKind::Path {
            path: path.to_owned(),
            size: meta.len(),
        }
    } else {
        return Ok(None);
    }))
}

fn xattrs(path: &Path) -> io::Result<Vec<Xattr>> {
    let mut names = vec![0; MAX_XATTR];
    let len = match llistxattr(path, &mut names) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    names.truncate(len);
    let mut found = Vec::new();
    let names = names.split(|byte| *byte == 0);
    for name in names.filter(|name| !name.is_empty()) {
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
    Ok(found)
}
