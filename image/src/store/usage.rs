//! Disk usage of the store.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::Serialize;

use super::Store;
use super::files::in_use;
use crate::Error;
use crate::digest::Digest;

/// Disk usage of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ImageUsage {
    /// Digest of the image.
    #[serde(rename = "id")]
    pub digest: Digest,
    /// Its names; empty for an image that is only in use.
    pub names: Vec<String>,
    /// Size of its layers and metadata on disk in bytes.
    pub size: u64,
    /// The part of `size` that other images share.
    pub shared: u64,
    /// Size of its original layers on disk in bytes.
    pub compressed: u64,
    /// A process has its disk open.
    pub in_use: bool,
    /// Time of its last use, in nanoseconds since the Unix epoch.
    pub used_ns: Option<u64>,
}

/// Disk usage of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Usage {
    /// Usage of each image.
    pub images: Vec<ImageUsage>,
    /// Total size on disk in bytes. Shared data counts once.
    pub total: u64,
    /// Size of original layers in bytes, which are only kept for pushing and saving.
    pub compressed: u64,
}

impl Store {
    /// Returns the disk usage of the store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn usage(&self) -> Result<Usage, Error> {
        let records = self.records()?;
        let mut names: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for image in self.list()? {
            names.entry(image.digest).or_default().push(image.reference);
        }
        let mut users: BTreeMap<Digest, usize> = BTreeMap::new();
        for record in records.values() {
            let layers: BTreeSet<_> = record.layers.iter().map(|layer| layer.diff_id).collect();
            for layer in layers {
                *users.entry(layer).or_default() += 1;
            }
        }
        let mut images = Vec::new();
        let mut all_streams = BTreeSet::new();
        for (digest, record) in &records {
            let disk = self.disk_path(*digest);
            let layers: BTreeSet<_> = record.layers.iter().map(|layer| layer.diff_id).collect();
            let streams: BTreeSet<_> = record.layers.iter().map(|layer| layer.digest).collect();
            let mut usage = ImageUsage {
                digest: *digest,
                names: names.remove(digest).unwrap_or_default(),
                size: size_on_disk(&disk),
                shared: 0,
                compressed: 0,
                in_use: in_use(&disk),
                used_ns: self
                    .last_used(*digest)
                    .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
                    .and_then(|time| u64::try_from(time.as_nanos()).ok()),
            };
            for layer in layers {
                let size = size_on_disk(&self.layer_path(layer));
                usage.size += size;
                if users.get(&layer).is_some_and(|users| *users > 1) {
                    usage.shared += size;
                }
            }
            for stream in streams {
                usage.compressed += size_on_disk(&self.blob_path(stream));
                all_streams.insert(stream);
            }
            images.push(usage);
        }
        Ok(Usage {
            images,
            total: self.size()?,
            compressed: all_streams
                .iter()
                .map(|digest| size_on_disk(&self.blob_path(*digest)))
                .sum(),
        })
    }

    /// Returns the size on disk of all published objects in bytes.
    pub(super) fn size(&self) -> Result<u64, Error> {
        let parts = ["layers", "disks", "blobs", "refs"];
        Ok(parts
            .iter()
            .map(|part| size_on_disk(&self.root.join(part)))
            .sum())
    }

    /// Returns the size of a layer's file contents in bytes.
    pub(super) fn layer_size(&self, diff_id: Digest) -> u64 {
        let path = self.layer_path(diff_id);
        let len = |name: &str| fs::metadata(path.join(name)).map_or(0, |meta| meta.len());
        len("blob") + len("small")
    }
}

/// Returns the size on disk of a file, or of a directory with its contents, in bytes.
/// Holes and missing files count as 0.
pub(super) fn size_on_disk(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return 0;
    };
    let own = meta.blocks().saturating_mul(512);
    if !meta.is_dir() {
        return own;
    }
    let inside = fs::read_dir(path).into_iter().flatten().flatten();
    inside.fold(own, |sum, entry| sum + size_on_disk(&entry.path()))
}
