//! What `docker save` writes: `manifest.json`, configurations and layers, in a
//! tar file.

use std::io::Read;

use serde::Deserialize;

use super::archive::Archive;
use super::{Files as _, Source, SourceImage, SourceLayer, read_small};
use crate::Error;
use crate::digest::Digest;
use crate::documents::{check_platform, diff_ids, parse};
use crate::platform::Platform;
use crate::reference::Reference;

#[derive(Clone, Debug, Deserialize)]
struct Item {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    layers: Vec<String>,
}

/// A Docker archive.
pub(crate) struct DockerArchive {
    archive: Archive,
    reference: Reference,
    tag: Option<String>,
}

impl DockerArchive {
    pub(crate) fn new(archive: Archive, reference: Reference, tag: Option<String>) -> Self {
        Self {
            archive,
            reference,
            tag,
        }
    }

    fn unknown(&self, reason: String) -> Error {
        Error::Unknown {
            reference: self.reference.to_string(),
            reason,
        }
    }

    fn item(&self) -> Result<Item, Error> {
        let bytes = read_small(&self.archive, "manifest.json", "manifest")?.ok_or_else(|| {
            self.unknown("it is not a Docker archive (no manifest.json)".to_owned())
        })?;
        let mut items: Vec<Item> = parse(&bytes, "manifest")?;
        match (&self.tag, items.len()) {
            (None, 1) => Ok(items.swap_remove(0)),
            (None, 0) => Err(self.unknown("the archive is empty".to_owned())),
            (None, _) => Err(self.unknown("the archive has several images, add :TAG".to_owned())),
            (Some(tag), _) => items
                .into_iter()
                .find(|item| {
                    let mut tags = item.tags.iter().flatten();
                    tags.any(|known| known == tag || known.ends_with(&format!(":{tag}")))
                })
                .ok_or_else(|| self.unknown(format!("the archive has no image \"{tag}\""))),
        }
    }
}

impl Source for DockerArchive {
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let item = self.item()?;
        let bytes = read_small(&self.archive, &item.config, "configuration")?
            .ok_or_else(|| Error::document("configuration", "it is missing from the archive"))?;
        let config: oci_spec::image::ImageConfiguration = parse(&bytes, "configuration")?;
        check_platform(&config, platform)?;
        let layers = diff_ids(&config, item.layers.len())?
            .into_iter()
            .zip(item.layers)
            .map(|(diff_id, path)| SourceLayer {
                digest: diff_id,
                size: None,
                media_type: None,
                diff_id,
                place: Some(path),
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
        let path = layer.place.as_ref().ok_or_else(missing)?;
        self.archive.open(path)?.ok_or_else(missing)
    }
}
