//! Removal of snapshots that neither a process nor another snapshot uses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use super::{A_MACHINE, Lease, SnapshotStore, TEMPORARY, check_name, read_manifest, sync};
use crate::Error;
use crate::manifest::{self, Manifest};

/// Names of children, by the names of their parents.
type Family = BTreeMap<String, BTreeSet<String>>;

impl SnapshotStore {
    /// Removes a snapshot.
    ///
    /// # Errors
    /// The snapshot is absent, used by a machine, or the parent of another snapshot.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        let dir = self.root.join(name);
        // A store that was never written to has no lock to take.
        if !dir.try_exists().map_err(Error::io("look at", &dir))? {
            return Err(Error::NotFound {
                name: name.to_owned(),
            });
        }
        let grave = {
            let _guard = self.exclusive()?;
            let _memory = self.claim(name, &self.family(name)?)?;
            self.bury(&dir)?
        };
        // The snapshot can no longer be opened, so the rest is done without the lock. If
        // this process dies, the remains are swept.
        match fs::remove_dir_all(&grave) {
            // Another process has swept it when it opened the store.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(Error::io("remove the files of", &dir)),
        }
    }

    /// Ensures that nothing uses a snapshot while the returned file is open and the
    /// exclusive lock is held. Returns `None` for a corrupt snapshot without
    /// `memory.bin`, which cannot be used.
    pub(super) fn claim(&self, name: &str, family: &Family) -> Result<Option<File>, Error> {
        let dir = self.root.join(name);
        if !dir.try_exists().map_err(Error::io("look at", &dir))? {
            return Err(Error::NotFound {
                name: name.to_owned(),
            });
        }
        if let Some(child) = family.get(name).and_then(|children| children.first()) {
            return Err(Error::InUse {
                name: name.to_owned(),
                user: format!("snapshot \"{child}\", which builds on it"),
            });
        }
        let path = dir.join("memory.bin");
        let memory = match File::open(&path) {
            Ok(memory) => Some(memory),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                None
            }
            // A machine may use it.
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        if let Some(memory) = &memory {
            flock(memory, FlockOperation::NonBlockingLockExclusive).map_err(|_| Error::InUse {
                name: name.to_owned(),
                user: A_MACHINE.to_owned(),
            })?;
        }
        Ok(memory)
    }

    /// Records that a snapshot was used now, for [`Self::trim`]. The record is the
    /// modification time of its manifest, whose contents do not change.
    pub fn note_use(&self, lease: &Lease) {
        let path = lease.dir().join("manifest.json");
        // A store that is not writable is not trimmed either.
        let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// Keeps the `keep` most recently used of the snapshots whose names `chosen` accepts
    /// and removes the others, except those that a machine or another snapshot uses.
    /// Returns the number of removed snapshots.
    ///
    /// # Errors
    /// The directory, or a manifest in it, cannot be read. Such a manifest could name any
    /// parent.
    pub fn trim(&self, keep: usize, chosen: impl Fn(&str) -> bool) -> Result<usize, Error> {
        let used = |name: &str| {
            let manifest = self.root.join(name).join("manifest.json");
            // A manifest without a time counts as the oldest.
            let used = manifest.metadata().and_then(|meta| meta.modified());
            used.unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let names = self.names()?.into_iter().filter(|name| chosen(name));
        let mut found: Vec<_> = names.map(|name| (used(&name), name)).collect();
        found.sort();
        found.truncate(found.len().saturating_sub(keep));
        let Some((newest, _)) = found.last().cloned() else {
            return Ok(0);
        };
        let surplus = found.into_iter().map(|(_, name)| name).collect();
        self.remove_all(surplus, |name| used(name) <= newest)
    }

    /// Removes those of the named snapshots that are not in use. `still` is called under
    /// the exclusive lock and confirms that a snapshot is still to be removed. Returns
    /// the number of removed snapshots.
    fn remove_all(&self, names: Vec<String>, still: impl Fn(&str) -> bool) -> Result<usize, Error> {
        if names.is_empty() {
            return Ok(0);
        }
        let mut graves = Vec::new();
        let guard = self.exclusive()?;
        let mut family = self.family("")?;
        let pairs = family.iter().flat_map(|(parent, children)| {
            let children = children.iter();
            children.map(move |child| (child.clone(), parent.clone()))
        });
        let parents: BTreeMap<String, String> = pairs.collect();
        for name in names {
            // The snapshot was used or replaced before the lock was taken.
            if !still(&name) {
                continue;
            }
            let buried = self
                .claim(&name, &family)
                .and_then(|_memory| self.bury(&self.root.join(&name)));
            if let Ok(grave) = buried {
                graves.push(grave);
                let siblings = parents.get(&name).and_then(|it| family.get_mut(it));
                siblings.map(|siblings| siblings.remove(&name));
            }
        }
        drop(guard);
        // The snapshots can no longer be opened; remains are swept later.
        let removed = graves.len();
        for grave in graves {
            let _ = fs::remove_dir_all(grave);
        }
        Ok(removed)
    }

    /// Removes the snapshots whose name and manifest are chosen and that neither a
    /// process nor another snapshot uses. Returns the number of removed snapshots.
    ///
    /// # Errors
    /// As [`Self::trim`].
    pub fn remove_unused(
        &self,
        named: impl Fn(&str) -> bool,
        chosen: impl Fn(&Manifest) -> bool,
    ) -> Result<usize, Error> {
        let removed = |name: &str| {
            read_manifest(&self.root.join(name)).is_ok_and(|manifest| chosen(&manifest))
        };
        let names = self.names()?.into_iter();
        let names = names.filter(|name| named(name) && removed(name)).collect();
        self.remove_all(names, removed)
    }

    /// Renames a snapshot to a temporary name, atomically, and returns its new path. No
    /// file or directory is created, because the disk may be full.
    pub(super) fn bury(&self, dir: &Path) -> Result<PathBuf, Error> {
        let grave = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .make_in(&self.root, |grave| fs::rename(dir, grave))
            .and_then(|grave| Ok(grave.into_temp_path().keep()?))
            .map_err(Error::io("remove", dir))?;
        sync(&self.root)?;
        Ok(grave)
    }

    /// Returns the snapshots that build directly on `name`, which may itself be corrupt.
    ///
    /// # Errors
    /// The directory, or a manifest in it, cannot be read.
    pub fn children(&self, name: &str) -> Result<Vec<String>, Error> {
        let children = self.family(name)?.remove(name).unwrap_or_default();
        Ok(children.into_iter().collect())
    }

    /// Returns the children of all snapshots. Manifests of other versions count if their
    /// parent is written in the form of this version. A manifest that cannot be read is
    /// an error, because it could name any parent; one that is not JSON or too long names
    /// none. `but` is left out, because no snapshot is its own child.
    pub(super) fn family(&self, but: &str) -> Result<Family, Error> {
        let mut family = Family::new();
        for name in self.names()?.into_iter().filter(|name| name != but) {
            let path = self.root.join(&name).join("manifest.json");
            let read = match path.metadata() {
                // A file of this size is not a manifest.
                Ok(meta) if meta.len() > manifest::MAX_LEN => continue,
                Ok(_) => fs::read(&path),
                Err(error) => Err(error),
            };
            let bytes = match read {
                Ok(bytes) => bytes,
                // The snapshot was removed concurrently, or has no manifest.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io("read", &path)(e)),
            };
            if let Some(parent) = manifest::parent_in(&bytes) {
                family.entry(parent).or_default().insert(name);
            }
        }
        Ok(family)
    }
}
