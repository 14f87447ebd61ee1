//! The JSON documents of an image: index, manifest, configuration.

mod model;
mod parts;
mod resolve;

use serde::Deserialize;

use crate::Error;
use crate::digest::Digest;
use crate::error::{Cause, ErrorKind};

pub(crate) use self::model::{
    BlobDescriptor, ImageIndex, ImageManifest, OCI_CONFIG, OCI_LAYER, OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD, OCI_MANIFEST,
};
pub(crate) use self::parts::{Parts, diff_ids};
pub(crate) use self::resolve::{Resolved, check_platform, platform_of, resolve};

/// Maximum size of a document in bytes.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;

/// The annotation with the name of an image in a layout.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation with an image's full name, written by containerd and Docker.
pub(crate) const FULL_NAME: &str = "io.containerd.image.name";

/// The descriptor of a blob in a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) media_type: String,
}

impl Named {
    pub(crate) fn from_descriptor(
        descriptor: &BlobDescriptor,
        document: &str,
    ) -> Result<Self, Error> {
        let text = &descriptor.digest;
        let digest = Digest::parse(text).ok_or_else(|| {
            // The types of documents have checked its form.
            let text = format!("\"{text}\" is not a sha256 digest");
            Error::document(document, Cause::new(ErrorKind::Unsupported, text))
        })?;
        Ok(Self {
            digest,
            size: descriptor.size,
            media_type: descriptor.media_type.clone(),
        })
    }

    /// Checks that `bytes` have the size and digest of the descriptor.
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
