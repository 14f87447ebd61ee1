//! The parts of an image: the configuration and the layers in its manifest.

use super::Named;
use super::model::{BlobDescriptor, ImageManifest, OCI_CONFIG, OCI_LAYER};
use crate::Error;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{Cause, ErrorKind};

/// Maximum number of layers of an image, which is the limit of Docker's and containerd's
/// overlay drivers, so that no usable image has more. Each layer is a file and a segment
/// of the disk, which a VM keeps open while it runs.
const MAX_LAYERS: usize = 127;

const OCI_FOREIGN: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// The blobs of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) config: Named,
    /// The layers, lowest first.
    pub(crate) layers: Vec<Named>,
}

impl Parts {
    /// Checks a manifest, before any of its blobs is read.
    pub(crate) fn of(manifest: &ImageManifest) -> Result<Self, Error> {
        let config = Named::from_descriptor(&manifest.config, "manifest")?;
        if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            let text = format!(
                "it is not a container image: its configuration has type \"{}\"",
                config.media_type
            );
            let reason = Cause::new(ErrorKind::Unsupported, text);
            return Err(Error::document("manifest", reason));
        }
        if manifest.layers.len() > MAX_LAYERS {
            return Err(too_many());
        }
        let layers = manifest.layers.iter().map(layer);
        Ok(Self {
            config,
            layers: layers.collect::<Result<_, _>>()?,
        })
    }
}

fn too_many() -> Error {
    let text = format!("it has more than {MAX_LAYERS} layers");
    Error::document("manifest", Cause::new(ErrorKind::LimitExceeded, text))
}

/// Checks that a layer can be read. Its `urls` are ignored, because the author of an
/// image must not choose the destination of requests from this host (CVE-2020-15157).
fn layer(descriptor: &BlobDescriptor) -> Result<Named, Error> {
    let named = Named::from_descriptor(descriptor, "manifest")?;
    let reason = match kind(&named.media_type) {
        PartKind::Layer => return Ok(named),
        PartKind::Foreign => {
            "it is a foreign layer, which registries do not store; layers are not fetched from \
             other addresses in an image"
        }
        PartKind::Encrypted => "it is encrypted",
        PartKind::Unknown => "the type is not supported",
    };
    let text = format!("its media type is \"{}\": {reason}", named.media_type);
    Err(Error::Layer {
        layer: named.digest.to_string(),
        reason: Cause::new(ErrorKind::Unsupported, text),
    })
}

#[derive(Debug, PartialEq, Eq)]
enum PartKind {
    Layer,
    Foreign,
    Encrypted,
    Unknown,
}

fn kind(media_type: &str) -> PartKind {
    let rest = |prefix| media_type.strip_prefix(prefix);
    let (compression, known) = if let Some(rest) = rest(OCI_LAYER) {
        (rest, PartKind::Layer)
    } else if let Some(rest) = rest(DOCKER_LAYER) {
        (rest, PartKind::Layer)
    } else if let Some(rest) = rest(OCI_FOREIGN).or_else(|| rest(DOCKER_FOREIGN)) {
        (rest, PartKind::Foreign)
    } else {
        return PartKind::Unknown;
    };
    // The compression is detected from the stream.
    match compression {
        "" | "+gzip" | "+zstd" | ".gzip" | ".zstd" => known,
        other if other.ends_with("+encrypted") => PartKind::Encrypted,
        _ => PartKind::Unknown,
    }
}

/// Returns the diff_ids of a configuration, which must have one for each layer.
pub(crate) fn diff_ids(config: &ImageConfig, layers: usize) -> Result<Vec<Digest>, Error> {
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != layers {
        let text = format!("it has {} diff_ids for {layers} layers", diff_ids.len());
        return Err(Error::document("configuration", text));
    }
    if layers > MAX_LAYERS {
        return Err(too_many());
    }
    let parse = |text: &String| {
        Digest::parse(text).ok_or_else(|| {
            Error::document(
                "configuration",
                format!("\"{text}\" is not a sha256 digest"),
            )
        })
    };
    diff_ids.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::Platform;

    fn manifest(config: &str, layers: &str) -> ImageManifest {
        let digest = Digest::of(b"config");
        let text = format!(
            r#"{{"schemaVersion": 2, "layers": [{layers}],
            "config": {{"mediaType": "{config}", "digest": "{digest}", "size": 1}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn layer_of(media_type: &str) -> String {
        let digest = Digest::of(b"layer");
        format!(
            r#"{{"mediaType": "{media_type}", "digest": "{digest}", "size": 5,
            "urls": ["https://example.com/x"]}}"#
        )
    }

    #[track_caller]
    fn refused(manifest: &ImageManifest, words: &[&str]) {
        let error = Parts::of(manifest).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }

    #[test]
    fn layers_are_distinguished_from_other_blobs() {
        for ok in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
        ] {
            assert_eq!(kind(ok), PartKind::Layer, "{ok}");
            let parts = Parts::of(&manifest(DOCKER_CONFIG, &layer_of(ok))).unwrap();
            assert_eq!(parts.layers[0].media_type, ok);
        }
        for bad in [
            "application/vnd.oci.image.layer.v1.tar+exe",
            "application/vnd.docker.image.rootfs.diff.tarball",
            "text/plain",
            "",
        ] {
            assert_eq!(kind(bad), PartKind::Unknown, "{bad}");
        }
        let digest = Digest::of(b"layer").to_string();
        let plain = manifest(OCI_CONFIG, &layer_of("text/plain"));
        refused(&plain, &[&digest, "text/plain"]);
        let encrypted = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";
        refused(&manifest(OCI_CONFIG, &layer_of(encrypted)), &["encrypted"]);
    }

    #[test]
    fn foreign_layers_are_refused() {
        let digest = Digest::of(b"layer").to_string();
        for foreign in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        ] {
            let manifest = manifest(OCI_CONFIG, &layer_of(foreign));
            refused(&manifest, &[&digest, "foreign layer", foreign]);
        }
    }

    #[test]
    fn artifacts_and_images_with_too_many_layers_are_refused() {
        let helm = manifest("application/vnd.cncf.helm.config.v1+json", "");
        refused(&helm, &["not a container image", "helm"]);
        let layers = vec![layer_of(OCI_LAYER); MAX_LAYERS + 1].join(", ");
        refused(&manifest(OCI_CONFIG, &layers), &["more than 127 layers"]);
    }

    #[test]
    fn diff_ids_are_counted() {
        let mut config = ImageConfig::new(Platform::host().parts(), &[]);
        assert!(
            diff_ids(&config, 1)
                .unwrap_err()
                .to_string()
                .contains("0 diff_ids")
        );
        config.rootfs.diff_ids = vec!["sha256:no".to_owned()];
        assert!(
            diff_ids(&config, 1)
                .unwrap_err()
                .to_string()
                .contains("sha256:no")
        );
        let digest = Digest::of(b"x");
        config.rootfs.diff_ids = vec![digest.to_string()];
        assert_eq!(diff_ids(&config, 1).unwrap(), [digest]);
    }
}
