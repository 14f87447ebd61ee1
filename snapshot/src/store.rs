//! Where snapshots live: one directory each, published by a rename.
//!
//! ```text
//! ROOT                   locked while a draft begins, and while abandoned ones are sought
//! ROOT/lock              creation and removal of names are serialised by it
//! ROOT/tmp-XXXXXX/       being written, or being removed; swept by the next writer
//! ROOT/NAME/manifest.json, state.bin, memory.bin[, working-set.bin]
//! ```
//!
//! A reader that maps `memory.bin` holds a shared lock on it (a [`Lease`]), as
//! does every child on its parents while it is in use; removal takes that lock
//! exclusively and never waits. A process that dies releases its locks, so
//! nothing stale can block.

mod removal;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use crate::Error;
use crate::manifest::{self, Manifest};

/// Longest name, in bytes.
const MAX_NAME: usize = 100;
const TEMPORARY: &str = "tmp-";
/// In a draft: locked by its writer.
const LOCK: &str = ".lock";
/// How often a name may become another snapshot under whoever opens it.
const LEASE_ATTEMPTS: usize = 32;

/// A directory of snapshots.
#[derive(Clone, Debug)]
pub struct SnapshotStore {
    root: PathBuf,
}

/// A snapshot that is being written.
///
/// Dropped without [`SnapshotStore::publish`], it disappears.
#[derive(Debug)]
pub struct Draft {
    dir: tempfile::TempDir,
    /// Held while the draft lives, so that sweeping leaves it alone.
    _lock: File,
}

impl Draft {
    /// The directory to write the files into.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Brings its files to disk.
    fn sync(&self) -> Result<(), Error> {
        for file in ["manifest.json", "state.bin", "memory.bin"] {
            sync(&self.path().join(file))?;
        }
        Ok(())
    }

    /// Takes the lock's file away, which a published snapshot does not have. Until it
    /// is published, the draft looks abandoned: whoever sweeps has to wait for the
    /// exclusive lock, which the caller holds.
    fn unlock(&self) -> Result<(), Error> {
        let lock = self.path().join(LOCK);
        fs::remove_file(&lock).map_err(Error::io("remove", &lock))?;
        sync(self.path())
    }
}

/// A published snapshot that cannot be removed while this value lives.
#[derive(Debug)]
pub struct Lease {
    name: String,
    dir: PathBuf,
    manifest: Manifest,
    memory: File,
}

impl Lease {
    /// The snapshot's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its manifest, checked.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// `memory.bin`, opened for reading, locked shared.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }
}

/// One line of a listing.
#[derive(Debug)]
pub struct Entry {
    /// The snapshot's name.
    pub name: String,
    /// Its manifest, or why it cannot be used.
    pub manifest: Result<Manifest, Error>,
    /// Bytes it occupies on disk.
    pub disk_bytes: u64,
}

impl SnapshotStore {
    /// Opens a store, creating its directory (mode 0700) when it is absent, and
    /// removes what interrupted writers left behind.
    ///
    /// # Errors
    /// The file system refused.
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

    /// Opens a store for reading only: creates, locks and removes nothing.
    #[must_use]
    pub fn read_only(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Starts a new snapshot. Waits for no other writer's disk.
    ///
    /// # Errors
    /// The file system refused.
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

    /// Checks that a snapshot could be published as `name` now.
    ///
    /// # Errors
    /// [`Error::Exists`] when there is one, [`Error::BadName`] when there cannot be.
    pub fn check_free(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        // Without the lock, for which a writer may have to be waited for: another writer
        // may be first in any case.
        if self.root.join(name).exists() {
            return Err(Error::Exists {
                name: name.to_owned(),
            });
        }
        Ok(())
    }

    /// Makes a draft visible as `name`, durably.
    ///
    /// # Errors
    /// [`Error::Exists`] when another writer was first; the draft is then gone
    /// and the other's snapshot is whole.
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
        // The directory has another name now: there is nothing to clean up.
        let _ = draft.dir.keep();
        sync(&self.root)?;
        Ok(target)
    }

