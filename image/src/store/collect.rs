//! Removal of images and of data that is no longer needed.
//!
//! Data in use always stays: disks that a process has open, disks of images that the
//! caller names (a machine has its disk open before it creates a snapshot, and opens it
//! again to restore it), and data that running operations need. All of this is determined
//! under the exclusive lock of the store, while no disk can be opened. The number of
//! descriptors does not depend on the number of disks. A machine that has exited has created its snapshots before. Data that cannot
//! be parsed could refer to anything, so nothing is removed that it could refer to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use super::Store;
use super::damaged::Damaged;
use super::files::{digest_of, entries, is_absence, lock_opening, may_exist, read_json};
use super::names::ImageSummary;
use super::record::DiskRecord;
use super::usage::size_on_disk;
use super::work::Work;
use crate::Error;
use crate::digest::Digest;

/// Data to be removed in addition to images without names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PruneOptions {
    /// Remove all images that are not in use.
    pub all: bool,
    /// Remove compressed layers, which are kept for pushing and saving.
    pub compressed: bool,
    /// Remove the least recently used data until at most this number of bytes is left:
    /// first compressed layers, then images that can be pulled again.
    pub max_bytes: Option<u64>,
}

impl PruneOptions {
    /// Returns options to remove only images without names.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            all: false,
            compressed: false,
            max_bytes: None,
        }
    }

    /// Sets the field `all`.
    #[must_use]
    pub const fn all(self, all: bool) -> Self {
        Self { all, ..self }
    }

    /// Sets the field `compressed`.
    #[must_use]
    pub const fn compressed(self, compressed: bool) -> Self {
        Self { compressed, ..self }
    }

    /// Sets the field `max_bytes`.
    #[must_use]
    pub const fn max_bytes(self, max_bytes: u64) -> Self {
        Self {
            max_bytes: Some(max_bytes),
            ..self
        }
    }
}

/// Result of a removal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Pruned {
    /// Names of the removed images, or IDs of those without names.
    pub images: Vec<String>,
    /// Number of bytes freed on disk.
    pub bytes: u64,
    /// Reasons why data that may not be needed was kept, as sentences.
    pub notes: Vec<String>,
}

/// Images that must stay, by digest, with their users, such as `snapshot "warm"`.
pub type Users = BTreeMap<Digest, Vec<String>>;

/// Determines the images that the caller's snapshots need; the error is a sentence. It is
/// called under the exclusive lock of the store, and must not use the store itself.
pub type FindUsers<'a> = &'a dyn Fn() -> Result<Users, String>;

impl Store {
    /// Removes an image and everything that no other image needs. `query` is a name,
    /// which alone is removed, or the prefix of an ID, of which all names are removed.
    /// Images that `users` returns stay.
    ///
    /// # Errors
    /// No image or several match, the name is the last one of an image that a snapshot
    /// needs, or files cannot be removed.
    pub fn remove(&self, query: &str, users: FindUsers<'_>) -> Result<Pruned, Error> {
        let lock = self.lock(FlockOperation::LockExclusive)?;
        let (found, by_name) = self.lookup(query)?;
        let mut exclusive = Exclusive::new(self, lock, users, None)?;
        let names = exclusive
            .names
            .get(&found.digest)
            .cloned()
            .unwrap_or_default();
        let user = exclusive
            .users
            .get(&found.digest)
            .and_then(|all| all.first());
        // Another name of the image may be removed.
        if let Some(user) = user.filter(|_| names.len() <= 1 || !by_name) {
            return Err(Error::Used {
                reference: query.to_owned(),
                user: user.clone(),
            });
        }
        match by_name {
            true => exclusive.remove_names(found.digest, Some(&found.reference))?,
            false => exclusive.remove_names(found.digest, None)?,
        }
        exclusive.collect()?;
        Ok(exclusive.pruned)
    }

    /// Removes data that is not needed; see [`PruneOptions`]. Images that `users` returns
    /// stay.
    ///
    /// # Errors
    /// Files cannot be read or removed.
    pub fn prune(&self, options: PruneOptions, users: FindUsers<'_>) -> Result<Pruned, Error> {
        let lock = self.lock(FlockOperation::LockExclusive)?;
        Exclusive::new(self, lock, users, None)?.prune(options)
    }

