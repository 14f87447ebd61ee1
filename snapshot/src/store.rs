//! Where snapshots live: one directory each, published by a rename.
//!
//! ```text
//! ROOT/lock              creation and removal of names are serialised by it
//! ROOT/tmp-XXXXXX/       being written, or being removed; swept by the next writer
//! ROOT/NAME/manifest.json, state.bin, memory.bin[, working-set.json]
//! ```
//!
//! A reader that maps `memory.bin` holds a shared lock on it (a [`Lease`]), as
//! does every child on its parents while it is in use; removal takes that lock
//! exclusively and never waits. A process that dies releases its locks, so
//! nothing stale can block.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use crate::Error;
use crate::manifest::{self, Manifest};

/// Longest name, in bytes.
const MAX_NAME: usize = 100;
const TEMPORARY: &str = "tmp-";

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

    /// Starts a new snapshot.
    ///
    /// # Errors
    /// The file system refused.
    pub fn draft(&self) -> Result<Draft, Error> {
        let _guard = self.exclusive()?;
        let dir = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempdir_in(&self.root)
            .map_err(Error::io("create a directory in", &self.root))?;
        let path = dir.path().join(".lock");
        let lock = open_lock(&path)?;
        flock(&lock, FlockOperation::NonBlockingLockShared)
            .map_err(|e| Error::io("lock", &path)(e.into()))?;
        Ok(Draft { dir, _lock: lock })
    }

    /// Makes a draft visible as `name`, durably.
    ///
    /// # Errors
    /// [`Error::Exists`] when another writer was first; the draft is then gone
    /// and the other's snapshot is whole.
    pub fn publish(&self, draft: Draft, name: &str) -> Result<PathBuf, Error> {
        check_name(name)?;
        let target = self.root.join(name);
        for file in ["manifest.json", "state.bin", "memory.bin"] {
            let path = draft.path().join(file);
            sync(&path)?;
        }
        let lock_file = draft.path().join(".lock");
        fs::remove_file(&lock_file).map_err(Error::io("remove", &lock_file))?;
        sync(draft.path())?;
        let _guard = self.exclusive()?;
        if target.exists() {
            return Err(Error::Exists {
                name: name.to_owned(),
            });
        }
        fs::rename(draft.path(), &target).map_err(Error::io("publish", &target))?;
        // The directory has another name now: there is nothing to clean up.
        let _ = draft.dir.keep();
        sync(&self.root)?;
        Ok(target)
    }

    /// Opens a snapshot for use, and keeps it from being removed.
    ///
    /// # Errors
    /// It is absent, damaged, or of another format.
    pub fn lease(&self, name: &str) -> Result<Lease, Error> {
        check_name(name)?;
        let dir = self.root.join(name);
        let path = dir.join("memory.bin");
        let memory = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(Error::NotFound {
                    name: name.to_owned(),
                });
            }
            Err(e) => return Err(Error::io("open", &path)(e)),
        };
        flock(&memory, FlockOperation::NonBlockingLockShared).map_err(|_| Error::InUse {
            name: name.to_owned(),
            user: "a process that is removing it".to_owned(),
        })?;
        let manifest = read_manifest(&dir)?;
        let len = memory.metadata().map_err(Error::io("stat", &path))?.len();
        if len != manifest.memory.len {
            let reason = format!(
                "it has {len} bytes, and the manifest says {}",
                manifest.memory.len
            );
            return Err(Error::damaged(&path, reason));
        }
        Ok(Lease {
            name: name.to_owned(),
            dir,
            manifest,
            memory,
        })
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

    /// Removes a snapshot.
    ///
    /// # Errors
    /// It is absent, used by a machine, or the parent of another snapshot.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        let _guard = self.exclusive()?;
        let dir = self.root.join(name);
        if !dir.exists() {
            return Err(Error::NotFound {
                name: name.to_owned(),
            });
        }
        if let Some(child) = self.child_of(name)? {
            return Err(Error::InUse {
                name: name.to_owned(),
                user: format!("snapshot \"{child}\", which builds on it"),
            });
        }
        // A damaged snapshot may lack the file; then nothing can use it either.
        if let Ok(memory) = File::open(dir.join("memory.bin")) {
            flock(&memory, FlockOperation::NonBlockingLockExclusive).map_err(|_| Error::InUse {
                name: name.to_owned(),
                user: "a running machine".to_owned(),
            })?;
            self.unlink(&dir)?;
            return Ok(());
        }
        self.unlink(&dir)
    }

    /// Notes that a snapshot was used just now, for [`Self::trim`]. (The time is
    /// that of the manifest's last change; nothing in it is changed.)
    pub fn note_use(&self, lease: &Lease) {
        let path = lease.dir().join("manifest.json");
        // A store that cannot be written to is not trimmed either.
        let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// Of the snapshots whose names `chosen` accepts, keeps the `keep` most
    /// recently used and removes the others, except those that a machine or another
    /// snapshot uses. Returns how many went.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn trim(&self, keep: usize, chosen: impl Fn(&str) -> bool) -> Result<usize, Error> {
        let mut found = Vec::new();
        for name in self.names()?.into_iter().filter(|name| chosen(name)) {
            let manifest = self.root.join(&name).join("manifest.json");
            // One that cannot even be looked at is older than all others.
            let used = manifest.metadata().and_then(|meta| meta.modified());
            found.push((used.unwrap_or(SystemTime::UNIX_EPOCH), name));
        }
        found.sort();
        let surplus = found.len().saturating_sub(keep);
        let removed = found
            .iter()
            .take(surplus)
            .filter(|(_, name)| self.remove(name).is_ok());
        Ok(removed.count())
    }

    /// Takes the name away first, in one step, then the files.
    fn unlink(&self, dir: &Path) -> Result<(), Error> {
        let grave = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempdir_in(&self.root)
            .map_err(Error::io("create a directory in", &self.root))?;
        let moved = grave.path().join("removed");
        fs::rename(dir, &moved).map_err(Error::io("remove", dir))?;
        sync(&self.root)?;
        grave.close().map_err(Error::io("remove the files of", dir))
    }

    fn child_of(&self, name: &str) -> Result<Option<String>, Error> {
        Ok(self.children(name)?.into_iter().next())
    }

    /// The snapshots that build directly on `name`, which may itself be damaged.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn children(&self, name: &str) -> Result<Vec<String>, Error> {
        let builds_on = |other: &String| {
            read_manifest(&self.root.join(other))
                .ok()
                .and_then(|manifest| manifest.parent)
                .is_some_and(|parent| parent.name == name)
        };
        Ok(self.names()?.into_iter().filter(builds_on).collect())
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
        let file = open_lock(&path)?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|e| Error::io("lock", &path)(e.into()))?;
        Ok(file)
    }

    /// Removes drafts whose writer is gone.
    fn sweep(&self) -> Result<(), Error> {
        let _guard = self.exclusive()?;
        let entries = fs::read_dir(&self.root).map_err(Error::io("list", &self.root))?;
        for entry in entries.flatten() {
            if !entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                continue;
            }
            let path = entry.path();
            let abandoned = match File::open(path.join(".lock")) {
                Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
                // Published or removed half-way: a draft has its lock from the
                // start, under the same exclusive lock that is held here.
                Err(_) => !path.join("manifest.json").exists(),
            };
            if abandoned {
                fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
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
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::damaged(path, format!("it is over {limit} bytes")));
    }
    Ok(bytes)
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
mod tests {
    use super::*;
    use crate::manifest::{MemoryEntry, ParentRef, tests::sample};