    /// Puts a draft in the place of the snapshot `name`, durably and in one step, and
    /// removes that.
    ///
    /// # Errors
    /// It is absent, used by a machine, or the parent of another snapshot; or the file
    /// system cannot exchange directories.
    pub fn replace(&self, draft: Draft, name: &str) -> Result<(), Error> {
        check_name(name)?;
        let target = self.root.join(name);
        draft.sync()?;
        let _guard = self.exclusive()?;
        // Kept until nobody finds the old one any more.
        let _old = self.claim(name, &self.family(name)?)?;
        draft.unlock()?;
        renameat_with(CWD, draft.path(), CWD, &target, RenameFlags::EXCHANGE)
            .map_err(|e| Error::io("replace", &target)(e.into()))?;
        // What the draft's name is of now goes with it.
        sync(&self.root)
    }

    /// Opens a snapshot for use, and keeps it from being removed.
    ///
    /// # Errors
    /// It is absent, damaged, or of another format.
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

    /// `None` when the name became another snapshot, or none, meanwhile.
    fn try_lease(&self, name: &str) -> Result<Option<Lease>, Error> {
        let dir = self.root.join(name);
        let path = dir.join("memory.bin");
        let opened = match File::open(&dir) {
            Ok(opened) => opened,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
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
        // What is locked now cannot be removed; but it may have been before.
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

    /// Lists all snapshots by name, usable or not.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for name in self.names()? {
            let dir = self.root.join(&name);
            let manifest = read_manifest(&dir);
            if !dir.exists() {
                continue; // removed meanwhile
            }
            entries.push(Entry {
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
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io("list", &self.root)(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("list", &self.root))?;
            let name = entry.file_name();
            if let Some(name) = name.to_str()
                && check_name(name).is_ok()
                && entry.file_type().is_ok_and(|kind| kind.is_dir())
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Serialises creation, removal and sweeping among processes.
    fn exclusive(&self) -> Result<File, Error> {
        let path = self.root.join("lock");
        hold(open_lock(&path)?, &path)
    }

    /// Taken while a draft is created and locked, and while abandoned ones are looked for:
    /// for a few system calls that write nothing back, as a machine is paused when its
    /// draft begins. Taken after [`Self::exclusive`] where both are. It is a lock on the
    /// directory, for which a full file system needs no file.
    fn drafts(&self) -> Result<File, Error> {
        let root = File::open(&self.root).map_err(Error::io("open", &self.root))?;
        hold(root, &self.root)
    }

    /// Removes drafts whose writer is gone, and what removals left. What cannot be
    /// removed is no reason not to use the store; the next to open it tries again.
    fn sweep(&self) -> Result<(), Error> {
        for path in self.abandoned()? {
            if let Err(error) = fs::remove_dir_all(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, path = %path.display(), "cannot remove what a process left");
            }
        }
        Ok(())
    }

    /// Temporary directories that nobody works in. A draft has its lock from the
    /// start to its publication, each under one of the locks that are taken here; and of
    /// a removed snapshot nothing is needed any more.
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

/// Whether `path` names the open `file`.
fn is_still_at(file: &File, path: &Path) -> Result<bool, Error> {
    use std::os::unix::fs::MetadataExt as _;
    let open = file.metadata().map_err(Error::io("stat", path))?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("stat", path)(error)),
    }
}

/// Checks that `name` can be a directory entry and is not one of the store's own.
///
/// # Errors
/// A sentence saying what is wrong.
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
/// It is absent, damaged or of another format.
pub fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
    let bytes = read_capped(&dir.join("manifest.json"), manifest::MAX_LEN)?;
    Manifest::decode(dir, &bytes)
}

/// Reads a file that must not be longer than `limit`.
pub(crate) fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    use std::io::Read as _;
    let file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("look at", path))?.len();
    // One byte more than it has: then its end is seen without growing.
    let room = usize::try_from(len.min(limit) + 1).unwrap_or(0);
    let mut bytes = Vec::with_capacity(room);
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::damaged(path, format!("it is over {limit} bytes")));
    }
    Ok(bytes)
}

fn hold(file: File, path: &Path) -> Result<File, Error> {
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
            .map(|metadata| metadata.blocks() * 512)
            .sum()
    })
}

#[cfg(test)]
pub(crate) mod tests;
