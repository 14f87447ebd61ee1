//! Sources of images: each transport provides documents and blobs.

#[cfg(feature = "archive")]
mod archive;
#[cfg(feature = "archive")]
mod bundle;
mod choice;
#[cfg(feature = "archive")]
mod docker;
#[cfg(feature = "engine")]
mod engine;
mod layout;
#[cfg(any(feature = "engine", feature = "registry"))]
mod pem;
#[cfg(feature = "registry")]
mod registries;
#[cfg(feature = "registry")]
mod registry;
#[cfg(feature = "registry")]
mod repository;
mod rootfs;
#[cfg(feature = "archive")]
mod spool;
#[cfg(feature = "containers-storage")]
mod storage;

use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::cancel::Cancel;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::documents::{MAX_DOCUMENT, Named, Parts, Resolved, check_platform, diff_ids, parse};
use crate::error::Cause;
use crate::platform::Platform;
use crate::reference::Reference;

#[cfg(feature = "archive")]
pub(crate) use self::bundle::Bundle;
use self::choice::Choice;
#[cfg(all(feature = "registry", any(feature = "fuzzing", test)))]
pub(crate) use self::registries::fuzz_registries;
#[cfg(all(feature = "registry", any(feature = "fuzzing", test)))]
pub(crate) use self::registry::headers;
#[cfg(feature = "registry")]
pub use self::registry::{OpenBlob, Pushed, Pusher};
#[cfg(all(feature = "containers-storage", any(feature = "fuzzing", test)))]
pub(crate) use self::storage::tar_split;

/// A layer of an image to be read.
#[derive(Clone, Debug)]
pub(crate) struct SourceLayer {
    /// Digest of the stream in the manifest; the diff_id for transports without one.
    pub(crate) digest: Digest,
    /// Size of the stream, if known.
    pub(crate) size: Option<u64>,
    /// Media type of the stream, if known.
    pub(crate) media_type: Option<String>,
    /// Digest of the contained tar stream.
    pub(crate) diff_id: Digest,
    /// Location of the stream in the transport, if the digest does not determine it.
    #[cfg_attr(
        not(any(feature = "archive", feature = "containers-storage")),
        expect(
            dead_code,
            reason = "OCI layouts and registries find layers by their digests"
        )
    )]
    location: Option<String>,
}

impl SourceLayer {
    /// Creates a layer that is identified by its contents.
    pub(crate) fn plain(diff_id: Digest) -> Self {
        Self {
            digest: diff_id,
            size: None,
            media_type: None,
            diff_id,
            location: None,
        }
    }

    /// Creates a layer of another image, with its form there.
    pub(crate) fn shared(
        diff_id: Digest,
        digest: Digest,
        size: Option<u64>,
        media_type: Option<String>,
    ) -> Self {
        Self {
            digest,
            size,
            media_type,
            diff_id,
            location: None,
        }
    }
}

/// A manifest with its original bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawManifest {
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
}

/// The repository that an image was pulled from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The registry's name in references, such as `docker.io`.
    pub(crate) registry: String,
    pub(crate) repository: String,
    /// The image there whose layers this one has, if it is not itself there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<Digest>,
}

/// An image whose documents have been read and checked.
#[derive(Clone, Debug)]
pub(crate) struct SourceImage {
    /// Digest that identifies the image: that of its manifest, or of its configuration if
    /// there is no manifest.
    pub(crate) digest: Digest,
    /// Digest of the document that the reference names: an index, if there is one,
    /// otherwise the image's own.
    pub(crate) named: Digest,
    /// The manifest; `None` for transports without one.
    pub(crate) manifest: Option<RawManifest>,
    /// The original bytes of the configuration, whose digest is in the manifest.
    pub(crate) config_bytes: Vec<u8>,
    pub(crate) config: ImageConfig,
    /// The layers, lowest first.
    pub(crate) layers: Vec<SourceLayer>,
    /// The repository that the image comes from; `None` if it is not from a registry.
    pub(crate) origin: Option<Origin>,
}

/// An opened transport. Several layers can be read concurrently, from any threads.
pub(crate) trait Source: Sync {
    /// Returns the digest of a configuration, manifest or index that identifies the image
    /// at its source, or `None` if determining it costs as much as [`Self::image`]. An
    /// image that is stored under this digest need not be read.
    fn identity(&self) -> Result<Option<Digest>, Error> {
        Ok(None)
    }
    /// Finds the image for `platform`. Without a platform, an image for guests of this
    /// host is preferred; if there is no choice, the only image is returned.
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error>;
    /// Opens the stream of a layer of [`Self::image`].
    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error>;
}

