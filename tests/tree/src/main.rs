//! `sm-tree DIRECTORY`: prints a line for each file below a directory, with all
//! attributes that a program can read, sorted by name.
//!
//! End-to-end tests run it inside guests and, on the host, on the output of other tools
//! for the same images, and compare the lines. Mount points inside the directory are
//! listed without their contents, and directories that contain mount points without
//! times: a mount point may have been created for the mount.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// Maximum size of the value of an extended attribute, and of the list of names.
const XATTR_MAX: usize = 64 << 10;

fn main() -> Result<()> {
    let root: PathBuf = std::env::args_os()
        .nth(1)
        .context("usage: sm-tree DIRECTORY")?
        .into();
    let mut walk = Walk {
        mounts: mounts()?,
        links: BTreeMap::new(),
        out: BufWriter::new(io::stdout().lock()),
    };
    walk.directory(&root, &mut Vec::new())?;
    walk.out.flush()?;
    Ok(())
}

struct Walk<W> {
    mounts: BTreeSet<PathBuf>,
    /// First name of each inode with several links.
    links: BTreeMap<u64, String>,
    out: W,
}

impl<W: Write> Walk<W> {
    fn directory(&mut self, path: &Path, name: &mut Vec<u8>) -> Result<()> {
        let unreadable = || format!("cannot read {path:?}");
        let entries = fs::read_dir(path).with_context(unreadable)?;
        let mut children: Vec<OsString> = entries
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<_>>()
            .with_context(unreadable)?;
        children.sort();
        let mounted = |child: &OsString| self.mounts.contains(&path.join(child));
        let timeless = children.iter().any(mounted);
        let meta = fs::symlink_metadata(path).with_context(unreadable)?;
        self.line(path, name, &meta, timeless)?;
        for child in children {
            let len = name.len();
            name.push(b'/');
            name.extend_from_slice(child.as_bytes());
            let path = path.join(child);
            let meta = fs::symlink_metadata(&path).with_context(unreadable)?;
            if self.mounts.contains(&path) {
                writeln!(self.out, "{} mounted", escaped(name))?;
            } else if meta.is_dir() {
                self.directory(&path, name)?;
            } else {
                self.line(&path, name, &meta, false)?;
            }
            name.truncate(len);
        }
        Ok(())
    }

    fn line(&mut self, path: &Path, name: &[u8], meta: &Metadata, timeless: bool) -> Result<()> {
        let shown = escaped(name);
        let kind = meta.file_type();
        let mut parts = vec![
            format!("mode={:o}", meta.mode()),
            format!("owner={}:{}", meta.uid(), meta.gid()),
        ];
        if !timeless {
            parts.push(format!("mtime={}.{:09}", meta.mtime(), meta.mtime_nsec()));
        }
        // File systems count the size and links of directories differently.
        if !kind.is_dir() {
            parts.push(format!("size={} links={}", meta.size(), meta.nlink()));
        }
        if kind.is_char_device() || kind.is_block_device() {
            parts.push(format!("device={:x}", meta.rdev()));
        }
        if kind.is_symlink() {
            let target = fs::read_link(path)?;
            parts.push(format!("to={}", escaped(target.as_os_str().as_bytes())));
        }
        if meta.nlink() > 1 && !kind.is_dir() {
            let first = self
                .links
                .entry(meta.ino())
                .or_insert_with(|| shown.clone());
            parts.push(format!("same={first}"));
        }
        if kind.is_file() {
            parts.push(format!("sha256={}", hash(path)?));
        }
        for (key, value) in xattrs(path)? {
            parts.push(format!("{}={}", escaped(&key), escaped(&value)));
        }
        writeln!(self.out, "{shown} {}", parts.join(" "))?;
        Ok(())
    }
}

/// Returns the mount points (proc(5), mountinfo).
fn mounts() -> Result<BTreeSet<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.map(PathBuf::from).collect())
}

fn hash(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {path:?}"))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 256 << 10];
    loop {
        let count = file
            .read(&mut chunk)
            .with_context(|| format!("cannot read {path:?}"))?;
        let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else {
            return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect());
        };
        hash.update(bytes);
    }
}

fn xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; XATTR_MAX];
    let len = match rustix::fs::llistxattr(path, &mut names) {
        Ok(len) => len,
        Err(rustix::io::Errno::NOTSUP) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {path:?}")),
    };
    let names = names.get(..len).unwrap_or_default();
    let names = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let mut found = BTreeMap::new();
    for name in names {
        let mut value = vec![0; XATTR_MAX];
        let len = rustix::fs::lgetxattr(path, name, &mut value)
            .with_context(|| format!("cannot read attributes of {path:?}"))?;
        value.truncate(len);
        // Attributes of overlayfs itself are no part of the image.
        if !name.starts_with(b"trusted.overlay.") {
            found.insert(name.to_vec(), value);
        }
    }
    Ok(found)
}

/// Escapes bytes to one printable word.
fn escaped(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| match byte {
            b'!'..=b'~' if *byte != b'\\' && *byte != b'=' => char::from(*byte).to_string(),
            other => format!("\\x{other:02x}"),
        })
        .collect()
}
