//! Where images come from: each transport gives documents and blobs.

mod archive;
mod bundle;
mod choice;
mod docker;
mod engine;
mod layout;
mod pem;
mod place;
mod registries;
mod registry;
mod rootfs;
mod spool;
mod storage;

use std::io::Read;
use std::path::Path;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::cancel::Cancel;
use crate::digest::Digest;
use crate::documents::{MAX_DOCUMENT, Named, Parts, Resolved, check_platform, diff_ids, parse};
use crate::platform::Platform;
use crate::reference::Reference;

pub(crate) use self::bundle::Bundle;
use self::choice::Choice;
pub(crate) use self::registries::Registries;
pub use self::registry::{OpenBlob, Pushed, Pusher};

/// Reads the headers that a registry answers with.
#[cfg(any(feature = "fuzzing", test))]
pub(crate) fn headers(text: &str) {
    registry::headers(text);
}

/// One layer of an image to be read.
#[derive(Clone, Debug)]
pub(crate) struct SourceLayer {
    /// Digest of the stream, as it is named; for transports without one, its
    /// diff_id.
    pub(crate) digest: Digest,
    /// Size of the stream, where written down.
    pub(crate) size: Option<u64>,
    /// Media type of the stream, where written down.
    pub(crate) media_type: Option<String>,
    /// Digest of the tar stream in it.
    pub(crate) diff_id: Digest,
    /// Where the transport has it, if the digest does not tell.
    place: Option<String>,
}

impl SourceLayer {
    /// A layer that is named by what is in it.
    pub(crate) fn plain(diff_id: Digest) -> Self {
        Self {
            digest: diff_id,
            size: None,
            media_type: None,
            diff_id,
            place: None,
        }
    }
}

/// A manifest as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawManifest {
    pub(crate) media_type: String,
    pub(crate) bytes: Vec<u8>,
}

/// The repository that an image is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The registry as it is named in references, such as `docker.io`.
    pub(crate) registry: String,
    pub(crate) repository: String,
}

/// An image that has been found, its documents read and checked.
#[derive(Clone, Debug)]
pub(crate) struct SourceImage {
    /// Digest that identifies the image: of its manifest, or of its
    /// configuration where there is no manifest.
    pub(crate) digest: Digest,
    /// Digest of what the reference names: of an index, where there is one;
    /// otherwise the image's own.
    pub(crate) named: Digest,
    /// The manifest; transports without one have none.
    pub(crate) manifest: Option<RawManifest>,
    /// The configuration as it came; its digest is in the manifest.
    pub(crate) config_bytes: Vec<u8>,
    pub(crate) config: ImageConfiguration,
    /// The layers, lowest first.
    pub(crate) layers: Vec<SourceLayer>,
    /// The repository that it came from; `None` if it was no registry's.
    pub(crate) origin: Option<Origin>,
}

/// An opened transport. Several layers can be read at once, from any threads.
pub(crate) trait Source: Sync {
    /// The digest that the image is known by where it is, of a configuration, a
    /// manifest or an index; `None` if finding out takes no less than
    /// [`Self::image`] does. An image that is stored under it needs not be read.
    fn identity(&self) -> Result<Option<Digest>, Error> {
        Ok(None)
    }
    /// Finds the image for `platform`. Without one, that for guests of this host
    /// is chosen where there is a choice; where there is none, whatever it is.
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error>;
    /// Opens the stream of a layer of [`Self::image`].
    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error>;
}

/// What a transport may use while it is open.
#[derive(Clone, Copy)]
pub(crate) struct Session<'a> {
    /// A directory for files that are in the way for a while. They have no names.
    pub(crate) scratch: &'a Path,
    /// Ends waits and reads of registries.
    pub(crate) cancel: &'a Cancel,
    /// Called, from any thread, with a sentence for people about why nothing
    /// happens for a while.
    pub(crate) notice: &'a (dyn Fn(&str) + Sync),
}

/// Opens the transport of `reference`; `None` for one that is in the store only.
pub(crate) fn open<'a>(
    reference: &Reference,
    session: Session<'a>,
) -> Result<Option<Box<dyn Source + 'a>>, Error> {
    let unknown = |reason: String| Error::Unknown {
        reference: reference.to_string(),
        reason,
    };
    let place = reference.to_string();
    Ok(Some(match reference {
        Reference::Oci { directory, tag } => {
            let files = layout::Directory::open(directory).map_err(unknown)?;
            let choice = Choice::of(tag.as_deref());
            Box::new(layout::Layout::new(files, place, choice))
        }
        Reference::OciArchive { file, tag } => {
            let files = archive::Archive::open(file, reference, session)?;
            let choice = Choice::of(tag.as_deref());
            Box::new(layout::Layout::new(files, place, choice))
        }
        Reference::DockerArchive { file, tag } => {
            let files = archive::Archive::open(file, reference, session)?;
            let choice = Choice::of(tag.as_deref());
            Box::new(docker::DockerArchive::new(files, place, choice))
        }
        Reference::DockerDaemon { image } => Box::new(engine::Engine::open(image, session)?),
        Reference::ContainersStorage { storage, image } => {
            Box::new(storage::Storage::open(storage.as_deref(), image)?)
        }
        Reference::RootFs { directory } => match directory.is_dir() {
            true => Box::new(rootfs::Directory::new(directory)),
            false => return Err(unknown(format!("{directory:?} is not a directory"))),
        },
        Reference::Docker(name) => Box::new(registry::Registry::open(name, session)?),
        Reference::Stored(_) => return Ok(None),
    }))
}

/// Named files, whatever they are kept in.
pub(crate) trait Files {
    /// Opens a file by its path; `None` if there is none.
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error>;
}

/// Reads a small file whole.
fn read_small(files: &impl Files, path: &str, what: &str) -> Result<Option<Vec<u8>>, Error> {
    let Some(file) = files.open(path)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    file.take(MAX_DOCUMENT + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::document(what, error))?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_DOCUMENT) {
        return Err(Error::document(what, "it is larger than 8 MiB"));
    }
    Ok(Some(bytes))
}

fn blob_path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Reads a document by its descriptor, checking size and digest.
fn read_named(files: &impl Files, named: &Named, what: &str) -> Result<Vec<u8>, Error> {
    let bytes = read_small(files, &blob_path(named.digest), what)?
        .ok_or_else(|| named.damaged("it is missing"))?;
    named.check(&bytes)?;
    Ok(bytes)
}

/// Reads a document by its descriptor, and checks it; the text says which.
type ReadDocument<'a> = &'a dyn Fn(&Named, &str) -> Result<Vec<u8>, Error>;

/// Everything about the image of a manifest.
fn describe(
    read: ReadDocument<'_>,
    resolved: Resolved,
    platform: Option<&Platform>,
) -> Result<SourceImage, Error> {
    let parts = Parts::of(&resolved.manifest)?;
    let config_bytes = read(&parts.config, "configuration")?;
    let config: ImageConfiguration = parse(&config_bytes, "configuration")?;
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
            place: None,
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
