//! How much the store takes, and for what.

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

/// What one image takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageUsage {
    /// Digest of the image.
    #[serde(rename = "id")]
    pub digest: Digest,
    /// Its names; none for one that is only in use.
    pub names: Vec<String>,
    /// Bytes on disk of its layers and metadata.
    pub size: u64,
    /// Bytes of these that other images have, too.
    pub shared: u64,
    /// Bytes on disk of its layers as they came.
    pub compressed: u64,
    /// Somebody has it open.
    pub in_use: bool,
    /// When it was used last, in nanoseconds since the Unix epoch.
    pub used_ns: Option<u64>,
}

/// What the store takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Each image.
    pub images: Vec<ImageUsage>,
    /// Bytes on disk of everything; what images share counts once.
    pub total: u64,
    /// Bytes of layers as they came, which are kept for pushing and saving only.
    pub compressed: u64,
}

impl Store {
    /// How much the store takes on disk.
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
        let mut kept = BTreeSet::new();
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
                kept.insert(stream);
            }
            images.push(usage);
        }
        Ok(Usage {
            images,
            total: self.size()?,
            compressed: kept
                .iter()
                .map(|digest| size_on_disk(&self.blob_path(*digest)))
                .sum(),
        })
    }

    /// Bytes on disk of everything that has its final name.
    pub(super) fn size(&self) -> Result<u64, Error> {
        let parts = ["layers", "disks", "blobs", "refs"];
        Ok(parts
            .iter()
            .map(|part| size_on_disk(&self.root.join(part)))
            .sum())
    }

    /// Bytes of file contents of a layer.
    pub(super) fn layer_size(&self, diff_id: Digest) -> u64 {
        let path = self.layer_path(diff_id);
        let len = |name: &str| fs::metadata(path.join(name)).map_or(0, |meta| meta.len());
        len("blob") + len("small")
    }
}

/// Bytes that a file, or a directory with all in it, takes; holes take none. What
/// is not there takes none.
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
