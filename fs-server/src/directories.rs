//! Descriptors of directories: some of them are kept, all of them can be opened again.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// Position that is not known.
const UNKNOWN: u64 = u64::MAX;

/// An open directory.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) fd: Arc<OwnedFd>,
    /// Some entry has a stored owner.
    overrides: AtomicBool,
    /// Position of the descriptor in the list of entries.
    position: AtomicU64,
}

impl Directory {
    pub(crate) fn new(fd: OwnedFd, overrides: bool) -> Self {
        Self {
            fd: Arc::new(fd),
            overrides: AtomicBool::new(overrides),
            position: AtomicU64::new(UNKNOWN),
        }
    }

    /// Returns true if owners may be stored at entries.
    pub(crate) fn has_overrides(&self) -> bool {
        self.overrides.load(Ordering::Relaxed)
    }

    /// Notes that an owner is stored at an entry.
    pub(crate) fn set_overrides(&self) {
        self.overrides.store(true, Ordering::Relaxed);
    }

    /// Moves the descriptor to `position` in the list of entries.
    ///
    /// # Errors
    /// The operating system's error.
    pub(crate) fn seek(&self, position: u64) -> Result<(), Errno> {
        // At the start, entries that were created meanwhile are seen by seeking only.
        if position == 0 || self.position.load(Ordering::Relaxed) != position {
            self.position.store(UNKNOWN, Ordering::Relaxed);
            rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::Start(position))?;
        }
        Ok(())
    }

    /// Notes the descriptor's position, if it is known.
    pub(crate) fn set_position(&self, position: Option<u64>) {
        self.position
            .store(position.unwrap_or(UNKNOWN), Ordering::Relaxed);
    }
}

impl std::os::fd::AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Hashes numbers of nodes, which the server has given out: nobody chooses them.
#[derive(Debug, Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // 2^64 divided by the golden ratio; the table uses the highest bits, too.
        let mixed = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The directories that are kept open, the ones used last.
#[derive(Debug)]
pub(crate) struct Directories {
    open: HashMap<u64, (u64, Arc<Directory>), BuildHasherDefault<NumberHasher>>,
    clock: u64,
    max: usize,
}

impl Directories {
    pub(crate) fn new(max: u32) -> Self {
        Self {
            open: HashMap::default(),
            clock: 0,
            max: usize::try_from(max).unwrap_or(usize::MAX).max(16),
        }
    }

    /// Returns the number of directories.
    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }

    /// Returns the directory of node `node`.
    pub(crate) fn get(&mut self, node: u64) -> Option<Arc<Directory>> {
        let (used, directory) = self.open.get_mut(&node)?;
        self.clock += 1;
        *used = self.clock;
        Some(Arc::clone(directory))
    }

    /// Adds the directory of node `node`.
    pub(crate) fn insert(&mut self, node: u64, directory: Arc<Directory>) {
        if self.open.len() >= self.max {
            self.shrink();
        }
        self.clock += 1;
        self.open.insert(node, (self.clock, directory));
    }

    /// Removes the directory of node `node`.
    pub(crate) fn remove(&mut self, node: u64) {
        self.open.remove(&node);
    }

    /// Removes the half that was not used for longest; returns true if there were any.
    pub(crate) fn shrink(&mut self) -> bool {
        let mut times: Vec<u64> = self.open.values().map(|(used, _)| *used).collect();
        if times.is_empty() {
            return false;
        }
        let half = times.len() / 2;
        let (_, middle, _) = times.select_nth_unstable(half);
        let middle = *middle;
        self.open.retain(|_, (used, _)| *used > middle);
        true
    }

    /// Removes all directories.
    pub(crate) fn clear(&mut self) {
        self.open.clear();
    }
}

/// Maximum length of a path for one system call, with its NUL (`PATH_MAX`).
const PATH_MAX: usize = 4096;
/// Maximum length of a path in bytes: deeper directories are not reached.
const MAX_PATH: usize = 256 << 10;

