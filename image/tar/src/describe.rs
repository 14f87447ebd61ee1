//! Headers of files of the host.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;

use super::{TarHeader, TarKind};

/// Maximum size of a list of names, and of a value, of extended attributes (Linux
/// `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const MAX_XATTR: usize = 64 << 10;

/// First name of each inode with several names.
pub(crate) type FirstNames = HashMap<(u64, u64), Vec<u8>>;

/// Returns the header of the file at `path`, as the entry `name`. `None` for a socket,
/// which is useless without its process.
pub(crate) fn describe(
    path: &Path,
    name: Vec<u8>,
    links: &mut FirstNames,
) -> io::Result<Option<TarHeader>> {
    let meta = fs::symlink_metadata(path)?;
    let Some(kind) = kind(&meta, path, &name, links)? else {
        return Ok(None);
    };
    Ok(Some(TarHeader {
        path: name,
        mode: u16::try_from(meta.mode() & 0o7777).unwrap_or(0),
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)),
        size: match kind {
            TarKind::File => meta.len(),
            _ => 0,
        },
        sparse: None,
        // A hard link also needs them, because unpacking it changes the owner, which
        // removes the file's capabilities.
        xattrs: xattrs(path)?,
        kind,
    }))
}

fn kind(
    meta: &Metadata,
    path: &Path,
    name: &[u8],
    links: &mut FirstNames,
) -> io::Result<Option<TarKind>> {
    let kind = meta.file_type();
    if kind.is_dir() {
        return Ok(Some(TarKind::Directory));
    }
    if meta.nlink() > 1 && !kind.is_socket() {
        let inode = (meta.dev(), meta.ino());
        if let Some(first) = links.get(&inode) {
            return Ok(Some(TarKind::Hardlink(first.clone())));
        }
        links.insert(inode, name.to_vec());
    }
    let (major, minor) = (major(meta.rdev()), minor(meta.rdev()));
    Ok(Some(if kind.is_symlink() {
        TarKind::Symlink(fs::read_link(path)?.into_os_string().into_vec())
    } else if kind.is_char_device() {
        TarKind::CharDevice(major, minor)
    } else if kind.is_block_device() {
        TarKind::BlockDevice(major, minor)
    } else if kind.is_fifo() {
        TarKind::Fifo
    } else if kind.is_file() {
        TarKind::File
    } else {
        return Ok(None);
    }))
}

/// Opens a file without following a link that may have replaced it.
pub(crate) fn open(path: &Path) -> io::Result<File> {
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
