//! Removing images, and what nobody needs any more.
//!
//! What is in use stays, whoever asks: disks that somebody has open, and those
//! that the caller names (snapshots begin with a machine that has a disk open, and
//! will have it open again).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Serialize;

use super::Store;
use super::files::{digest_of, entries};
use super::record::DiskRecord;
use super::usage::size_on_disk;
use crate::Error;
use crate::digest::Digest;

/// What is to be removed besides what no name leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// All images that are not in use.
    pub all: bool,
    /// Layers as registries had them, which are kept for pushing and saving.
    pub compressed: bool,
    /// The longest unused, until no more than so many bytes are left: first layers
    /// as registries had them, then images that can be had again.
    pub max_bytes: Option<u64>,
}

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Names of images, and IDs of those that had none.
    pub images: Vec<String>,
    /// Bytes on disk.
    pub bytes: u64,
}

impl Store {
    /// Removes an image: its name, or all names of the ID that begins like this,
    /// and what no other image needs. `keep` are digests of images whose disks
    /// stay.
    ///
    /// # Errors
    /// None or several match, or files cannot be removed.
    pub fn remove(&self, query: &str, keep: &BTreeSet<Digest>) -> Result<Pruned, Error> {
        let _alone = self.lock(FlockOperation::LockExclusive)?;
        let found = self.find(query)?;
        let by_id = found.digest.hex();
        let digits = query.strip_prefix("sha256:").unwrap_or(query);
        let by_name = !(by_id.starts_with(digits) && found.reference != query);
        let mut pruned = Pruned::default();
        for image in self.list()? {
            let meant = match by_name {
                true => image.reference == found.reference,
                false => image.digest == found.digest,
            };
            if meant {
                self.forget_name(&image.reference)?;
                pruned.images.push(image.reference);
            }
        }
        pruned.bytes = self.collect(keep)?;
        Ok(pruned)
    }

    /// Removes what is not needed; see [`PruneOptions`]. Images in `keep` stay.
    ///
    /// # Errors
    /// Files cannot be read or removed.
    pub fn prune(&self, options: PruneOptions, keep: &BTreeSet<Digest>) -> Result<Pruned, Error> {
        let _alone = self.lock(FlockOperation::LockExclusive)?;
        self.prune_alone(options, keep)
    }

    /// Like [`Self::prune`], or nothing if others use the store now.
    ///
    /// # Errors
    /// Likewise.
    pub fn try_prune(
        &self,
        options: PruneOptions,
        keep: &BTreeSet<Digest>,
    ) -> Result<Option<Pruned>, Error> {
        match self.try_lock_alone()? {
            Some(_alone) => self.prune_alone(options, keep).map(Some),
            None => Ok(None),
        }
    }

    fn prune_alone(&self, options: PruneOptions, keep: &BTreeSet<Digest>) -> Result<Pruned, Error> {
        let mut pruned = Pruned::default();
        if options.all {
            for image in self.list()? {
                if !self.is_used(image.digest, keep) {
                    self.forget_name(&image.reference)?;
                    pruned.images.push(image.reference);
                }
            }
        }
        pruned.bytes += self.collect(keep)?;
        if options.compressed {
            let documents = self.documents()?;
            for path in self.blobs()? {
                if digest_of(&path).is_none_or(|digest| !documents.contains(&digest)) {
                    pruned.bytes += remove_file(&path)?;
                }
            }
        }
        if let Some(most) = options.max_bytes {
            self.shrink(most, keep, &mut pruned)?;
        }
        Ok(pruned)
    }

    fn is_used(&self, digest: Digest, keep: &BTreeSet<Digest>) -> bool {
        keep.contains(&digest) || in_use(&self.disk_path(digest))
    }

