//! Where images come from: each transport gives documents and blobs.

mod archive;
mod docker;
mod layout;
mod registry;
mod rootfs;

use std::io::Read;

use oci_spec::image::{ImageConfiguration, ImageManifest};

use crate::Error;
use crate::digest::Digest;
use crate::documents::{
    self, Document, MAX_DOCUMENT, Named, choose_platform, parse, parse_manifest,
};
use crate::reference::Reference;

/// Reads a registry's challenge.
#[cfg(feature = "fuzzing")]
pub(crate) fn challenge(header: &str) {
    registry::challenge(header);
}

/// One layer of an image to be read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SourceLayer {
    /// Digest of the stream, as it is named; for transports without one, its
    /// diff_id.
    pub(crate) digest: Digest,
    /// Size of the stream, where written down.
    pub(crate) size: Option<u64>,
    /// Digest of the tar stream in it.
    pub(crate) diff_id: Digest,
}

/// An image that has been found, its documents read and checked.
#[derive(Clone, Debug)]
pub(crate) struct SourceImage {
    /// Digest that identifies the image: of its manifest, or of its
    /// configuration where there is no manifest.
    pub(crate) digest: Digest,
    pub(crate) config: ImageConfiguration,
    pub(crate) layers: Vec<SourceLayer>,
}

/// An opened transport.
pub(crate) trait Source: Sync {
    /// Finds the image.
    fn image(&self) -> Result<SourceImage, Error>;
    /// Opens a layer's stream.
    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error>;
}

/// Opens the transport of `reference`; `None` for one that is in the store only.
pub(crate) fn open(reference: &Reference) -> Result<Option<Box<dyn Source>>, Error> {
    let unknown = |reason: String| Error::Unknown {
        reference: reference.to_string(),
        reason,
    };
    Ok(Some(match reference {
        Reference::Oci { directory, tag } => {
            let blobs = layout::Directory::open(directory).map_err(unknown)?;
            Box::new(layout::Layout::new(blobs, reference.clone(), tag.clone()))
        }
        Reference::OciArchive { file, tag } => {
            let blobs = archive::Archive::open(file, reference)?;
            Box::new(layout::Layout::new(blobs, reference.clone(), tag.clone()))
        }
        Reference::DockerArchive { file, tag } => {
            let archive = archive::Archive::open(file, reference)?;
            Box::new(docker::DockerArchive::new(
                archive,
                reference.clone(),
                tag.clone(),
            ))
        }
        Reference::RootFs { directory } => match directory.is_dir() {
            true => Box::new(rootfs::Directory::new(directory)),
            false => return Err(unknown(format!("{directory:?} is not a directory"))),
        },
        Reference::Docker(name) => Box::new(registry::Registry::open(name)),
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
fn read_named(files: &impl Files, named: Named, what: &str) -> Result<Vec<u8>, Error> {
    let damaged = |reason: String| Error::Blob {
        digest: named.digest.to_string(),
        reason,
    };
    let bytes = read_small(files, &blob_path(named.digest), what)?
        .ok_or_else(|| damaged("it is missing".to_owned()))?;
    if u64::try_from(bytes.len()).ok() != Some(named.size) {
        let text = format!("it has {} bytes instead of {}", bytes.len(), named.size);
        return Err(damaged(text));
    }
    let digest = Digest::of(&bytes);
    if digest != named.digest {
        return Err(damaged(format!("its contents have digest {digest}")));
    }
    Ok(bytes)
}

/// Follows a descriptor to a manifest, through at most one index.
fn resolve_manifest(files: &impl Files, first: Named) -> Result<(Digest, ImageManifest), Error> {
    let bytes = read_named(files, first, "manifest")?;
    match parse_manifest(&bytes)? {
        Document::Manifest(manifest) => Ok((first.digest, *manifest)),
        Document::Index(index) => {
            let named = Named::from_descriptor(choose_platform(&index)?, "index")?;
            match parse_manifest(&read_named(files, named, "manifest")?)? {
                Document::Manifest(manifest) => Ok((named.digest, *manifest)),
                Document::Index(_) => Err(Error::document("index", "it leads to another index")),
            }
        }
    }
}

/// Everything about the image of a manifest.
fn describe(files: &impl Files, first: Named) -> Result<SourceImage, Error> {
    let (digest, manifest) = resolve_manifest(files, first)?;
    describe_manifest(files, digest, &manifest)
}

/// Everything about the image of a manifest that has been read.
fn describe_manifest(
    files: &impl Files,
    digest: Digest,
    manifest: &ImageManifest,
) -> Result<SourceImage, Error> {
    let named = Named::from_descriptor(manifest.config(), "manifest")?;
    let config: ImageConfiguration =
        parse(&read_named(files, named, "configuration")?, "configuration")?;
    let layers = documents::layers(manifest, &config)?
        .into_iter()
        .map(|(named, diff_id)| SourceLayer {
            digest: named.digest,
            size: Some(named.size),
            diff_id,
        })
        .collect();
    Ok(SourceImage {
        digest,
        config,
        layers,
    })
}
