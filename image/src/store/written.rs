//! The documents of exported images, written with the types of `oci-spec`: what this
//! program sends to others has the form that the crate of the specification gives it. The
//! types that read documents, and that [`crate::LayoutBuilder`] writes, need no dependency.

#[cfg(feature = "archive")]
use std::collections::HashMap;

use oci_spec::image::{Descriptor, ImageManifestBuilder, MediaType, SCHEMA_VERSION, Sha256Digest};

use crate::Error;
use crate::digest::Digest;

/// Media type of a manifest that [`manifest`] writes.
pub(super) fn manifest_type() -> String {
    MediaType::ImageManifest.to_string()
}

/// Returns the media type of a layer in a manifest of the OCI, given that in another manifest;
/// `None` if its compression is not known.
pub(super) fn layer_type(media_type: Option<&str>) -> Option<MediaType> {
    const DOCKER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    let media_type = media_type?;
    match media_type.strip_prefix(DOCKER) {
        Some(".gzip") => return Some(MediaType::ImageLayerGzip),
        Some(".zstd") => return Some(MediaType::ImageLayerZstd),
        Some("") => return Some(MediaType::ImageLayer),
        _ => {}
    }
    match MediaType::from(media_type) {
        found @ (MediaType::ImageLayer | MediaType::ImageLayerGzip | MediaType::ImageLayerZstd) => {
            Some(found)
        }
        _ => None,
    }
}

/// Returns the manifest of an image with this configuration and these layers (type, digest and
/// size in bytes), lowest first.
///
/// # Errors
/// The document cannot be serialized.
pub(super) fn manifest(
    config: (Digest, u64),
    layers: impl Iterator<Item = (MediaType, Digest, u64)>,
) -> Result<Vec<u8>, Error> {
    let layers = layers
        .map(|(media_type, digest, size)| descriptor(media_type, digest, size))
        .collect::<Result<Vec<_>, _>>()?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(descriptor(MediaType::ImageConfig, config.0, config.1)?)
        .layers(layers)
        .build()
        .map_err(|error| Error::document("manifest", error.to_string()))?;
    serde_json::to_vec(&manifest).map_err(|error| Error::document("manifest", error))
}

/// Returns the entry of a manifest in an index, with its annotations.
///
/// # Errors
/// None in practice: a [`Digest`] is one of SHA-256.
#[cfg(feature = "archive")]
pub(super) fn entry(
    media_type: &str,
    digest: Digest,
    size: u64,
    annotations: Option<HashMap<String, String>>,
) -> Result<Descriptor, Error> {
    let mut entry = descriptor(MediaType::from(media_type), digest, size)?;
    entry.set_annotations(annotations);
    Ok(entry)
}

/// Returns the index of these manifests.
///
/// # Errors
/// None in practice: no member is missing.
#[cfg(feature = "archive")]
pub(super) fn index(entries: Vec<Descriptor>) -> Result<oci_spec::image::ImageIndex, Error> {
    oci_spec::image::ImageIndexBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageIndex)
        .manifests(entries)
        .build()
        .map_err(|error| Error::document("index", error.to_string()))
}

fn descriptor(kind: MediaType, digest: Digest, size: u64) -> Result<Descriptor, Error> {
    let digest: Sha256Digest = digest
        .hex()
        .parse()
        .map_err(|error: oci_spec::OciSpecError| {
            Error::document("descriptor", error.to_string())
        })?;
    Ok(Descriptor::new(kind, size, digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::{ImageManifest, OCI_CONFIG, OCI_LAYER_GZIP, parse};

    #[test]
    fn layers_keep_their_compression() {
        let docker = "application/vnd.docker.image.rootfs.diff.tar";
        for (media_type, expected) in [
            (format!("{docker}.gzip"), Some(MediaType::ImageLayerGzip)),
            (docker.to_owned(), Some(MediaType::ImageLayer)),
            (OCI_LAYER_GZIP.to_owned(), Some(MediaType::ImageLayerGzip)),
            (
                "application/vnd.oci.image.layer.v1.tar+zstd".to_owned(),
                Some(MediaType::ImageLayerZstd),
            ),
            ("application/x-tar".to_owned(), None),
        ] {
            assert_eq!(layer_type(Some(&media_type)), expected, "{media_type}");
        }
        assert_eq!(layer_type(None), None);
    }

    /// What one library writes, the other types read.
    #[test]
    fn a_written_manifest_is_read() {
        let digest = Digest::of(b"x");
        let bytes = manifest(
            (digest, 7),
            [(MediaType::ImageLayerGzip, digest, 9)].into_iter(),
        )
        .unwrap();
        let read: ImageManifest = parse(&bytes, "manifest").unwrap();
        assert_eq!(read.media_type, Some(manifest_type()));
        assert_eq!(
            (read.config.media_type.as_str(), read.config.size),
            (OCI_CONFIG, 7)
        );
        assert_eq!(read.layers.len(), 1);
        assert_eq!(read.layers[0].media_type, OCI_LAYER_GZIP);
        assert_eq!(read.layers[0].digest, digest.to_string());
    }
}
