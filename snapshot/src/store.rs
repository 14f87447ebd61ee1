//! The store of snapshots: one directory for each, published by a rename.
//!
//! ```text
//! ROOT                   locked while a draft is created and while abandoned ones are sought
//! ROOT/lock              serialises creation and removal of names
//! ROOT/tmp-XXXXXX/       a draft, or a snapshot during removal; swept by the next writer
//! ROOT/NAME/manifest.json, state.bin, memory.bin[, working-set.bin][, disk-SLOT.N ...]
//! ```
//!
//! A reader that maps `memory.bin` holds a shared lock on it (a [`Lease`]), and so does
//! every child on its parents while it is in use. Removal takes that lock exclusively
//! without waiting. The kernel releases the locks of a process that dies, so that no
//! stale lock remains.

mod removal;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use crate::Error;
use crate::manifest::{self, Manifest};

/// Maximum length of a name in bytes.
const MAX_NAME: usize = 100;
const TEMPORARY: &str = "tmp-";
/// The user of a snapshot in [`Error::InUse`] that has its files open.
pub const A_MACHINE: &str = "a running machine";
/// Lock file in a draft, held by its writer.
const LOCK: &str = ".lock";
/// Maximum number of attempts to open a snapshot whose name is replaced concurrently.
const LEASE_ATTEMPTS: usize = 32;

/// A directory of snapshots.
#[derive(Clone, Debug)]
pub struct SnapshotStore {
    root: PathBuf,
}

/// A snapshot that is being written.
///
/// It is removed when it is dropped without [`SnapshotStore::publish`].
#[derive(Debug)]
pub struct Draft {
    dir: tempfile::TempDir,
    /// Lock held for the lifetime of the draft, so that sweeping skips it.
    _lock: File,
}

