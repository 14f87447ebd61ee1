//! Why an image cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// An error of this crate. Texts name the image's part that is at fault.
#[derive(Debug, Error)]
pub enum Error {
    /// A reference that cannot be understood.
    #[error("\"{reference}\" is not an image reference: {reason}")]
    Reference {
        /// The text.
        reference: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A platform that cannot be understood.
    #[error("\"{0}\" is not a platform: OS/ARCHITECTURE[/VARIANT] is meant, such as linux/arm64")]
    Platform(String),
    /// There is no image for the platform that is wanted.
    #[error("there is no image for {wanted}; there are images for {offered}")]
    NoPlatform {
        /// The platform.
        wanted: String,
        /// Those that there are, separated by commas.
        offered: String,
    },
    /// Nothing is where the reference points to.
    #[error("unknown image \"{reference}\": {reason}")]
    Unknown {
        /// The reference.
        reference: String,
        /// What is missing.
        reason: String,
    },
    /// A registry does not give what is asked of it.
    #[error("registry {registry}: {reason}")]
    Registry {
        /// The registry.
        registry: String,
        /// What is wrong.
        reason: String,
    },
    /// A Docker engine does not give what is asked of it.
    #[error("engine {engine}: {reason}")]
    Engine {
        /// Where it listens.
        engine: String,
        /// What is wrong.
        reason: String,
    },
    /// Several images match.
    #[error("\"{0}\" matches several images: give more of its ID")]
    Ambiguous(String),
    /// A file of the host cannot be used.
    #[error("cannot {operation} {path:?}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A JSON document of the image (index, manifest, configuration) is wrong.
    #[error("the image's {document} is not valid: {reason}")]
    Document {
        /// Which one.
        document: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A blob does not have the digest or size that is written down for it.
    #[error("blob {digest} is damaged: {reason}")]
    Blob {
        /// The digest that it should have.
        digest: String,
        /// What does not fit.
        reason: String,
    },
    /// A layer cannot be read.
    #[error("layer {layer} cannot be read: {reason}")]
    Layer {
        /// Digest of the layer.
        layer: String,
        /// What is wrong.
        reason: String,
    },
    /// An entry of a layer is refused.
    #[error("layer {layer}, entry \"{entry}\": {reason}")]
    Entry {
        /// Digest of the layer.
        layer: String,
        /// Path of the entry as the layer has it.
        entry: String,
        /// Why.
        reason: String,
    },
    /// An archive of images cannot be written.
    #[error("the archive cannot be written")]
    Archive(#[source] io::Error),
    /// A snapshot needs the image.
    #[error(
        "image \"{reference}\" is used by snapshot \"{user}\": remove that first (sm snapshot \
         rm {user})"
    )]
    Used {
        /// The image.
        reference: String,
        /// The snapshot.
        user: String,
    },
    /// It cannot be said which images are needed.
    #[error("no image is removed, as it is not known which ones snapshots need: {0}")]
    Users(String),
    /// The disk is too small for what is to come.
    #[error(
        "the image's layers have {needed} bytes, and {path:?} has room for {free}: free some \
         space (\"sm image prune\" removes what is not needed)"
    )]
    Space {
        /// Bytes of the layers that are missing, as their manifest has it.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// Where.
        path: PathBuf,
    },
    /// It was given up, as asked.
    #[error("it was given up")]
    Cancelled,
    /// The image's disk cannot be written.
    #[error("the image's metadata cannot be written to the store")]
    MetadataImage(#[source] io::Error),
    /// The image is too large for its disk format.
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

    pub(crate) fn document(document: impl Into<String>, reason: impl ToString) -> Self {
        Self::Document {
            document: document.into(),
            reason: reason.to_string(),
        }
    }
}

/// Bytes from a stranger, for a message: what a terminal would act on is written
/// out.
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
