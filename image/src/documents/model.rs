//! The documents as they are serialized (OCI image-spec descriptor.md, manifest.md,
//! image-index.md).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// Version of the schema of indexes and manifests.
const SCHEMA_VERSION: u32 = 2;

type Annotations = BTreeMap<String, String>;

/// A reference to a blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BlobDescriptor {
    pub(crate) media_type: String,
    #[serde(deserialize_with = "digest")]
    pub(crate) digest: String,
    pub(crate) size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    urls: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) annotations: Option<Annotations>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<DescribedPlatform>,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
}

impl BlobDescriptor {
    pub(crate) fn new(media_type: &str, size: u64, digest: Digest) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: digest.to_string(),
            size,
            urls: None,
            annotations: None,
            platform: None,
            artifact_type: None,
            data: None,
        }
    }

    /// Returns the annotation `key`.
    pub(crate) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }
}

/// The platform of a manifest in an index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DescribedPlatform {
    pub(crate) architecture: String,
    pub(crate) os: String,
    #[serde(rename = "os.version", skip_serializing_if = "Option::is_none")]
    os_version: Option<String>,
    #[serde(rename = "os.features", skip_serializing_if = "Option::is_none")]
    os_features: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    features: Option<Vec<String>>,
}

/// The manifest of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageManifest {
    schema_version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    pub(crate) config: BlobDescriptor,
    /// The layers, lowest first.
    pub(crate) layers: Vec<BlobDescriptor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<BlobDescriptor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<Annotations>,
}

impl ImageManifest {
    pub(crate) fn new(config: BlobDescriptor, layers: Vec<BlobDescriptor>) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            media_type: Some(OCI_MANIFEST.to_owned()),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: None,
        }
    }
}

/// An index of manifests, for several platforms or names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImageIndex {
    schema_version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    pub(crate) manifests: Vec<BlobDescriptor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<BlobDescriptor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<Annotations>,
}

impl ImageIndex {
    pub(crate) fn new(manifests: Vec<BlobDescriptor>) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            media_type: Some(OCI_INDEX.to_owned()),
            artifact_type: None,
            manifests,
            subject: None,
            annotations: None,
        }
    }
}

/// Deserializes a digest of any algorithm.
fn digest<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match is_digest(&text) {
        true => Ok(text),
        false => Err(serde::de::Error::custom("a digest is malformed")),
    }
}

/// Matches `ALGORITHM:ENCODED` (descriptor.md, "Digests").
fn is_digest(text: &str) -> bool {
    let Some((algorithm, encoded)) = text.split_once(':') else {
        return false;
    };
    let is_component = |part: &str| {
        let mut bytes = part.bytes();
        !part.is_empty() && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    let is_hex = |len| {
        let mut bytes = encoded.bytes();
        encoded.len() == len && bytes.all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    algorithm.split(['+', '.', '_', '-']).all(is_component)
        && match algorithm {
            "sha256" => is_hex(64),
            "sha384" => is_hex(96),
            "sha512" => is_hex(128),
            _ => {
                let is_encoded =
                    |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'=' | b'_' | b'-');
                !encoded.is_empty() && encoded.bytes().all(is_encoded)
            }
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_have_an_algorithm_and_a_value() {
        let hex = |len: usize| "a0".repeat(len / 2);
        for good in [
            Digest::of(b"x").to_string(),
            format!("sha384:{}", hex(96)),
            format!("sha512:{}", hex(128)),
            "other+b64:LCa0a2j=_-".to_owned(),
        ] {
            assert!(is_digest(&good), "{good}");
        }
        for bad in [
            "".to_owned(),
            "sha256".to_owned(),
            "sha256:".to_owned(),
            format!("sha256:{}", hex(62)),
            format!("sha256:{}", hex(64).to_uppercase()),
            "../blah:attack".to_owned(),
            "a+:b".to_owned(),
            ":b".to_owned(),
            "a:b/c".to_owned(),
        ] {
            assert!(!is_digest(&bad), "{bad}");
        }
    }

    #[test]
    fn descriptors_are_serialized_again() {
        let digest = Digest::of(b"x");
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{{"mediaType":"a","digest":"{digest}","size":1,"urls":["u"],"annotations":{{"k":"v"}},"platform":{{"architecture":"arm","os":"linux","os.version":"1","variant":"v7"}},"artifactType":"t","data":"ZA=="}}]}}"#
        );
        let index: ImageIndex = serde_json::from_str(&text).unwrap();
        assert_eq!(index.manifests[0].annotation("k"), Some("v"));
        assert_eq!(serde_json::to_string(&index).unwrap(), text);
    }
}