    fn write(draft: &Draft, parent: Option<ParentRef>) -> Manifest {
        let mut manifest = Manifest {
            parent,
            memory: MemoryEntry {
                len: 3,
                ..MemoryEntry::default()
            },
            ..sample()
        };
        let bytes = manifest.encode().unwrap();
        fs::write(draft.path().join("manifest.json"), bytes).unwrap();
        fs::write(draft.path().join("state.bin"), b"").unwrap();
        fs::write(draft.path().join("memory.bin"), b"abc").unwrap();
        manifest
    }

    fn store() -> (tempfile::TempDir, SnapshotStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = SnapshotStore::open(&dir.path().join("snapshots")).unwrap();
        (dir, store)
    }

    fn publish(store: &SnapshotStore, name: &str, parent: Option<ParentRef>) -> Manifest {
        let draft = store.draft().unwrap();
        let manifest = write(&draft, parent);
        store.publish(draft, name).unwrap();
        manifest
    }

    #[test]
    fn a_published_snapshot_is_listed_leased_and_removed() {
        let (_dir, store) = store();
        let manifest = publish(&store, "base", None);
        assert_eq!(store.list().unwrap().len(), 1);
        let lease = store.lease("base").unwrap();
        assert_eq!(*lease.manifest(), manifest);
        assert!(matches!(store.remove("base"), Err(Error::InUse { .. })));
        drop(lease);
        store.remove("base").unwrap();
        assert!(store.list().unwrap().is_empty());
        assert!(matches!(store.lease("base"), Err(Error::NotFound { .. })));
        let left: Vec<_> = fs::read_dir(&store.root)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["lock"]);
    }

    #[test]
    fn of_two_writers_one_wins_and_the_other_is_told() {
        let (_dir, store) = store();
        let (first, second) = (store.draft().unwrap(), store.draft().unwrap());
        write(&first, None);
        write(&second, None);
        let loser = second.path().to_owned();
        store.publish(first, "base").unwrap();
        let error = store.publish(second, "base").unwrap_err();
        assert!(matches!(error, Error::Exists { .. }));
        assert!(!loser.exists());
        store.lease("base").unwrap();
    }

    #[test]
    fn abandoned_drafts_are_swept_and_live_ones_are_not() {
        let (_dir, store) = store();
        let live = store.draft().unwrap();
        let dead = store.root.join("tmp-dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(".lock"), b"").unwrap();
        fs::write(dead.join("memory.bin"), b"x").unwrap();
        SnapshotStore::open(&store.root).unwrap();
        assert!(!dead.exists());
        assert!(live.path().exists());
    }

    #[test]
    fn a_parent_cannot_be_removed_before_its_child() {
        let (_dir, store) = store();
        let base = publish(&store, "base", None);
        let parent = ParentRef {
            name: "base".into(),
            digest: base.digest,
        };
        publish(&store, "child", Some(parent));
        assert_eq!(store.children("base").unwrap(), ["child"]);
        let error = store.remove("base").unwrap_err().to_string();
        assert!(error.contains("child"), "{error}");
        store.remove("child").unwrap();
        store.remove("base").unwrap();
    }

    #[test]
    fn a_truncated_memory_file_is_refused() {
        let (_dir, store) = store();
        publish(&store, "base", None);
        fs::write(store.root.join("base/memory.bin"), b"ab").unwrap();
        assert!(matches!(store.lease("base"), Err(Error::Damaged { .. })));
        assert_eq!(
            store.list().unwrap().len(),
            1,
            "still listed, to be removed"
        );
        store.remove("base").unwrap();
    }

    #[test]
    fn trimming_keeps_what_was_used_last_and_what_is_in_use() {
        let (_dir, store) = store();
        for name in ["auto-1", "auto-2", "auto-3", "auto-4", "mine"] {
            publish(&store, name, None);
        }
        let used = |name: &str, seconds| {
            let path = store.root.join(name).join("manifest.json");
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            File::open(path).unwrap().set_modified(time).unwrap();
        };
        for (name, seconds) in [("auto-1", 10), ("auto-2", 20), ("auto-3", 30)] {
            used(name, seconds);
        }
        used("mine", 1);
        store.note_use(&store.lease("auto-2").unwrap());
        let held = store.lease("auto-1").unwrap();
        let automatic = |name: &str| name.starts_with("auto-");
        assert_eq!(store.trim(2, automatic).unwrap(), 1);
        assert_eq!(store.names().unwrap().len(), 4);
        assert!(matches!(store.lease("auto-3"), Err(Error::NotFound { .. })));
        drop(held);
        assert_eq!(store.trim(2, automatic).unwrap(), 1);
        let mut left = store.names().unwrap();
        left.sort();
        assert_eq!(left, ["auto-2", "auto-4", "mine"]);
    }

    #[test]
    fn names_cannot_leave_the_store() {
        for name in [
            "", "..", ".", "a/b", "/etc", "tmp-1", "lock", "a b", "-x", "é",
        ] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name("base-256m.1_x").is_ok());
    }
}