/// Resources of a transport while it is open.
#[derive(Clone, Copy)]
pub(crate) struct Session<'a> {
    /// A directory for temporary files, which have no names.
    #[cfg_attr(
        not(feature = "archive"),
        expect(dead_code, reason = "only archives are stored")
    )]
    pub(crate) scratch: &'a Path,
    /// Cancels waits for registries and reads from them.
    pub(crate) cancel: &'a Cancel,
    /// Called from any thread with a sentence for users about the reason for a delay.
    #[cfg_attr(
        not(any(feature = "engine", feature = "registry")),
        expect(dead_code, reason = "files are read without delay")
    )]
    pub(crate) message: &'a (dyn Fn(&str) + Sync),
}

/// Opens the transport of `reference`; `None` for an image that is only in the store.
pub(crate) fn open<'a>(
    reference: &Reference,
    session: Session<'a>,
) -> Result<Option<Box<dyn Source + 'a>>, Error> {
    if session.cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    let unknown = |reason: Cause| Error::unknown(reference, reason);
    let label = reference.to_string();
    Ok(Some(match reference {
        Reference::Oci { directory, tag } => {
            let files = layout::Directory::open(directory).map_err(unknown)?;
            let choice = Choice::of(tag.as_deref());
            Box::new(layout::Layout::new(files, label, choice))
        }
        Reference::RootFs { directory } => match directory.is_dir() {
            true => Box::new(rootfs::Directory::new(directory)),
            false => return Err(unknown(format!("{directory:?} is not a directory").into())),
        },
        Reference::Stored(_) => return Ok(None),
        #[cfg(feature = "archive")]
        Reference::OciArchive { file, tag } => {
            let files = archive::TarArchive::open(file, reference, session)?;
            let choice = Choice::of(tag.as_deref());
            Box::new(layout::Layout::new(files, label, choice))
        }
        #[cfg(feature = "archive")]
        Reference::DockerArchive { file, tag } => {
            let files = archive::TarArchive::open(file, reference, session)?;
            let choice = Choice::of(tag.as_deref());
            Box::new(docker::DockerArchive::new(files, label, choice))
        }
        #[cfg(feature = "engine")]
        Reference::DockerDaemon { image } => Box::new(engine::Engine::open(image, session)?),
        #[cfg(feature = "containers-storage")]
        Reference::ContainersStorage { storage, image } => {
            Box::new(storage::Storage::open(storage.as_deref(), image)?)
        }
        #[cfg(feature = "registry")]
        Reference::Docker(name) => Box::new(registry::Registry::open(name, session)?),
        #[cfg(not(all(
            feature = "archive",
            feature = "containers-storage",
            feature = "engine",
            feature = "registry"
        )))]
        other => {
            return Err(Error::Disabled {
                reference: other.to_string(),
                feature: other.feature().unwrap_or_default(),
            });
        }
    }))
}

/// A collection of named files.
pub(crate) trait Files {
    /// Opens a file by its path; `None` if it does not exist.
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error>;
}

/// Reads a small file completely.
fn read_small(files: &impl Files, path: &str, what: &str) -> Result<Option<Vec<u8>>, Error> {
    let Some(file) = files.open(path)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    file.take(MAX_DOCUMENT + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::document(what, error))?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_DOCUMENT) {
        return Err(Error::too_large(what));
    }
    Ok(Some(bytes))
}

fn blob_path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Reads a document by its descriptor, and checks size and digest.
fn read_named(files: &impl Files, named: &Named, what: &str) -> Result<Vec<u8>, Error> {
    let bytes = read_small(files, &blob_path(named.digest), what)?
        .ok_or_else(|| named.damaged("it is missing"))?;
    named.check(&bytes)?;
    Ok(bytes)
}

/// Reads and checks the document of a descriptor; the text names its kind for errors.
type ReadDocument<'a> = &'a dyn Fn(&Named, &str) -> Result<Vec<u8>, Error>;

/// Reads and checks the parts of the image of a manifest.
fn describe(
    read: ReadDocument<'_>,
    resolved: Resolved,
    platform: Option<&Platform>,
) -> Result<SourceImage, Error> {
    let parts = Parts::of(&resolved.manifest)?;
    let config_bytes = read(&parts.config, "configuration")?;
    let config: ImageConfig = parse(&config_bytes, "configuration")?;
    check_platform(&config, platform)?;
    let diff_ids = diff_ids(&config, parts.layers.len())?;
    let layers = parts
        .layers
        .into_iter()
        .zip(diff_ids)
        .map(|(named, diff_id)| SourceLayer {
            digest: named.digest,
            size: Some(named.size),
            media_type: Some(named.media_type),
            diff_id,
            location: None,
        })
        .collect();
    Ok(SourceImage {
        digest: resolved.digest,
        named: resolved.named,
        manifest: Some(RawManifest {
            media_type: resolved.media_type,
            bytes: resolved.bytes,
        }),
        config_bytes,
        config,
        layers,
        origin: None,
    })
}
