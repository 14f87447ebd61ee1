//! The JSON documents of an image: index, manifest, configuration.

mod resolve;

use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest};
use serde::Deserialize;

use crate::Error;
use crate::digest::Digest;

pub(crate) use self::resolve::{Resolved, check_platform, resolve};

/// Largest document read, in bytes.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;
/// Most layers of an image (the limit of Docker's overlay driver).
const MAX_LAYERS: usize = 127;

/// The annotation that names an image of a layout.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A blob that a document names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) media_type: String,
}

impl Named {
    pub(crate) fn from_descriptor(descriptor: &Descriptor, document: &str) -> Result<Self, Error> {
        let text = descriptor.digest().to_string();
        let digest = Digest::parse(&text)
            .ok_or_else(|| Error::document(document, format!("\"{text}\" is no sha256 digest")))?;
        Ok(Self {
            digest,
            size: descriptor.size(),
            media_type: descriptor.media_type().to_string(),
        })
    }

    /// Whether `bytes` are what is named.
    pub(crate) fn check(&self, bytes: &[u8]) -> Result<(), Error> {
        if u64::try_from(bytes.len()).ok() != Some(self.size) {
            let text = format!("it has {} bytes instead of {}", bytes.len(), self.size);
            return Err(self.damaged(text));
        }
        let digest = Digest::of(bytes);
        match digest == self.digest {
            true => Ok(()),
            false => Err(self.damaged(format!("its contents have digest {digest}"))),
        }
    }

    pub(crate) fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Blob {
            digest: self.digest.to_string(),
            reason: reason.into(),
        }
    }
}

pub(crate) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::document(what, error))
}

/// Layers of a manifest with the diff_ids of its configuration.
pub(crate) fn layers(
    manifest: &ImageManifest,
    config: &ImageConfiguration,
) -> Result<Vec<(Named, Digest)>, Error> {
    let diff_ids = config.rootfs().diff_ids();
    let layers = manifest.layers();
    if layers.len() != diff_ids.len() {
        return Err(Error::document(
            "configuration",
            format!(
                "it has {} diff_ids for {} layers",
                diff_ids.len(),
                layers.len()
            ),
        ));
    }
    if layers.len() > MAX_LAYERS {
        return Err(Error::document(
            "manifest",
            format!("it has more than {MAX_LAYERS} layers"),
        ));
    }
    layers
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            let named = Named::from_descriptor(layer, "manifest")?;
            if !is_layer(&named.media_type) {
                let text = format!("layer media type \"{}\" is not supported", named.media_type);
                return Err(Error::document("manifest", text));
            }
            Ok((named, parse_diff_id(diff_id)?))
        })
        .collect()
}

pub(crate) fn parse_diff_id(text: &str) -> Result<Digest, Error> {
    Digest::parse(text)
        .ok_or_else(|| Error::document("configuration", format!("\"{text}\" is no sha256 digest")))
}

fn is_layer(media_type: &str) -> bool {
    let oci = media_type
        .strip_prefix("application/vnd.oci.image.layer.v1.tar")
        .or_else(|| {
            media_type.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1.tar")
        });
    match oci {
        Some(compression) => matches!(compression, "" | "+gzip" | "+zstd"),
        None => matches!(
            media_type,
            "application/vnd.docker.image.rootfs.diff.tar"
                | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                | "application/vnd.docker.image.rootfs.diff.tar.zstd"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_media_types() {
        assert!(is_layer("application/vnd.oci.image.layer.v1.tar+gzip"));
        assert!(is_layer(
            "application/vnd.docker.image.rootfs.diff.tar.gzip"
        ));
        assert!(!is_layer("application/vnd.oci.image.layer.v1.tar+exe"));
        assert!(!is_layer("text/plain"));
    }
}
