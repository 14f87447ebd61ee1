//! Operations on the image store of a home.

use std::io::{Read, Write};
use std::path::Path;

use sm_image::{
    Config, Digest, DockerReference, FindUsers, ImageDetails, ImageSummary, Loaded, Platform,
    PruneOptions, Pruned, PullOptions, Reference, Store, Usage, Verified,
};

use super::users::image_users;
use crate::Error;
use crate::home::Home;

fn store(home: &Home) -> Result<Store, Error> {
    Ok(Store::open(&home.images())?)
}

/// Returns true if [`super::Image::open_in`] would find the image of `reference` in the
/// store.
///
/// # Errors
/// The reference is invalid, or the store cannot be read.
pub fn is_stored(home: &Home, reference: &str, platform: Option<&Platform>) -> Result<bool, Error> {
    let parsed = Reference::parse_with_aliases(reference)?;
    Ok(store(home)?.has(&parsed, platform)?)
}

/// Returns all images in the store.
///
/// # Errors
/// The store cannot be read.
pub fn list(home: &Home) -> Result<Vec<ImageSummary>, Error> {
    Ok(store(home)?.list()?)
}

/// Returns the details of an image.
///
/// # Errors
/// No image has that name or ID, or the store cannot be read.
pub fn inspect(home: &Home, query: &str) -> Result<ImageDetails, Error> {
    Ok(store(home)?.inspect(query)?)
}

/// Returns the disk usage of the images.
///
/// # Errors
/// The store cannot be read.
pub fn usage(home: &Home) -> Result<Usage, Error> {
    Ok(store(home)?.usage()?)
}

/// Verifies an image against its digests; with `repair`, removes damaged blobs, unless a VM
/// or a snapshot needs them.
///
/// # Errors
/// No image has that name or ID, or the store cannot be read.
pub fn verify(home: &Home, query: &str, repair: bool) -> Result<Verified, Error> {
    let users: FindUsers<'_> = &|| image_users(home);
    Ok(store(home)?.verify(query, repair.then_some(users))?)
}

/// Adds a name to an image, for instance one in a registry to push to.
///
/// # Errors
/// There is no such image, or the name is invalid.
pub fn tag(home: &Home, query: &str, name: &str) -> Result<(), Error> {
    let name = DockerReference::parse(name).map_err(|reason| {
        Error::Refused(format!("\"{name}\" is no name for an image: {reason}"))
    })?;
    Ok(store(home)?.tag(query, &name)?)
}

/// Writes images to one archive, for `docker load`, `podman load`, skopeo and [`load`].
///
/// # Errors
/// One of them does not exist or is damaged, or `out` cannot be written.
pub fn save(
    home: &Home,
    queries: &[String],
    out: &mut dyn Write,
    options: &PullOptions<'_>,
) -> Result<(), Error> {
    Ok(store(home)?.save(queries, out, options)?)
}

/// Adds all images of an archive to the store; errors name the archive `place`.
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

/// Like [`load`], from a file, which is read without a copy.
///
/// # Errors
/// As for [`load`].
pub fn load_file(
    home: &Home,
    path: &Path,
    options: &PullOptions<'_>,
) -> Result<Vec<Loaded>, Error> {
    Ok(store(home)?.load_file(path, options)?)
}

/// Pushes an image, by its name in the store, to the registry of that name; returns the
/// digest of its manifest there.
///
/// # Errors
/// No image has that name, or the registry refuses it.
pub fn push(home: &Home, name: &str, options: &PullOptions<'_>) -> Result<Digest, Error> {
    Ok(store(home)?.push(&docker_name(name)?, options)?)
}

/// Creates an image from a root file system in a tar stream, which may be compressed;
/// returns its ID.
///
/// # Errors
/// The stream is no archive, the name is invalid, or the store cannot be written.
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

/// Removes an image by reference, or by (a prefix of) its ID.
///
/// # Errors
/// There is no such image, a snapshot needs it, or the store cannot be changed.
pub fn remove(home: &Home, query: &str) -> Result<Pruned, Error> {
    Ok(store(home)?.remove(query, &|| image_users(home))?)
}

/// Removes unneeded data; see [`PruneOptions`]. Images in use by VMs and snapshots stay.
///
/// # Errors
/// Files cannot be read or removed.
pub fn prune(home: &Home, options: PruneOptions) -> Result<Pruned, Error> {
    Ok(store(home)?.prune(options, &|| image_users(home))?)
}

/// Removes the least recently used images until the rest takes at most `max_bytes`,
/// unless another process uses the store at the moment.
///
/// # Errors
/// Files cannot be read or removed, or the needs of snapshots cannot be determined.
pub fn keep_within(home: &Home, max_bytes: u64) -> Result<Option<Pruned>, Error> {
    let options = PruneOptions::new().max_bytes(max_bytes);
    Ok(store(home)?.try_prune(options, &|| image_users(home))?)
}