/// Opens a directory by the names that lead to it from a share's root. No symbolic link is
/// followed, and nothing outside of the share is reached.
///
/// # Errors
/// `ESTALE` if there is no such directory any more.
pub(crate) fn open_below<'a>(
    root: BorrowedFd<'_>,
    names: impl Iterator<Item = &'a [u8]> + Clone,
    submounts: bool,
) -> Result<OwnedFd, Errno> {
    let total: usize = names.clone().map(|name| name.len() + 1).sum();
    if total > MAX_PATH {
        return Err(Errno::NAMETOOLONG);
    }
    let mut at: Option<OwnedFd> = None;
    let mut path: Vec<u8> = Vec::with_capacity(256);
    for name in names {
        if path.len() + name.len() + 2 > PATH_MAX {
            let from = at.as_ref().map_or(root, |fd| fd.as_fd());
            at = Some(open_one(from, &path, OFlags::PATH, submounts)?);
            path.clear();
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
    }
    let from = at.as_ref().map_or(root, |fd| fd.as_fd());
    open_one(from, &path, OFlags::RDONLY, submounts).or_else(|errno| match errno {
        Errno::ACCESS => open_one(from, &path, OFlags::PATH, submounts),
        other => Err(other),
    })
}

fn open_one(
    from: BorrowedFd<'_>,
    path: &[u8],
    access: OFlags,
    submounts: bool,
) -> Result<OwnedFd, Errno> {
    let mut resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    if !submounts {
        resolve |= ResolveFlags::NO_XDEV;
    }
    let flags = access | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(from, path, flags, Mode::empty(), resolve).map_err(|errno| match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::AGAIN => Errno::STALE,
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> Arc<Directory> {
        Arc::new(Directory::new(
            std::fs::File::open("/").unwrap().into(),
            false,
        ))
    }

    #[test]
    fn directories_used_last_are_kept() {
        let mut directories = Directories::new(16);
        for node in 0..16 {
            directories.insert(node, directory());
        }
        assert!(directories.get(0).is_some());
        directories.insert(16, directory());
        assert!(directories.len() <= 16);
        for kept in [0, 15, 16] {
            assert!(directories.get(kept).is_some(), "{kept}");
        }
        assert!(directories.get(1).is_none());
        while directories.shrink() {}
        assert_eq!(directories.len(), 0);
    }

    #[test]
    fn paths_longer_than_one_system_call_are_opened() {
        let root = tempfile::tempdir().unwrap();
        let name = [b'd'; 200];
        let mut at: OwnedFd = std::fs::File::open(root.path()).unwrap().into();
        for _ in 0..50 {
            rustix::fs::mkdirat(&at, &name[..], Mode::RWXU).unwrap();
            at = openat2(
                &at,
                &name[..],
                OFlags::PATH,
                Mode::empty(),
                ResolveFlags::empty(),
            )
            .unwrap();
        }
        let share = std::fs::File::open(root.path()).unwrap();
        let names = |count| std::iter::repeat_n(&name[..], count);
        let found = open_below(share.as_fd(), names(50), false).unwrap();
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(inode(&found), inode(&at));
        let deeper = open_below(share.as_fd(), names(51), false);
        assert_eq!(deeper.unwrap_err(), Errno::STALE);
        let endless = open_below(share.as_fd(), names(2000), false);
        assert_eq!(endless.unwrap_err(), Errno::NAMETOOLONG);
    }

    #[test]
    fn links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("d")).unwrap();
        std::os::unix::fs::symlink("d", root.path().join("inside")).unwrap();
        std::os::unix::fs::symlink("/", root.path().join("outside")).unwrap();
        let share = std::fs::File::open(root.path()).unwrap();
        let open = |name: &'static str| {
            open_below(share.as_fd(), std::iter::once(name.as_bytes()), false).map(drop)
        };
        assert_eq!(open("d"), Ok(()));
        for link in ["inside", "outside"] {
            assert_eq!(open(link), Err(Errno::STALE), "{link}");
        }
    }
}