    /// As [`Self::prune`], but does nothing if the store is in use.
    ///
    /// # Errors
    /// As [`Self::prune`].
    pub fn try_prune(
        &self,
        options: PruneOptions,
        users: FindUsers<'_>,
    ) -> Result<Option<Pruned>, Error> {
        match self.try_lock_exclusive()? {
            Some(lock) => Exclusive::new(self, lock, users, None)?
                .prune(options)
                .map(Some),
            None => Ok(None),
        }
    }

    /// Removes damaged parts of an image, unless an image that needs one of them must
    /// stay. Returns `false` if nothing was removed for that reason. `own` is the work that
    /// found the damage.
    pub(super) fn discard_damaged(
        &self,
        image: Digest,
        damaged: &[Damaged],
        own: &Work,
        users: FindUsers<'_>,
    ) -> Result<bool, Error> {
        let lock = self.lock(FlockOperation::LockExclusive)?;
        let exclusive = Exclusive::new(self, lock, users, Some(own))?;
        if exclusive.is_claimed(image) {
            return Ok(false);
        }
        for path in damaged.iter().map(Damaged::path) {
            let is_part = |digest: Digest, record: &DiskRecord| {
                self.disk_path(digest) == path || self.parts(digest, record).contains(path)
            };
            let mut records = exclusive.records.iter();
            let claimed = records
                .any(|(digest, record)| is_part(*digest, record) && exclusive.is_claimed(*digest));
            // A disk with unknown references may need any layer.
            if claimed || exclusive.needed.contains(path) || !exclusive.unclear.is_empty() {
                return Ok(false);
            }
        }
        for damaged in damaged.iter().filter(|damaged| damaged.is_current()) {
            self.discard(damaged.path())?;
        }
        Ok(true)
    }

    /// Returns the records of all disks with a supported version.
    pub(super) fn records(&self) -> Result<BTreeMap<Digest, DiskRecord>, Error> {
        let mut records = BTreeMap::new();
        for path in entries(&self.root.join("disks"))? {
            if let Some(digest) = digest_of(&path)
                && let Some(record) = self.record(digest)?
            {
                records.insert(digest, record);
            }
        }
        Ok(records)
    }

    /// Records the use of an image, which determines the order of removal. A store that
    /// is not writable is used without this record.
    pub(super) fn touch(&self, digest: Digest) {
        let record = File::open(self.disk_path(digest).join("image.json"));
        if let Ok(record) = record {
            let _ = record.set_modified(SystemTime::now());
        }
    }

    pub(super) fn last_used(&self, digest: Digest) -> Option<SystemTime> {
        let record = self.disk_path(digest).join("image.json");
        fs::metadata(record).and_then(|meta| meta.modified()).ok()
    }
}

/// The store under its exclusive lock.
struct Exclusive<'s> {
    store: &'s Store,
    _lock: File,
    /// Prevents the opening of disks.
    _opening: File,
    names: BTreeMap<Digest, Vec<String>>,
    /// Some names cannot be read, so every disk may have a name.
    unclear_names: bool,
    /// Disks that no process has open.
    free: BTreeSet<Digest>,
    /// Disks whose references are unknown, because they have another version or are
    /// corrupt.
    unclear: BTreeSet<Digest>,
    users: Users,
    /// Paths that running operations need.
    needed: BTreeSet<PathBuf>,
    records: BTreeMap<Digest, DiskRecord>,
    /// Number of disks that refer to a layer or blob.
    leading: BTreeMap<PathBuf, usize>,
    pruned: Pruned,
}

