//! Long-running operations on the store. A pull waits for a registry, and must not block
//! removals meanwhile.
//!
//! Each operation has its own directory below `tmp`, with a lock that is held as long as
//! the process works, and records the paths that it needs there. The holder of the
//! store's exclusive lock leaves the directory and the recorded paths alone. An operation
//! holds the store's lock only while it records paths, so that a record is either seen by
//! a removal, or written after it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use super::Store;
use super::files::{WORK_LOCK, create, entries, is_alive};
use super::names::ImageSummary;
use super::record::DiskRecord;
use crate::Error;
use crate::digest::Digest;

/// File with the needed paths, relative to the store's root, one per line.
const NEEDS: &str = "needs";

/// A running operation on the store.
pub(super) struct Work {
    /// The store, with the operation's own directory for new objects.
    pub(super) store: Store,
    /// Removed before its lock is released.
    directory: tempfile::TempDir,
    _lock: File,
}

impl Store {
    pub(super) fn begin(&self) -> Result<Work, Error> {
        let _in_use = self.lock(FlockOperation::LockShared)?;
        let directory = self.temporary()?;
        let path = directory.path().join(WORK_LOCK);
        let lock = create(&path)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| Error::file("lock", &path)(errno.into()))?;
        Ok(Work {
            store: Self {
                tmp: directory.path().to_owned(),
                ..self.clone()
            },
            directory,
            _lock: lock,
        })
    }

    /// Returns the paths that running operations need, except that in `own`. The caller
    /// holds the exclusive lock.
    pub(super) fn needed_by_work(&self, own: Option<&Work>) -> Result<BTreeSet<PathBuf>, Error> {
        let mut needed = BTreeSet::new();
        for path in entries(&self.root.join("tmp"))? {
            let is_own = own.is_some_and(|own| own.directory.path() == path);
            if is_own || !is_alive(&path)? {
                continue;
            }
            let needs = path.join(NEEDS);
            match fs::read_to_string(&needs) {
                Ok(text) => needed.extend(text.lines().map(|line| self.root.join(line))),
                // The operation has recorded nothing yet, or has just ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::file("read", &needs)(error)),
            }
        }
        Ok(needed)
    }

    /// Returns the paths of all parts of an image, except its names.
    pub(super) fn parts(&self, digest: Digest, record: &DiskRecord) -> BTreeSet<PathBuf> {
        let layers = record.layers.iter();
        let layers = layers.map(|layer| (layer.diff_id, layer.digest));
        self.parts_of(digest, record.config_digest, layers)
    }

    pub(super) fn parts_of(
        &self,
        digest: Digest,
        config: Digest,
        layers: impl Iterator<Item = (Digest, Digest)>,
    ) -> BTreeSet<PathBuf> {
        let of_layer = |(diff_id, digest)| [self.layer_path(diff_id), self.blob_path(digest)];
        let documents = [self.blob_path(digest), self.blob_path(config)];
        documents
            .into_iter()
            .chain(layers.flat_map(of_layer))
            .collect()
    }
}

impl Work {
    /// Records that these paths are needed, whether they exist or not.
    pub(super) fn need(&self, paths: impl IntoIterator<Item = PathBuf>) -> Result<(), Error> {
        let mut text = String::new();
        for path in paths {
            let path = path.strip_prefix(&self.store.root).unwrap_or(&path);
            text.push_str(&path.to_string_lossy());
            text.push('\n');
        }
        let path = self.directory.path().join(NEEDS);
        let _in_use = self.store.lock(FlockOperation::LockShared)?;
        let opened = OpenOptions::new().create(true).append(true).open(&path);
        opened
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(Error::file("write", &path))
    }

    /// Finds an image by `query` and records that all of it is needed.
    pub(super) fn needed_image(&self, query: &str) -> Result<(ImageSummary, DiskRecord), Error> {
        let store = &self.store;
        // The lock prevents removals between lookup and recording.
        let _in_use = store.lock(FlockOperation::LockShared)?;
        let found = store.find(query)?;
        let record = store.record_of(query, found.digest)?;
        let disk = store.disk_path(found.digest);
        self.need(store.parts(found.digest, &record).into_iter().chain([disk]))?;
        Ok((found, record))
    }
}
