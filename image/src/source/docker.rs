//! Archives of `docker save`: `manifest.json`, configurations and layers in a tar file.

use std::io::Read;

use serde::Deserialize;

use super::choice::Choice;
use super::{Files, Source, SourceImage, SourceLayer, read_small};
use crate::Error;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::documents::{check_platform, diff_ids, parse};
use crate::error::Cause;
use crate::platform::Platform;

/// Maximum number of images in an archive.
const MAX_IMAGES: usize = 1000;

#[derive(Clone, Debug, Deserialize)]
struct DockerManifestItem {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Option<Vec<String>>,
}

/// A Docker archive.
pub(super) struct DockerArchive<F> {
    files: F,
    /// Path of the archive, for messages.
    label: String,
    choice: Choice,
}

impl<F: Files> DockerArchive<F> {
    pub(super) fn new(files: F, label: String, choice: Choice) -> Self {
        Self {
            files,
            label,
            choice,
        }
    }

    fn unknown(&self, reason: impl Into<Cause>) -> Error {
        Error::unknown(&self.label, reason)
    }

    fn items(&self) -> Result<Vec<DockerManifestItem>, Error> {
        let Some(bytes) = read_small(&self.files, "manifest.json", "manifest")? else {
            let is_old = self.files.open("repositories")?.is_some();
            return Err(self.unknown(match is_old {
                true => {
                    "it is an archive as Docker wrote it before 1.10, without digests \
                     (no manifest.json); load it into any Docker since, and save it again"
                }
                false => "it is not a Docker archive (no manifest.json)",
            }));
        };
        let items: Vec<DockerManifestItem> = parse(&bytes, "manifest")?;
        if items.len() > MAX_IMAGES {
            let text = format!("it has more than {MAX_IMAGES} images");
            return Err(Error::document("manifest", text));
        }
        Ok(items)
    }

    /// Returns the names of each image.
    pub(super) fn names(&self) -> Result<Vec<Vec<String>>, Error> {
        let items = self.items()?.into_iter();
        Ok(items.map(|item| item.tags.unwrap_or_default()).collect())
    }

    fn item(&self) -> Result<DockerManifestItem, Error> {
        let mut items = self.items()?;
        let names: Vec<_> = items
            .iter()
            .map(|item| item.tags.clone().unwrap_or_default())
            .collect();
        let chosen = self.choice.among(&names);
        let chosen = chosen.map_err(|reason| self.unknown(reason))?;
        Ok(items.swap_remove(chosen))
    }
}

impl<F: Files + Sync> Source for DockerArchive<F> {
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let item = self.item()?;
        let bytes = read_small(&self.files, &item.config, "configuration")?
            .ok_or_else(|| Error::document("configuration", "it is missing from the archive"))?;
        let config: ImageConfig = parse(&bytes, "configuration")?;
        check_platform(&config, platform)?;
        let paths = item.layers.unwrap_or_default();
        let layers = diff_ids(&config, paths.len())?
            .into_iter()
            .zip(paths)
            .map(|(diff_id, path)| SourceLayer {
                digest: diff_id,
                // The archive does not describe the stream, which some writers compress.
                size: None,
                media_type: None,
                diff_id,
                location: Some(path),
            })
            .collect();
        let digest = Digest::of(&bytes);
        Ok(SourceImage {
            digest,
            named: digest,
            manifest: None,
            config_bytes: bytes,
            config,
            layers,
            origin: None,
        })
    }

    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        let missing = || Error::Blob {
            digest: layer.digest.to_string(),
            reason: "it is missing".to_owned(),
        };
        let path = layer.location.as_ref().ok_or_else(missing)?;
        self.files.open(path)?.ok_or_else(missing)
    }
}
