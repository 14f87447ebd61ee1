//! The images of a home: what there is, and keeping it in order.

use std::collections::BTreeSet;

use sm_image::{
    Digest, DockerReference, ImageDetails, ImageSummary, Platform, PruneOptions, Pruned, Reference,
    Store, Usage, Verified,
};

use crate::Error;
use crate::home::Home;
use crate::snapshots::image_users;

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

/// Removes an image by reference, or by (the beginning of) its ID.
///
/// # Errors
/// There is none, a snapshot needs it, or the store cannot be changed.
pub fn remove(home: &Home, query: &str) -> Result<Pruned, Error> {
    let store = store(home)?;
    let found = store.find(query)?;
    let users = image_users(home)?;
    // Another name of it may go.
    let names = store.list()?.into_iter();
    let last = names.filter(|image| image.digest == found.digest).count() == 1;
    let by_name = found.reference == query;
    if let Some(user) = users.get(&found.digest).and_then(|users| users.first())
        && (last || !by_name)
    {
        return Err(Error::Refused(format!(
            "image \"{query}\" is used by snapshot \"{user}\": remove that first (sm snapshot rm {user})"
        )));
    }
    Ok(store.remove(query, &users.into_keys().collect())?)
}

/// Removes what is not needed; see [`PruneOptions`]. What VMs and snapshots use
/// stays.
///
/// # Errors
/// Files cannot be read or removed.
pub fn prune(home: &Home, options: PruneOptions) -> Result<Pruned, Error> {
    let keep: BTreeSet<Digest> = image_users(home)?.into_keys().collect();
    Ok(store(home)?.prune(options, &keep)?)
}

/// Removes the longest unused until the images take no more than `max_bytes`, unless
/// somebody else uses the store right now.
///
/// # Errors
/// Files cannot be read or removed.
pub fn keep_within(home: &Home, max_bytes: u64) -> Result<(), Error> {
    let keep: BTreeSet<Digest> = image_users(home)?.into_keys().collect();
    let options = PruneOptions {
        max_bytes: Some(max_bytes),
        ..PruneOptions::default()
    };
    store(home)?.try_prune(options, &keep)?;
    Ok(())
}