impl<'s> Exclusive<'s> {
    fn new(
        store: &'s Store,
        lock: File,
        users: FindUsers<'_>,
        own: Option<&Work>,
    ) -> Result<Self, Error> {
        let mut pruned = Pruned::default();
        let mut names: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        let mut unclear_names = false;
        for path in entries(&store.root.join("refs"))? {
            match read_json::<ImageSummary>(&path)? {
                Some(image) => names.entry(image.digest).or_default().push(image.reference),
                None => {
                    unclear_names = true;
                    pruned.notes.push(format!(
                        "{path:?} is not a name in the format of this version: it may be that of \
                         any image, so all images are kept"
                    ));
                }
            }
        }
        // The order matters: a process with an open disk may create a snapshot that needs
        // it. Either the open disk is seen here, or the snapshot afterwards.
        let disks = store.root.join("disks");
        let opening = lock_opening(&disks, FlockOperation::LockExclusive)?;
        let mut free = BTreeSet::new();
        let mut unclear = BTreeSet::new();
        for path in entries(&disks)? {
            if let Some(digest) = digest_of(&path) {
                unclear.insert(digest);
                if lock_disk(&path).is_some() {
                    free.insert(digest);
                }
            }
        }
        let users = users().map_err(Error::Users)?;
        let records = store.records()?;
        unclear.retain(|digest| !records.contains_key(digest));
        let mut leading = BTreeMap::new();
        for (digest, record) in &records {
            for part in store.parts(*digest, record) {
                *leading.entry(part).or_default() += 1;
            }
        }
        Ok(Self {
            store,
            _lock: lock,
            _opening: opening,
            names,
            unclear_names,
            free,
            unclear,
            users,
            needed: store.needed_by_work(own)?,
            records,
            leading,
            pruned,
        })
    }

    /// Returns true if a process, a user or running work needs the disk.
    fn is_claimed(&self, digest: Digest) -> bool {
        let disk = self.store.disk_path(digest);
        self.users.contains_key(&digest)
            || self.needed.contains(&disk)
            || (!self.free.contains(&digest) && may_exist(&disk))
    }

    /// Returns true if the disk may be referred to by anything other than a known name.
    fn is_used(&self, digest: Digest) -> bool {
        self.unclear_names || self.is_claimed(digest)
    }

    fn is_referenced(&self, digest: Digest) -> bool {
        self.names.contains_key(&digest) || self.is_used(digest)
    }

    /// Removes one name of an image, or all.
    fn remove_names(&mut self, digest: Digest, only: Option<&str>) -> Result<(), Error> {
        let names = self.names.remove(&digest).unwrap_or_default();
        let (mut removed, left): (Vec<_>, Vec<_>) = names
            .into_iter()
            .partition(|name| only.is_none_or(|only| only == name));
        removed.sort();
        if !left.is_empty() {
            self.names.insert(digest, left);
        }
        for name in removed {
            self.store.remove_name(&name)?;
            self.pruned.images.push(name);
        }
        Ok(())
    }

    fn prune(mut self, options: PruneOptions) -> Result<Pruned, Error> {
        if options.all {
            let unused = self.names.keys().filter(|digest| !self.is_used(**digest));
            for digest in unused.copied().collect::<Vec<_>>() {
                self.remove_names(digest, None)?;
            }
            self.pruned.images.sort();
        }
        self.collect()?;
        if options.compressed && self.unclear.is_empty() {
            let documents: BTreeSet<_> = self
                .records
                .iter()
                .flat_map(|(digest, record)| [*digest, record.config_digest])
                .map(|digest| self.store.blob_path(digest))
                .collect();
            for path in entries(&self.store.root.join("blobs"))? {
                if !documents.contains(&path) && !self.needed.contains(&path) {
                    self.pruned.bytes += remove_file(&path)?;
                }
            }
        }
        if let Some(most) = options.max_bytes {
            self.shrink(most)?;
        }
        Ok(self.pruned)
    }

