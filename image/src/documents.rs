//! The JSON documents of an image: index, manifest, configuration.

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::Deserialize;

use crate::Error;
use crate::digest::Digest;

/// Largest document read, in bytes.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;
/// Most layers of an image (the limit of Docker's overlay driver).
const MAX_LAYERS: usize = 127;

/// The annotation that names an image of a layout.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A blob that a document names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl Named {
    pub(crate) fn from_descriptor(descriptor: &Descriptor, document: &str) -> Result<Self, Error> {
        let text = descriptor.digest().to_string();
        let digest = Digest::parse(&text)
            .ok_or_else(|| Error::document(document, format!("\"{text}\" is no sha256 digest")))?;
        Ok(Self {
            digest,
            size: descriptor.size(),
        })
    }
}

pub(crate) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::document(what, error))
}

/// What a manifest blob turns out to be.
pub(crate) enum Document {
    /// Manifests for several platforms.
    Index(Box<ImageIndex>),
    /// One image.
    Manifest(Box<ImageManifest>),
}

/// Tells index and manifest apart by what they contain, since the media type
/// inside is optional.
pub(crate) fn parse_manifest(bytes: &[u8]) -> Result<Document, Error> {
    #[derive(Deserialize)]
    struct Shape {
        manifests: Option<serde::de::IgnoredAny>,
    }
    let shape: Shape = parse(bytes, "manifest")?;
    if shape.manifests.is_some() {
        return Ok(Document::Index(Box::new(parse(bytes, "index")?)));
    }
    Ok(Document::Manifest(Box::new(parse(bytes, "manifest")?)))
}

/// The manifest of an index for this program's guests: Linux on the host's
/// architecture. A single one without a platform is taken as it is.
pub(crate) fn choose_platform(index: &ImageIndex) -> Result<&Descriptor, Error> {
    let wanted = |descriptor: &&Descriptor| {
        descriptor.platform().as_ref().is_some_and(|platform| {
            *platform.os() == Os::Linux && *platform.architecture() == Arch::default()
        })
    };
    let manifests = index.manifests();
    if let Some(found) = manifests.iter().find(wanted) {
        return Ok(found);
    }
    match manifests.as_slice() {
        [only] if only.platform().is_none() => Ok(only),
        [] => Err(Error::document("index", "it lists no manifest")),
        _ => Err(Error::document(
            "index",
            format!("it has no manifest for linux/{}", Arch::default()),
        )),
    }
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
            let media_type = layer.media_type().to_string();
            if !is_layer(&media_type) {
                let text = format!("layer media type \"{media_type}\" is not supported");
                return Err(Error::document("manifest", text));
            }
            Ok((
                Named::from_descriptor(layer, "manifest")?,
                parse_diff_id(diff_id)?,
            ))
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
