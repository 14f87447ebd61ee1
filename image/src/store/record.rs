//! Records about an image, stored beside its disk.

use std::fs;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::files::{is_absence, read_json};
use super::{FORMAT, Store, StoredImage, StoredSegment};
use crate::Error;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::source::{Origin, SourceImage, SourceLayer};

/// Contents of a disk's `image.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct DiskRecord {
    pub(super) format: u32,
    pub(super) config: ImageConfig,
    /// Digest of the original configuration.
    pub(super) config_digest: Digest,
    /// Media type of the manifest. If present, the image's digest is that of the
    /// manifest.
    pub(super) manifest_type: Option<String>,
    pub(super) meta_len: u64,
    pub(super) layers: Vec<LayerRecord>,
    /// The repository that the image was pulled from.
    pub(super) origin: Option<Origin>,
    /// The reference with which the image was requested.
    pub(super) reference: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub(super) diff_id: Digest,
    pub(super) blob_len: u64,
    /// Digest of the layer in the manifest.
    pub(super) digest: Digest,
    pub(super) size: Option<u64>,
    pub(super) media_type: Option<String>,
}

impl DiskRecord {
    pub(super) fn new(image: &SourceImage, reference: String) -> Self {
        Self {
            format: FORMAT,
            config: image.config.clone(),
            config_digest: Digest::of(&image.config_bytes),
            manifest_type: image.manifest.as_ref().map(|raw| raw.media_type.clone()),
            meta_len: 0,
            layers: Vec::with_capacity(image.layers.len()),
            origin: image.origin.clone(),
            reference,
        }
    }

    pub(super) fn push(&mut self, layer: &SourceLayer, blob_len: u64) {
        self.layers.push(LayerRecord {
            diff_id: layer.diff_id,
            blob_len,
            digest: layer.digest,
            size: layer.size,
            media_type: layer.media_type.clone(),
        });
    }
}

/// A layer of an image in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LayerDetails {
    /// Digest of the tar stream.
    pub diff_id: Digest,
    /// Digest of the stream in the manifest.
    pub digest: Digest,
    /// Size of that stream in bytes, if the manifest contains it.
    pub compressed_size: Option<u64>,
    /// Size of its file contents in the store in bytes.
    pub size: u64,
    /// The original stream is also in the store.
    #[serde(rename = "kept")]
    pub stored: bool,
}

/// Details of an image in the store.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ImageDetails {
    /// Digest of its manifest, or of its configuration if there is no manifest.
    #[serde(rename = "id")]
    pub digest: Digest,
    /// Its names.
    pub names: Vec<String>,
    /// The source that it was imported from.
    pub source: String,
    /// Media type of its manifest.
    pub manifest_type: Option<String>,
    /// Digest of its configuration.
    pub config_digest: Digest,
    /// Its configuration.
    pub config: ImageConfig,
    /// Length of its metadata image in bytes.
    pub metadata_size: u64,
    /// Its layers, lowest first.
    pub layers: Vec<LayerDetails>,
}

impl Store {
    /// Returns the record of an image, if its format is that of this version.
    pub(super) fn record(&self, digest: Digest) -> Result<Option<DiskRecord>, Error> {
        let path = self.disk_path(digest).join("image.json");
        let record = read_json::<DiskRecord>(&path)?;
        Ok(record.filter(|record| record.format == FORMAT))
    }

    /// Returns the image with this digest, if its disk is complete.
    pub(super) fn stored(&self, digest: Digest) -> Result<Option<StoredImage>, Error> {
        let Some(record) = self.record(digest)? else {
            return Ok(None);
        };
        let mut segments = vec![StoredSegment {
            path: self.disk_path(digest).join("meta.erofs"),
            offset: 0,
            len: record.meta_len,
        }];
        segments.extend(record.layers.iter().map(|layer| StoredSegment {
            path: self.layer_path(layer.diff_id).join("blob"),
            offset: 0,
            len: layer.blob_len,
        }));
        for segment in &segments {
            match fs::metadata(&segment.path) {
                Ok(meta) if meta.len() == segment.len => {}
                Ok(_) => return Ok(None),
                Err(error) if is_absence(&error) => return Ok(None),
                Err(error) => return Err(Error::file("look at", &segment.path)(error)),
            }
        }
        segments.retain(|segment| segment.len > 0);
        let Some(in_use) = segments.first().map(StoredSegment::open).transpose()? else {
            return Ok(None);
        };
        Ok(Some(StoredImage {
            digest,
            config: record.config,
            segments,
            _in_use: Arc::new(in_use),
        }))
    }

    /// Returns the details of an image, by a reference or an ID prefix.
    ///
    /// # Errors
    /// No image or several match, or the store cannot be read.
    pub fn inspect(&self, query: &str) -> Result<ImageDetails, Error> {
        let found = self.find(query)?;
        let record = self.record_of(query, found.digest)?;
        let names = self.list()?.into_iter();
        let layers = record.layers.iter().map(|layer| LayerDetails {
            diff_id: layer.diff_id,
            digest: layer.digest,
            compressed_size: layer.size,
            size: self.layer_size(layer.diff_id),
            stored: self.blob_path(layer.digest).exists(),
        });
        Ok(ImageDetails {
            digest: found.digest,
            names: names
                .filter(|image| image.digest == found.digest)
                .map(|image| image.reference)
                .collect(),
            source: record.reference.clone(),
            manifest_type: record.manifest_type.clone(),
            config_digest: record.config_digest,
            metadata_size: record.meta_len,
            layers: layers.collect(),
            config: record.config,
        })
    }

    /// Returns the record of an image that was found as `query`.
    pub(super) fn record_of(&self, query: &str, digest: Digest) -> Result<DiskRecord, Error> {
        self.record(digest)?.ok_or_else(|| {
            let text = "its disk is missing from the store; pull the image again";
            Error::unknown(query, text)
        })
    }
}