impl Draft {
    /// Returns the directory for the snapshot's files.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Syncs the files to disk.
    fn sync(&self) -> Result<(), Error> {
        let list = |source| Error::io("list", self.path())(source);
        for entry in fs::read_dir(self.path()).map_err(list)? {
            let entry = entry.map_err(list)?;
            if entry.file_name() != LOCK {
                sync(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the lock file, which a published snapshot does not contain. Until
    /// publication the draft looks abandoned, but sweeping requires the exclusive lock,
    /// which the caller holds.
    fn unlock(&self) -> Result<(), Error> {
        let lock = self.path().join(LOCK);
        fs::remove_file(&lock).map_err(Error::io("remove", &lock))?;
        sync(self.path())
    }
}

/// A published snapshot that cannot be removed during the lifetime of this value.
#[derive(Debug)]
pub struct Lease {
    name: String,
    dir: PathBuf,
    manifest: Manifest,
    memory: File,
}

impl Lease {
    /// Returns the snapshot's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the snapshot's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the snapshot's manifest, which has been checked.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns `memory.bin`, opened for reading with a shared lock.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }
}

/// An entry of a listing.
#[derive(Debug)]
pub struct StoreEntry {
    /// The snapshot's name.
    pub name: String,
    /// The manifest, or the reason why the snapshot cannot be used.
    pub manifest: Result<Manifest, Error>,
    /// Disk usage in bytes, without files that have other names elsewhere.
    pub disk_bytes: u64,
}

impl SnapshotStore {
    /// Opens a store, creates its directory (mode 0700) if it is absent, and removes
    /// drafts of writers that were interrupted.
    ///
    /// # Errors
    /// A file system operation fails.
    pub fn open(root: &Path) -> Result<Self, Error> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(Error::io("create directory", root))?;
        let store = Self {
            root: root.to_owned(),
        };
        store.sweep()?;
        Ok(store)
    }

    /// Opens a store for reading only. Nothing is created, locked or removed.
    #[must_use]
    pub fn read_only(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Creates the draft of a new snapshot. Does not wait for another writer's disk.
    ///
    /// # Errors
    /// A file system operation fails.
    pub fn draft(&self) -> Result<Draft, Error> {
        let _guard = self.drafts()?;
        let dir = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempdir_in(&self.root)
            .map_err(Error::io("create a directory in", &self.root))?;
        let path = dir.path().join(LOCK);
        let lock = open_lock(&path)?;
        flock(&lock, FlockOperation::NonBlockingLockShared)
            .map_err(|e| Error::io("lock", &path)(e.into()))?;
        Ok(Draft { dir, _lock: lock })
    }

    /// Checks that a snapshot can be published as `name` now.
    ///
    /// # Errors
    /// [`Error::Exists`] if the name is in use, [`Error::BadName`] if it is invalid.
    pub fn check_free(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        // The check takes no lock, which a writer might hold for long: another writer may
        // be first in any case.
        if self.root.join(name).exists() {
            return Err(Error::Exists {
                name: name.to_owned(),
            });
        }
        Ok(())
    }

    /// Publishes a draft as `name`, durably.
    ///
    /// # Errors
    /// [`Error::Exists`] if another writer was first. The draft is then removed and the
    /// other snapshot is intact.
    pub fn publish(&self, draft: Draft, name: &str) -> Result<PathBuf, Error> {
        check_name(name)?;
        let target = self.root.join(name);
        draft.sync()?;
        let _guard = self.exclusive()?;
        if target.exists() {
            return Err(Error::Exists {
                name: name.to_owned(),
            });
        }
        draft.unlock()?;
        fs::rename(draft.path(), &target).map_err(Error::io("publish", &target))?;
        // The directory has been renamed, so there is nothing to clean up.
        let _ = draft.dir.keep();
        sync(&self.root)?;
        Ok(target)
    }

    /// Replaces the snapshot `name` by a draft, durably and atomically, and removes the
    /// old one.
    ///
    /// # Errors
    /// The snapshot is absent, used by a machine, or the parent of another snapshot; or
    /// the file system cannot exchange directories.
    pub fn replace(&self, draft: Draft, name: &str) -> Result<(), Error> {
        check_name(name)?;
        let target = self.root.join(name);
        draft.sync()?;
        let _guard = self.exclusive()?;
        // Held until the old snapshot can no longer be opened.
        let _old = self.claim(name, &self.family(name)?)?;
        draft.unlock()?;
        renameat_with(CWD, draft.path(), CWD, &target, RenameFlags::EXCHANGE)
            .map_err(|e| Error::io("replace", &target)(e.into()))?;
        // The old snapshot now has the draft's path and is removed with the draft.
        sync(&self.root)
    }

    /// Opens a snapshot for use and prevents its removal.
    ///
    /// # Errors
    /// The snapshot is absent, corrupt or of another format.
    pub fn lease(&self, name: &str) -> Result<Lease, Error> {
        check_name(name)?;
        for _ in 0..LEASE_ATTEMPTS {
            if let Some(lease) = self.try_lease(name)? {
                return Ok(lease);
            }
        }
        Err(Error::InUse {
            name: name.to_owned(),
            user: "processes that keep replacing it".to_owned(),
        })
    }

    /// Returns `None` if the name was replaced or removed concurrently.
    fn try_lease(&self, name: &str) -> Result<Option<Lease>, Error> {
        let dir = self.root.join(name);
        let path = dir.join("memory.bin");
        // A link is no snapshot: [`Self::names`] skips it, so that nothing keeps its parent or
        // its image.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&dir, flags, Mode::empty()).map(File::from);
        let opened = match opened.map_err(io::Error::from) {
            Ok(opened) => opened,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) || e.raw_os_error() == Some(Errno::LOOP.raw_os_error()) =>
            {
                return Err(Error::NotFound {
                    name: name.to_owned(),
                });
            }
            Err(e) => return Err(Error::io("open", &dir)(e)),
        };
        let memory = match File::open(&path) {
            Ok(file) => file,
            Err(_) if !is_still_at(&opened, &dir)? => return Ok(None),
            Err(e) => return Err(Error::io("open", &path)(e)),
        };
        flock(&memory, FlockOperation::NonBlockingLockShared).map_err(|_| Error::InUse {
            name: name.to_owned(),
            user: "a process that is removing it".to_owned(),
        })?;
        // A locked snapshot cannot be removed, but it may have been removed before the
        // lock was taken.
        if !is_still_at(&memory, &path)? {
            return Ok(None);
        }
        let manifest = read_manifest(&dir)?;
        let len = memory.metadata().map_err(Error::io("stat", &path))?.len();
        if len != manifest.memory.len {
            let reason = format!(
                "it has {len} bytes, and the manifest says {}",
                manifest.memory.len
            );
            return Err(Error::damaged(&path, reason));
        }
        Ok(Some(Lease {
            name: name.to_owned(),
            dir,
            manifest,
            memory,
        }))
    }

    /// Lists all snapshots by name, including those that cannot be used.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<StoreEntry>, Error> {
        let mut entries = Vec::new();
        for name in self.names()? {
            let dir = self.root.join(&name);
            let manifest = read_manifest(&dir);
            // Only a snapshot that was certainly removed concurrently is left out: others
            // may need what it refers to.
            if matches!(dir.try_exists(), Ok(false)) {
                continue;
            }
            entries.push(StoreEntry {
                name,
                manifest,
                disk_bytes: disk_bytes(&dir),
            });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            // A link to a directory that does not exist, as on a disk that is not mounted, is
            // no empty store: images in use would be removed.
            Err(e) if e.kind() == io::ErrorKind::NotFound && !self.root.is_symlink() => {
                return Ok(Vec::new());
            }
            Err(e) => return Err(Error::io("list", &self.root)(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &self.root))?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| check_name(name).is_ok()) else {
                continue;
            };
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => names.push(name.to_owned()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("look at", &entry.path())(e)),
            }
        }
        Ok(names)
    }

