//! Errors of image operations.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

mod cause;

pub use cause::{Cause, ErrorKind};

/// An error of this crate; [`Error::kind`] classifies it. Messages name the affected part
/// of the image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The image reference cannot be parsed.
    #[error("\"{reference}\" is not an image reference: {reason}")]
    Reference {
        /// The reference.
        reference: String,
        /// The reason.
        reason: &'static str,
    },
    /// The platform cannot be parsed.
    #[error("\"{0}\" is not a platform: expected OS/ARCHITECTURE[/VARIANT], such as linux/arm64")]
    Platform(String),
    /// No image exists for the requested platform.
    #[error("there is no image for {wanted}; there are images for {offered}")]
    NoPlatform {
        /// The requested platform.
        wanted: String,
        /// Available platforms, separated by commas.
        offered: String,
    },
    /// The reference names no image.
    #[error("unknown image \"{reference}\": {reason}")]
    Unknown {
        /// The reference.
        reference: String,
        /// The reason.
        reason: Cause,
    },
    /// The source of the image needs a feature of this crate that was disabled.
    #[error(
        "\"{reference}\" cannot be read: this program was built without the feature \"{feature}\" of sm-image"
    )]
    Disabled {
        /// The reference.
        reference: String,
        /// The feature.
        feature: &'static str,
    },
    /// A request to a registry failed.
    #[error("registry {registry}: {reason}")]
    Registry {
        /// The registry.
        registry: String,
        /// The reason.
        reason: Cause,
    },
    /// A request to a Docker engine failed.
    #[error("engine {engine}: {reason}")]
    Engine {
        /// Address of the engine.
        engine: String,
        /// The reason.
        reason: Cause,
    },
    /// Several images match the ID prefix.
    #[error("\"{0}\" matches several images: give more of its ID")]
    Ambiguous(String),
    /// An operation on a file of the host failed.
    #[error("cannot {operation} {path:?}")]
    File {
        /// The operation, after "cannot".
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A JSON document of the image (index, manifest, configuration) is invalid.
    #[error("the image's {document} is not valid: {reason}")]
    Document {
        /// The document.
        document: String,
        /// The reason.
        reason: Cause,
    },
    /// The digest or size of a blob does not match its descriptor.
    #[error("blob {digest} is damaged: {reason}")]
    Blob {
        /// The expected digest.
        digest: String,
        /// The mismatch.
        reason: String,
    },
    /// A layer cannot be read.
    #[error("layer {layer} cannot be read: {reason}")]
    Layer {
        /// Digest of the layer.
        layer: String,
        /// The reason.
        reason: Cause,
    },
    /// An entry of a layer is refused.
    #[error("layer {layer}, entry \"{entry}\": {reason}")]
    Entry {
        /// Digest of the layer.
        layer: String,
        /// Path of the entry in the layer.
        entry: String,
        /// The reason.
        reason: Cause,
    },
    /// Writing an archive of images failed.
    #[error("the archive cannot be written")]
    Archive(#[source] io::Error),
    /// A snapshot needs the image.
    #[error("image \"{reference}\" is used by {user}, which must be removed first")]
    Used {
        /// The image.
        reference: String,
        /// The user: such as `snapshot "warm"`.
        user: String,
    },
    /// The images that snapshots and VMs need cannot be determined.
    #[error("cannot determine which images are needed: {0}")]
    Users(String),
    /// The file system has not enough space for the image.
    #[error(
        "the image's layers have {needed} bytes, and {path:?} has room for \
         {free}"
    )]
    Space {
        /// Size of the missing layers in bytes, according to the manifest.
        needed: u64,
        /// Free space in bytes.
        free: u64,
        /// A directory in the file system.
        path: PathBuf,
    },
    /// The operation was cancelled by its caller.
    #[error("the operation was cancelled")]
    Cancelled,
    /// Writing the image's disk failed.
    #[error("the image's metadata cannot be written to the store")]
    MetadataImage(#[source] io::Error),
    /// The image exceeds a limit of its disk format.
    #[error("the image does not fit an EROFS disk: {0}")]
    TooLarge(&'static str),
}

impl Error {
    pub(crate) fn file(
        operation: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File {
            operation,
            path,
            source,
        }
    }

    pub(crate) fn document(document: impl Into<String>, reason: impl Into<Cause>) -> Self {
        Self::Document {
            document: document.into(),
            reason: reason.into(),
        }
    }

    /// Returns the error for a document beyond the size limit of documents.
    pub(crate) fn too_large(document: &str) -> Self {
        let reason = Cause::new(ErrorKind::LimitExceeded, "it is larger than 8 MiB");
        Self::document(document, reason)
    }

    pub(crate) fn unknown(reference: impl ToString, reason: impl Into<Cause>) -> Self {
        Self::Unknown {
            reference: reference.to_string(),
            reason: reason.into(),
        }
    }

    /// Returns the kind of the error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        let of = |reason: &Cause, usual| reason.kind().unwrap_or(usual);
        match self {
            Self::Reference { .. } | Self::Platform(_) => ErrorKind::InvalidName,
            Self::NoPlatform { .. } => ErrorKind::NotFound,
            Self::Unknown { reason, .. } => of(reason, ErrorKind::NotFound),
            Self::Disabled { .. } => ErrorKind::Unsupported,
            Self::Registry { reason, .. } | Self::Engine { reason, .. } => {
                of(reason, ErrorKind::Service)
            }
            Self::Ambiguous(_) => ErrorKind::Ambiguous,
            Self::File { source, .. } | Self::Archive(source) | Self::MetadataImage(source) => {
                cause::kind_of(source).unwrap_or(ErrorKind::Io)
            }
            Self::Document { reason, .. }
            | Self::Layer { reason, .. }
            | Self::Entry { reason, .. } => of(reason, ErrorKind::Damaged),
            Self::Blob { .. } => ErrorKind::Damaged,
            Self::Used { .. } => ErrorKind::InUse,
            Self::Users(_) => ErrorKind::Other,
            Self::Space { .. } => ErrorKind::NoSpace,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::TooLarge(_) => ErrorKind::LimitExceeded,
        }
    }
}

/// Converts untrusted bytes for a message. Control characters, which a terminal might
/// interpret, are escaped.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => printable.extend(character.escape_default()),
            false => printable.push(character),
        }
    }
    printable
}
