//! Removing what the guest caches of shared directories.
//!
//! The host saves each inode that the guest's kernel knows in a snapshot. Reconfiguring a file
//! system removes the names from the cache that nobody uses (`reconfigure_super` of Linux), and
//! with them the inodes, but nothing of other file systems: clones find the image's files
//! cached.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, open, openat2, statx};
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fspick};

/// A line of `/proc/PID/mountinfo` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct MountLine {
    id: u64,
    /// Path in the root of the process.
    target: PathBuf,
    /// Type of the file system.
    kind: Vec<u8>,
}

impl MountLine {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let target = fields.nth(3)?;
        // Optional fields end with one hyphen.
        fields.find(|field| *field == b"-")?;
        Some(Self {
            id,
            target: PathBuf::from(OsStr::from_bytes(&unescaped(target))),
            kind: fields.next()?.to_vec(),
        })
    }
}

/// Replaces octal escapes by their bytes.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\');
        let value = octal
            .and_then(|octal| std::str::from_utf8(octal).ok())
            .and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    bytes
}

/// Removes unused names of all file systems of type `kind` that are mounted in the root of a
/// process; `root` is its `/proc/PID/root`. The processes in the root are frozen, or a mount
/// that they move meanwhile is left as it is.
///
/// # Errors
/// The first of the operating system's, after all were tried.
pub(crate) fn unused_names(root: &Path, kind: &str) -> io::Result<()> {
    let lines = fs::read(root.with_file_name("mountinfo"))?;
    let lines = lines
        .split(|byte| *byte == b'\n')
        .filter_map(MountLine::parse);
    let directory = open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut result = Ok(());
    for line in lines.filter(|line| line.kind == kind.as_bytes()) {
        result = result.and(reconfigure(&directory, &line));
    }
    result
}

fn reconfigure(root: &OwnedFd, line: &MountLine) -> io::Result<()> {
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mounted = openat2(root, &line.target, flags, Mode::empty(), inside)?;
    let found = statx(&mounted, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    if found.stx_mnt_id != line.id {
        // Another file system is mounted over it.
        return Ok(());
    }
    let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
    let context = fspick(&mounted, c"", flags)?;
    Ok(fsconfig_reconfigure(&context)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_parsed() {
        let parse = |line: &str| MountLine::parse(line.as_bytes());
        let line =
            "36 35 0:45 / /a\\040b\\134c rw,noatime master:1 propagate_from:2 - virtiofs sm rw";
        assert_eq!(
            parse(line),
            Some(MountLine {
                id: 36,
                target: "/a b\\c".into(),
                kind: b"virtiofs".to_vec(),
            })
        );
        let line = parse("1 1 0:2 / / rw - rootfs none rw").unwrap();
        assert_eq!((line.id, line.kind.as_slice()), (1, &b"rootfs"[..]));
        for bad in [
            "",
            "x 1 0:2 / / rw - a b c",
            "1 1 0:2 / / rw",
            "1 1 0:2 / / rw -",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(unescaped(b"\\1\\999\\04"), b"\\1\\999\\04");
    }

    #[test]
    fn file_systems_of_a_process_are_reconfigured() {
        let is_root = rustix::process::geteuid().is_root();
        let missing = "only root may reconfigure file systems";
        if !sm_test_needs::met("root", (!is_root).then_some(missing)) {
            return;
        }
        let root = Path::new("/proc/self/root");
        unused_names(root, "proc").unwrap();
        unused_names(root, "no such type").unwrap();
        assert!(unused_names(Path::new("/proc/0/root"), "proc").is_err());
    }
}
