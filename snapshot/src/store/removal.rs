//! Removing snapshots that neither a process nor another snapshot uses.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use super::{Lease, SnapshotStore, TEMPORARY, check_name, read_manifest, sync};
use crate::Error;
use crate::manifest::{self, Manifest};

/// Children by the names of their parents.
type Family = BTreeMap<String, Vec<String>>;

impl SnapshotStore {
    /// Removes a snapshot.
    ///
    /// # Errors
    /// It is absent, used by a machine, or the parent of another snapshot.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        let dir = self.root.join(name);
        let grave = {
            let _guard = self.exclusive()?;
            let _memory = self.claim(name, &self.family(name)?)?;
            self.bury(&dir)?
        };
        // Nobody finds it any more, so nobody has to wait for the rest; what is
        // left of it when this process dies is swept.
        match fs::remove_dir_all(&grave) {
            // Somebody who opened the store has swept it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(Error::io("remove the files of", &dir)),
        }
    }

    /// Sees to it that nobody uses a snapshot, as long as the returned file (if it has
    /// one: a damaged snapshot may not, and then nothing can use it) is open and the
    /// exclusive lock is held.
    pub(super) fn claim(&self, name: &str, family: &Family) -> Result<Option<File>, Error> {
        let dir = self.root.join(name);
        if !dir.exists() {
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
        let memory = File::open(dir.join("memory.bin")).ok();
        if let Some(memory) = &memory {
            flock(memory, FlockOperation::NonBlockingLockExclusive).map_err(|_| Error::InUse {
                name: name.to_owned(),
                user: "a running machine".to_owned(),
            })?;
        }
        Ok(memory)
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
    /// The directory, or a manifest in it, cannot be read: it may have any parent.
    pub fn trim(&self, keep: usize, chosen: impl Fn(&str) -> bool) -> Result<usize, Error> {
        let used = |name: &str| {
            let manifest = self.root.join(name).join("manifest.json");
            // One that cannot even be looked at is older than all others.
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

    /// Removes those of these snapshots that can be, if they are `still` to go once nobody
    /// can change them any more; returns how many went.
    fn remove_all(&self, names: Vec<String>, still: impl Fn(&str) -> bool) -> Result<usize, Error> {
        if names.is_empty() {
            return Ok(0);
        }
        let mut graves = Vec::new();
        let guard = self.exclusive()?;
        let mut family = self.family("")?;
        for name in names {
            // Used, or replaced by another of its name, while the lock was waited for.
            if !still(&name) {
                continue;
            }
            let buried = self
                .claim(&name, &family)
                .and_then(|_memory| self.bury(&self.root.join(&name)));
            if let Ok(grave) = buried {
                graves.push(grave);
                for children in family.values_mut() {
                    children.retain(|child| *child != name);
                }
            }
        }
        drop(guard);
        // Nobody finds them any more: what is left of them is swept.
        let gone = graves.len();
        for grave in graves {
            let _ = fs::remove_dir_all(grave);
        }
        Ok(gone)
    }

    /// Removes the snapshots whose name and manifest are chosen and that neither a
    /// process nor another snapshot uses. Returns how many went.
    ///
    /// # Errors
    /// As for [`Self::trim`].
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

    /// Takes the name away, in one step; returns where the files are now. Nothing is
    /// created for that: the disk may be full.
    pub(super) fn bury(&self, dir: &Path) -> Result<PathBuf, Error> {
        let grave = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .make_in(&self.root, |grave| fs::rename(dir, grave))
            .and_then(|grave| Ok(grave.into_temp_path().keep()?))
            .map_err(Error::io("remove", dir))?;
        sync(&self.root)?;
        Ok(grave)
    }

    /// The snapshots that build directly on `name`, which may itself be damaged.
    ///
    /// # Errors
    /// The directory, or a manifest in it, cannot be read.
    pub fn children(&self, name: &str) -> Result<Vec<String>, Error> {
        Ok(self.family(name)?.remove(name).unwrap_or_default())
    }

    /// The snapshots that build on others, by the names of these. The parent in a manifest
    /// of another version counts, too, if it is written as this version writes it. A
    /// manifest that cannot be read is an error, as any snapshot may be its parent; one
    /// that is no JSON, or too long, is none. `but` is left out: it is no child of its own.
    pub(super) fn family(&self, but: &str) -> Result<Family, Error> {
        let mut family = Family::new();
        for name in self.names()?.into_iter().filter(|name| name != but) {
            let path = self.root.join(&name).join("manifest.json");
            let read = match path.metadata() {
                // It is none.
                Ok(meta) if meta.len() > manifest::MAX_LEN => continue,
                Ok(_) => fs::read(&path),
                Err(error) => Err(error),
            };
            let bytes = match read {
                Ok(bytes) => bytes,
                // Removed meanwhile, or there is nothing to go on with.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io("read", &path)(e)),
            };
            if let Some(parent) = manifest::parent_in(&bytes) {
                family.entry(parent).or_default().push(name);
            }
        }
        Ok(family)
    }
}
