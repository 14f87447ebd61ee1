//! Directories whose content guests have written: of any depth, without permissions, and with
//! links that lead anywhere.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

const DIRECTORY: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Maximum depth at which files are counted.
const MAX_DEPTH: usize = 256;

/// Number of names that are read at a time. A guest may have made any number in a directory.
const BATCH: usize = 1 << 16;

/// Removes a directory and all below it.
///
/// Directories at depth two are moved up to `path`, so that neither recursion nor the number of
/// open files depends on the depth, and the names that are still to be looked at are there and
/// not in memory.
///
/// # Errors
/// The first file that cannot be removed. What was removed until then is gone.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    remove_in_batches(path, BATCH)
}

fn remove_in_batches(path: &Path, batch: usize) -> io::Result<()> {
    let root = openat(CWD, path, DIRECTORY | OFlags::RDONLY, Mode::empty())?;
    // Directories that are moved to the root have names of their own.
    let mut moved = 0_u64;
    empty(&root, batch, |name| {
        let directory = opened(&root, name)?;
        empty(&directory, batch, |below| {
            let new = loop {
                moved += 1;
                let new = CString::new(format!(".sm-removed-{moved}"))?;
                match statat(&root, &*new, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => break new,
                    Err(error) => return Err(error.into()),
                    Ok(_) => {}
                }
            };
            match renameat(&directory, below, &root, &*new) {
                // A directory that is moved to another one is written to (`..`).
                Err(Errno::ACCESS) => {
                    permit(&directory, below)?;
                    Ok(renameat(&directory, below, &root, &*new)?)
                }
                moved => Ok(moved?),
            }
        })?;
        Ok(unlinkat(&root, name, AtFlags::REMOVEDIR)?)
    })?;
    std::fs::remove_dir(path)
}

/// Removes the files of a directory, and has `take` remove each directory from it.
fn empty(
    directory: &OwnedFd,
    batch: usize,
    mut take: impl FnMut(&CStr) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        let entries = entries(directory, batch)?;
        if entries.is_empty() {
            return Ok(());
        }
        for (name, kind) in entries {
            match kind {
                FileType::Directory => take(&name)?,
                _ => unlinkat(directory, &*name, AtFlags::empty())?,
            }
        }
    }
}

/// Opens a directory for reading and writing its entries, whatever its permissions are.
fn opened(parent: &OwnedFd, name: &CStr) -> io::Result<OwnedFd> {
    let open = || openat(parent, name, DIRECTORY | OFlags::RDONLY, Mode::empty());
    // Its owner may have taken its permissions, and root needs none.
    match open() {
        Err(Errno::ACCESS) => {}
        found => {
            let found = found?;
            let mode = rustix::fs::fstat(&found)?.st_mode;
            if Mode::from_raw_mode(mode).contains(Mode::RWXU) {
                return Ok(found);
            }
        }
    }
    permit(parent, name)?;
    Ok(open()?)
}

/// Gives the owner of a directory all permissions. A link that takes its place meanwhile is
/// not followed.
fn permit(parent: &OwnedFd, name: &CStr) -> io::Result<()> {
    let directory = openat(parent, name, DIRECTORY | OFlags::PATH, Mode::empty())?;
    // fchmod(2) refuses descriptors of paths.
    let link = format!("/proc/self/fd/{}", directory.as_raw_fd());
    Ok(rustix::fs::chmod(link, Mode::RWXU)?)
}

/// Returns up to `most` entries of a directory.
fn entries(directory: &OwnedFd, most: usize) -> io::Result<Vec<(CString, FileType)>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        found.push((name.to_owned(), kind));
        if found.len() >= most {
            break;
        }
    }
    Ok(found)
}

/// Returns the bytes on disk of the files below a directory, down to a depth of 256. What
/// cannot be read counts nothing.
pub(super) fn space_of(path: &Path) -> u64 {
    match openat(CWD, path, DIRECTORY | OFlags::RDONLY, Mode::empty()) {
        Ok(directory) => space_below(&directory, 0),
        Err(_) => 0,
    }
}

fn space_below(directory: &OwnedFd, depth: usize) -> u64 {
    let Ok(entries) = Dir::read_from(directory) else {
        return 0;
    };
    let mut bytes = 0_u64;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let own = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        // Names of one file share its space.
        let names = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => 1,
            _ => u64::from(u32::try_from(stat.st_nlink).unwrap_or(u32::MAX)).max(1),
        };
        bytes = bytes.saturating_add(own / names);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && depth < MAX_DEPTH {
            let below = openat(
                directory.as_fd(),
                name,
                DIRECTORY | OFlags::RDONLY,
                Mode::empty(),
            );
            if let Ok(below) = below {
                bytes = bytes.saturating_add(space_below(&below, depth + 1));
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_tree_of_any_depth_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "kept").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir_all(tree.join(".sm-removed-1/.sm-removed-2")).unwrap();
        fs::write(tree.join("a/b/file"), "x").unwrap();
        symlink(&outside, tree.join("a/link")).unwrap();
        symlink(outside.join("file"), tree.join("a/b/link")).unwrap();
        // Deeper than a path can be, and than this process has descriptors.
        let mut directory = openat(CWD, &tree, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&directory, "deep", Mode::RWXU).unwrap();
            directory = openat(&directory, "deep", DIRECTORY, Mode::empty()).unwrap();
        }
        fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o0)).unwrap();
        assert!(space_of(&tree) > 0);
        remove(&tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "kept");
    }

    #[test]
    fn a_directory_is_read_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        for number in 0..50 {
            fs::create_dir_all(tree.join(format!("{number}/a/b"))).unwrap();
            fs::write(tree.join(format!("{number}/a/f")), "").unwrap();
            fs::create_dir_all(tree.join(format!("0/{number}"))).unwrap();
            fs::write(tree.join(format!("0/f{number}")), "").unwrap();
        }
        let opened = openat(CWD, &tree, DIRECTORY, Mode::empty()).unwrap();
        assert_eq!(entries(&opened, 7).unwrap().len(), 7);
        remove_in_batches(&tree, 7).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn space_counts_files_once() {
        let dir = tempfile::tempdir().unwrap();
        let before = space_of(dir.path());
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/f"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(dir.path().join("d/f"), dir.path().join("other")).unwrap();
        symlink("/", dir.path().join("link")).unwrap();
        let bytes = space_of(dir.path()) - before;
        assert!(
            (1 << 20..(1 << 20) + (64 << 10)).contains(&bytes),
            "{bytes}"
        );
        assert_eq!(space_of(&dir.path().join("missing")), 0);
    }
}