    /// Takes the lock that serialises creation, removal and sweeping among processes.
    fn exclusive(&self) -> Result<File, Error> {
        let path = self.root.join("lock");
        lock_exclusive(open_lock(&path)?, &path)
    }

    /// Takes the lock under which drafts are created and abandoned ones sought. It is held
    /// for a few system calls, none of which waits for a disk, because a machine is paused
    /// while its draft is created. It is taken after [`Self::exclusive`] where both are. A
    /// lock on the directory needs no file, which a full file system could not create.
    fn drafts(&self) -> Result<File, Error> {
        let root = File::open(&self.root).map_err(Error::io("open", &self.root))?;
        lock_exclusive(root, &self.root)
    }

    /// Removes drafts of writers that no longer exist, and remains of removals. A failure
    /// is logged and does not prevent use of the store; the next process that opens it
    /// tries again.
    fn sweep(&self) -> Result<(), Error> {
        for path in self.abandoned()? {
            if let Err(error) = fs::remove_dir_all(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "cannot remove the remains of a process");
            }
        }
        Ok(())
    }

    /// Returns temporary directories that no process works in. A draft is locked from its
    /// creation to its publication, each under one of the two locks taken here; nothing of
    /// a removed snapshot is needed.
    fn abandoned(&self) -> Result<Vec<PathBuf>, Error> {
        let _names = self.exclusive()?;
        let _drafts = self.drafts()?;
        let entries = fs::read_dir(&self.root).map_err(Error::io("list", &self.root))?;
        let temporary = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(TEMPORARY))
            .map(|entry| entry.path());
        let abandoned = |path: &PathBuf| match File::open(path.join(LOCK)) {
            Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        Ok(temporary.filter(abandoned).collect())
    }
}

/// Returns true if `path` names the open `file`.
fn is_still_at(file: &File, path: &Path) -> Result<bool, Error> {
    use std::os::unix::fs::MetadataExt as _;
    let open = file.metadata().map_err(Error::io("stat", path))?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("stat", path)(error)),
    }
}

/// Checks that `name` can be a directory entry and is not reserved by the store.
///
/// # Errors
/// [`Error::BadName`] with the reason.
pub fn check_name(name: &str) -> Result<(), Error> {
    let bad = |reason| {
        Err(Error::BadName {
            name: name.to_owned(),
            reason,
        })
    };
    if name.is_empty() || name.len() > MAX_NAME {
        return bad("it must have 1 to 100 characters");
    }
    if name == "lock" || name.starts_with(TEMPORARY) {
        return bad("it is reserved");
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.chars().all(allowed) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return bad(
            "it may have letters, digits, '.', '_' and '-', starting with a letter or digit",
        );
    }
    Ok(())
}

/// Reads and checks the manifest in a snapshot's directory.
///
/// # Errors
/// The manifest is absent, corrupt or of another format.
pub fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
    let bytes = read_capped(&dir.join("manifest.json"), manifest::MAX_LEN)?;
    Manifest::decode(dir, &bytes)
}

/// Reads a file of at most `limit` bytes.
pub(crate) fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    use std::io::Read as _;
    let file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("stat", path))?.len();
    // One more byte than the file's length lets the read detect its end without growing
    // the buffer.
    let capacity = usize::try_from(len.min(limit) + 1).unwrap_or(0);
    let mut bytes = Vec::with_capacity(capacity);
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::damaged(path, format!("it is over {limit} bytes")));
    }
    Ok(bytes)
}

fn lock_exclusive(file: File, path: &Path) -> Result<File, Error> {
    rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
        .map_err(|e| Error::io("lock", path)(e.into()))?;
    Ok(file)
}

fn open_lock(path: &Path) -> Result<File, Error> {
    fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("open", path))
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("write back", path))
}

fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::read_dir(dir).map_or(0, |entries| {
        entries
            .flatten()
            .filter_map(|entry| entry.metadata().ok())
            // Others share the rest, and its space stays with them.
            .filter(|metadata| metadata.nlink() == 1)
            .map(|metadata| metadata.blocks() * 512)
            .sum()
    })
}

#[cfg(test)]
pub(crate) mod tests;
