//! Conversion of a tar stream to a tree.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::sync::Arc;

use tar::{Archive, EntryType};

use super::{Entry, EntryKind, Tree};
use crate::Error;
use crate::source::Meta;

/// Prefix of extended attributes in pax headers.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// Prefix of pax headers for sparse files.
const SPARSE: &[u8] = b"GNU.sparse.";

impl Tree {
    /// Creates the tree of a tar stream (ustar, pax and GNU, without sparse files). A
    /// later entry replaces an earlier one with the same path. Contents of files are
    /// copied to `spool`, an empty file that the tree keeps open, such as an unnamed
    /// temporary file.
    ///
    /// A limit on the reader (`Read::take`) also limits the spool, and memory to a few
    /// hundred times as much: two bytes of a path can create a directory.
    ///
    /// # Errors
    /// The stream cannot be read or is not a tar archive, an entry is sparse or cannot be
    /// added to a tree, or `spool` cannot be written. Extended attributes whose values
    /// contain a line feed are not supported.
    pub fn from_tar(stream: impl Read, spool: File) -> Result<Self, Error> {
        let spool = Arc::new(spool);
        let mut tree = Self::new();
        let mut archive = Archive::new(stream);
        for entry in archive.entries().map_err(Error::Tar)? {
            let mut entry = entry.map_err(Error::Tar)?;
            let path = entry.path_bytes().into_owned();
            let link = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
            let refused = |reason| Error::Entry {
                path: path.clone(),
                reason,
            };
            let link = || link.clone().ok_or_else(|| refused("it has no target"));
            let kind = match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    spooled(&mut entry, &spool).map_err(Error::Tar)?
                }
                EntryType::Directory => EntryKind::Directory,
                EntryType::Symlink => EntryKind::Symlink(link()?),
                EntryType::Char | EntryType::Block => {
                    let header = entry.header();
                    let major = header.device_major().map_err(Error::Tar)?.unwrap_or(0);
                    let minor = header.device_minor().map_err(Error::Tar)?.unwrap_or(0);
                    match header.entry_type() {
                        EntryType::Char => EntryKind::CharDevice(major, minor),
                        _ => EntryKind::BlockDevice(major, minor),
                    }
                }
                EntryType::Fifo => EntryKind::Fifo,
                EntryType::Link => {
                    tree.link(&path, &link()?)?;
                    continue;
                }
                // Global headers set defaults for later entries. They are ignored, as
                // Go's reader does.
                EntryType::XGlobalHeader => continue,
                // A header of 512 bytes can describe holes of any size.
                EntryType::GNUSparse => return Err(refused("it is sparse")),
                _ => return Err(refused("it is of an unknown type")),
            };
            let added = described(&mut entry, kind).map_err(Error::Tar)?;
            tree.add(&path, added)?;
        }
        Ok(tree)
    }
}

/// Copies the contents of a file to the end of `spool`.
fn spooled(entry: &mut tar::Entry<'_, impl Read>, spool: &Arc<File>) -> io::Result<EntryKind> {
    let mut file = &**spool;
    let offset = file.seek(SeekFrom::End(0))?;
    let size = io::copy(entry, &mut file)?;
    Ok(EntryKind::Extent {
        file: Arc::clone(spool),
        offset,
        size,
    })
}

/// Builds an entry with owner, mode, time and extended attributes.
fn described(entry: &mut tar::Entry<'_, impl Read>, kind: EntryKind) -> io::Result<Entry> {
    let header = entry.header();
    let number = |value: u64| u32::try_from(value).map_err(io::Error::other);
    let mut meta = Meta {
        mode: u16::try_from(header.mode()? & 0o7777).map_err(io::Error::other)?,
        uid: number(header.uid()?)?,
        gid: number(header.gid()?)?,
        // Negative numbers are stored as two's complement.
        mtime: (header.mtime()?.cast_signed(), 0),
    };
    let mut xattrs = Vec::new();
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        if extension.key_bytes() == b"mtime" {
            let time = extension.value().ok().and_then(time);
            meta.mtime = time.ok_or_else(|| io::Error::other("a time is not a number"))?;
        } else if extension.key_bytes().starts_with(SPARSE) {
            return Err(io::Error::other("a file is sparse"));
        } else if let Some(name) = extension.key_bytes().strip_prefix(XATTR) {
            xattrs.push((name.to_vec(), extension.value_bytes().to_vec()));
        }
    }
    let mut described = Entry::new(kind).meta(meta);
    described.xattrs = xattrs;
    Ok(described)
}

/// Parses a decimal number of seconds as seconds and nanoseconds.
fn time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let digits = fraction.get(..fraction.len().min(9))?;
    let nanoseconds: u32 = format!("{digits:0<9}").parse().ok()?;
    match (whole.starts_with('-'), nanoseconds) {
        // Nanoseconds are relative to the preceding whole second.
        (true, 1..) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
        _ => Some((seconds, nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::time;

    #[test]
    fn times_have_nanoseconds() {
        for (text, expected) in [
            ("1700000000", Some((1_700_000_000, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.1234567899", Some((1, 123_456_789))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-0.5", Some((-1, 500_000_000))),
            ("-1", Some((-1, 0))),
            ("", None),
            ("1.x", None),
            ("1.123456789x", None),
        ] {
            assert_eq!(time(text), expected, "{text}");
        }
    }
}
