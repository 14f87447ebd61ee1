//! The images of a home: what there is, and keeping it in order.

use std::io::{Read, Write};
use std::path::Path;

use sm_image::{
    Config, Digest, DockerReference, ImageDetails, ImageSummary, Loaded, Platform, PruneOptions,
    Pruned, PullOptions, Reference, Store, Usage, Verified,
};

use super::users::image_users;
use crate::Error;
use crate::home::Home;

fn store(home: &Home) -> Result<Store, Error> {
    Ok(Store::open(&home.images())?)
}

/// Whether [`super::Image::open_in`] would find what `reference` means in the store.
///
/// # Errors
/// The reference cannot be understood, or the store not be read.
pub fn is_stored(home: &Home, reference: &str, platform: Option<&Platform>) -> Result<bool, Error> {
    let parsed = Reference::parse_with_aliases(reference)?;
    Ok(store(home)?.has(&parsed, platform)?)
}

/// All images in the store.
///
/// # Errors
/// The store cannot be read.
pub fn list(home: &Home) -> Result<Vec<ImageSummary>, Error> {
    Ok(store(home)?.list()?)
}

/// Everything about an image.
///
/// # Errors
/// There is none of that name or ID, or the store cannot be read.
pub fn inspect(home: &Home, query: &str) -> Result<ImageDetails, Error> {
    Ok(store(home)?.inspect(query)?)
}

/// How much the images take.
///
/// # Errors
/// The store cannot be read.
pub fn usage(home: &Home) -> Result<Usage, Error> {
    Ok(store(home)?.usage()?)
}

/// Checks an image against its digests; with `repair`, removes what is damaged.
///
/// # Errors
/// There is none of that name or ID, or the store cannot be read.
pub fn verify(home: &Home, query: &str, repair: bool) -> Result<Verified, Error> {
    Ok(store(home)?.verify(query, repair)?)
}

/// Gives an image another name, such as one of a registry that it is pushed to.
///
/// # Errors
/// There is no such image, or the name is none.
pub fn tag(home: &Home, query: &str, name: &str) -> Result<(), Error> {
    let name = DockerReference::parse(name).map_err(|reason| {
        Error::Refused(format!("\"{name}\" is no name for an image: {reason}"))
    })?;
    Ok(store(home)?.tag(query, &name)?)
}

/// Writes images to one archive, for `docker load`, `podman load`, skopeo and
/// [`load`].
///
/// # Errors
/// One of them is not there or damaged, or `out` cannot be written.
pub fn save(
    home: &Home,
    queries: &[String],
    out: &mut dyn Write,
    options: &PullOptions<'_>,
) -> Result<(), Error> {
    Ok(store(home)?.save(queries, out, options)?)
}

/// Brings all images of an archive into the store; `place` is what errors call it.
///
/// # Errors
/// The stream is no archive of images, or one of them is refused.
pub fn load(
    home: &Home,
    stream: impl Read,
    place: &str,
    options: &PullOptions<'_>,
) -> Result<Vec<Loaded>, Error> {
    Ok(store(home)?.load(stream, place, options)?)
}

/// Like [`load`], from a file, which need not be copied to be read.
///
/// # Errors
/// Likewise.
pub fn load_file(
    home: &Home,
    path: &Path,
    options: &PullOptions<'_>,
) -> Result<Vec<Loaded>, Error> {
    Ok(store(home)?.load_file(path, options)?)
}

/// Brings an image, by the name that it has in the store, into the registry that
/// the name says; returns the digest of its manifest there.
///
/// # Errors
/// There is no image of that name, or the registry does not take it.
pub fn push(home: &Home, name: &str, options: &PullOptions<'_>) -> Result<Digest, Error> {
    Ok(store(home)?.push(&docker_name(name)?, options)?)
}

/// Makes an image of a root file system in a tar stream, which may be compressed;
/// returns its ID.
///
/// # Errors
/// The stream is no archive, the name is none, or the store cannot be written.
pub fn import(
    home: &Home,
    stream: impl Read + Send,
    name: Option<&str>,
    config: Config,
    comment: &str,
    options: &PullOptions<'_>,
) -> Result<Digest, Error> {
    let name = name.map(docker_name).transpose()?;
    let image = store(home)?.import(stream, name.as_ref(), config, comment, options)?;
    Ok(image.digest)
}

fn docker_name(name: &str) -> Result<DockerReference, Error> {
    DockerReference::parse(name)
        .map_err(|reason| Error::Refused(format!("\"{name}\" is no name for an image: {reason}")))
}

/// Removes an image by reference, or by (the beginning of) its ID.
///
/// # Errors
/// There is none, a snapshot needs it, or the store cannot be changed.
pub fn remove(home: &Home, query: &str) -> Result<Pruned, Error> {
    Ok(store(home)?.remove(query, &|| image_users(home))?)
}

/// Removes what is not needed; see [`PruneOptions`]. What VMs and snapshots use
/// stays.
///
/// # Errors
/// Files cannot be read or removed.
pub fn prune(home: &Home, options: PruneOptions) -> Result<Pruned, Error> {
    Ok(store(home)?.prune(options, &|| image_users(home))?)
}

/// Removes the longest unused until the images take no more than `max_bytes`, unless
/// somebody else uses the store right now.
///
/// # Errors
/// Files cannot be read or removed, or it is not known what snapshots need.
pub fn keep_within(home: &Home, max_bytes: u64) -> Result<Option<Pruned>, Error> {
    let options = PruneOptions {
        max_bytes: Some(max_bytes),
        ..PruneOptions::default()
    };
    Ok(store(home)?.try_prune(options, &|| image_users(home))?)
}