    /// Removes the least recently used data until at most `most` bytes are left, or
    /// nothing more can be removed.
    fn shrink(&mut self, most: u64) -> Result<(), Error> {
        let store = self.store;
        let mut size = store.size()?;
        let mut oldest: Vec<Digest> = self.records.keys().copied().collect();
        oldest.sort_by_cached_key(|digest| store.last_used(*digest));
        // A compressed layer is as recently used as the most recent image that contains
        // it.
        let mut streams = Vec::new();
        let mut seen = BTreeSet::new();
        for digest in oldest.iter().rev() {
            for layer in self.records.get(digest).into_iter().flat_map(|r| &r.layers) {
                if seen.insert(layer.digest) {
                    streams.push(store.blob_path(layer.digest));
                }
            }
        }
        if self.unclear.is_empty() {
            for path in streams.iter().rev() {
                if size <= most {
                    return Ok(());
                }
                if !self.needed.contains(path) && path.exists() {
                    let bytes = remove_file(path)?;
                    self.pruned.bytes += bytes;
                    size = size.saturating_sub(bytes);
                }
            }
        }
        for digest in oldest {
            if size <= most {
                break;
            }
            // An image that was loaded or imported cannot be pulled again.
            let refetchable = self.records.get(&digest);
            let refetchable = refetchable.is_some_and(|record| record.origin.is_some());
            if !refetchable || self.is_used(digest) {
                continue;
            }
            self.remove_names(digest, None)?;
            let before = self.pruned.bytes;
            self.discard_disk(digest)?;
            size = size.saturating_sub(self.pruned.bytes - before);
        }
        Ok(())
    }

    /// Removes a disk, and everything that only it refers to.
    fn discard_disk(&mut self, digest: Digest) -> Result<(), Error> {
        let path = self.store.disk_path(digest);
        // Earlier versions open a disk without a lock on the directory.
        let Some(_locked) = lock_disk(&path) else {
            return Ok(());
        };
        self.pruned.bytes += size_on_disk(&path);
        self.store.discard(&path)?;
        self.unclear.remove(&digest);
        let Some(record) = self.records.remove(&digest) else {
            return Ok(());
        };
        let mut unneeded = Vec::new();
        for part in self.store.parts(digest, &record) {
            let Some(count) = self.leading.get_mut(&part) else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                self.leading.remove(&part);
                unneeded.push(part);
            }
        }
        if self.unclear.is_empty() {
            for part in unneeded {
                self.discard_part(&part)?;
            }
        }
        Ok(())
    }

    /// Removes a layer or a blob, if nothing refers to it.
    fn discard_part(&mut self, path: &Path) -> Result<(), Error> {
        if self.leading.contains_key(path) || self.needed.contains(path) || !path.exists() {
            return Ok(());
        }
        self.pruned.bytes += match path.is_dir() {
            true => {
                let bytes = size_on_disk(path);
                self.store.discard(path)?;
                bytes
            }
            false => remove_file(path)?,
        };
        Ok(())
    }

    /// Removes disks that neither a name nor a user refers to.
    fn collect(&mut self) -> Result<(), Error> {
        for path in entries(&self.store.root.join("disks"))? {
            match digest_of(&path) {
                Some(digest) if self.is_referenced(digest) => {}
                Some(digest) => self.discard_disk(digest)?,
                None => {}
            }
        }
        if let Some(digest) = self.unclear.first() {
            let disk = self.store.disk_path(*digest);
            self.pruned.notes.push(format!(
                "the image in {disk:?} is of another version of the store or damaged: it may \
                 need any layer, so all layers are kept"
            ));
        } else {
            for part in ["layers", "blobs"] {
                for path in entries(&self.store.root.join(part))? {
                    self.discard_part(&path)?;
                }
            }
        }
        self.store.clear_locks()?;
        self.store.clear_tmp()
    }
}

/// Locks a disk that no process has open, if it can be opened at all. Returns `None` if
/// the disk is open or its state is unknown.
fn lock_disk(disk: &Path) -> Option<Option<File>> {
    match File::open(disk.join("meta.erofs")) {
        Ok(file) => {
            let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
            locked.is_ok().then_some(Some(file))
        }
        // A disk without this file cannot be open.
        Err(error) if is_absence(&error) => Some(None),
        Err(_) => None,
    }
}

/// Removes a file and returns its size on disk in bytes.
fn remove_file(path: &Path) -> Result<u64, Error> {
    let bytes = size_on_disk(path);
    fs::remove_file(path).map_err(Error::file("remove", path))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