    /// Removes the longest unused until no more than `most` bytes are left, or
    /// nothing more can go.
    fn shrink(&self, most: u64, keep: &BTreeSet<Digest>, pruned: &mut Pruned) -> Result<(), Error> {
        let mut size = self.size()?;
        let mut oldest: Vec<_> = self.records()?.into_iter().collect();
        oldest.sort_by_key(|(digest, _)| self.last_used(*digest));
        // A layer as it came serves until the last image that has it is old.
        for (number, (_, record)) in oldest.iter().enumerate() {
            for layer in &record.layers {
                if size <= most {
                    return Ok(());
                }
                let younger = oldest.iter().skip(number + 1);
                let wanted = younger
                    .flat_map(|(_, record)| &record.layers)
                    .any(|other| other.digest == layer.digest);
                let path = self.blob_path(layer.digest);
                if !wanted && path.exists() {
                    let bytes = remove_file(&path)?;
                    pruned.bytes += bytes;
                    size = size.saturating_sub(bytes);
                }
            }
        }
        for (digest, record) in &oldest {
            if size <= most {
                break;
            }
            // What was loaded or imported cannot be had again.
            if record.origin.is_none() || self.is_used(*digest, keep) {
                continue;
            }
            for image in self.list()? {
                if image.digest == *digest {
                    self.forget_name(&image.reference)?;
                    pruned.images.push(image.reference);
                }
            }
            let bytes = self.collect(keep)?;
            pruned.bytes += bytes;
            size = size.saturating_sub(bytes);
        }
        Ok(())
    }

    /// Removes what neither a name nor a user leads to; returns how many bytes
    /// that were. The caller holds the lock exclusively.
    fn collect(&self, keep: &BTreeSet<Digest>) -> Result<u64, Error> {
        let mut bytes = 0;
        let wanted: BTreeSet<_> = self.list()?.iter().map(|image| image.digest).collect();
        for path in entries(&self.root.join("disks"))? {
            let stays = digest_of(&path)
                .is_some_and(|digest| wanted.contains(&digest) || keep.contains(&digest));
            if !stays && !in_use(&path) {
                bytes += size_on_disk(&path);
                self.discard(&path)?;
            }
        }
        let records = self.records()?;
        let layers: BTreeSet<_> = records
            .values()
            .flat_map(|record| record.layers.iter().map(|layer| layer.diff_id))
            .collect();
        for path in entries(&self.root.join("layers"))? {
            if digest_of(&path).is_none_or(|digest| !layers.contains(&digest)) {
                bytes += size_on_disk(&path);
                self.discard(&path)?;
            }
        }
        let mut blobs = documents(&records);
        let stored = records.values().flat_map(|record| &record.layers);
        blobs.extend(stored.map(|layer| layer.digest));
        for path in self.blobs()? {
            if digest_of(&path).is_none_or(|digest| !blobs.contains(&digest)) {
                bytes += remove_file(&path)?;
            }
        }
        // Nobody makes anything while the store is locked.
        for path in entries(&self.root.join("locks"))? {
            remove_file(&path)?;
        }
        self.clear_tmp()?;
        Ok(bytes)
    }

    fn blobs(&self) -> Result<Vec<PathBuf>, Error> {
        entries(&self.root.join("blobs"))
    }

    /// Digests of all manifests and configurations.
    fn documents(&self) -> Result<BTreeSet<Digest>, Error> {
        Ok(documents(&self.records()?))
    }

    /// The records of all disks.
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

    /// Notes that an image is used. That is for choosing what to remove, so a store
    /// that cannot be written is used all the same.
    pub(super) fn used_now(&self, digest: Digest) {
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

fn documents(records: &BTreeMap<Digest, DiskRecord>) -> BTreeSet<Digest> {
    let of_one = |(digest, record): (&Digest, &DiskRecord)| [*digest, record.config_digest];
    records.iter().flat_map(of_one).collect()
}

/// Somebody has the disk open by [`super::DiskSegment::open`].
pub(super) fn in_use(disk: &Path) -> bool {
    File::open(disk.join("meta.erofs")).is_ok_and(|file| {
        flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK)
    })
}

/// Removes a file; returns how many bytes it had on disk.
fn remove_file(path: &Path) -> Result<u64, Error> {
    let bytes = size_on_disk(path);
    fs::remove_file(path).map_err(Error::file("remove", path))?;
    Ok(bytes)
}
