//! Registries (OCI distribution-spec v1.1, and Docker's).

mod auth;
mod backoff;
mod blob;
mod challenge;
mod client;
mod credentials;
mod failure;
mod http;
mod proxy;
mod push;
mod trust;
mod url;

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};

use ureq::http::header;

use self::blob::Blob;
use self::client::{Client, Resource};
use self::failure::Failure;
pub use self::push::{OpenBlob, Pushed, Pusher};
use super::registries::{Locations, Registries};
use super::repository::Repository;
use super::{Origin, Session, Source, SourceImage, SourceLayer, describe};
use crate::Error;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::documents::{MAX_DOCUMENT, Named, resolve};
use crate::error::{Cause, ErrorKind};
use crate::platform::Platform;

const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json,\
                         application/vnd.oci.image.manifest.v1+json,\
                         application/vnd.docker.distribution.manifest.list.v2+json,\
                         application/vnd.docker.distribution.manifest.v2+json";
/// Maximum number of requests to a mirror, which other locations can replace.
const MIRROR_ATTEMPTS: u32 = 2;

/// Passes `text` to the parsers of all headers that are used here.
#[cfg(any(feature = "fuzzing", test))]
pub(crate) fn headers(text: &str) {
    let _ = challenge::Challenge::parse(text);
    let _ = backoff::retry_after(text, std::time::UNIX_EPOCH);
    let _ = blob::parse_range(text);
    if let Some(location) = url::join(&ureq::http::Uri::from_static("https://r.example/a"), text) {
        let _ = url::with_query(&location, "digest", text);
    }
}

/// An image in a registry.
pub(crate) struct Registry<'s> {
    /// Clients for the mirrors, then for the registry itself.
    clients: Vec<Client<'s>>,
    /// Index of the client whose registry has the image.
    chosen: AtomicUsize,
    reference: DockerReference,
    session: Session<'s>,
}

impl<'s> Registry<'s> {
    /// Determines the locations of the image, without sending a request.
    pub(crate) fn open(reference: &DockerReference, session: Session<'s>) -> Result<Self, Error> {
        let locations = Registries::load()?.locations(reference)?;
        Ok(Self::at(locations, reference, session))
    }

    fn at(locations: Locations, reference: &DockerReference, session: Session<'s>) -> Self {
        let client = |repository: Repository, attempts| {
            let scope = format!("repository:{}:pull", repository.name);
            Client::new(repository, session, attempts, vec![scope])
        };
        let mirrors = locations.mirrors.into_iter();
        let mut clients: Vec<_> = mirrors
            .map(|repository| client(repository, MIRROR_ATTEMPTS))
            .collect();
        clients.push(client(locations.own, backoff::ATTEMPTS));
        Self {
            clients,
            chosen: AtomicUsize::new(0),
            reference: reference.clone(),
            session,
        }
    }

    /// Requests a manifest or index by tag or digest. Returns it with the media type
    /// reported by the registry.
    fn manifest(
        &self,
        client: &Client<'_>,
        name: &str,
    ) -> Result<(Vec<u8>, Option<String>), Error> {
        let resource = Resource {
            kind: "manifests",
            name,
            accept: MANIFESTS,
            from: 0,
        };
        let found = client.with_retries(|| {
            let Some(mut response) = client.get_once(resource)? else {
                return Ok(None);
            };
            let media_type = response.headers().get(header::CONTENT_TYPE);
            let media_type = media_type.and_then(|value| {
                let media_type = value.to_str().ok()?.split(';').next()?;
                Some(media_type.trim().to_owned())
            });
            let mut bytes = Vec::new();
            let body = response.body_mut().as_reader();
            let read = body.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes);
            read.map_err(|error| {
                let text = format!("the transfer of a manifest was interrupted: {error}");
                Failure::Passing(Cause::new(ErrorKind::Unreachable, text), None)
            })?;
            Ok(Some((bytes, media_type)))
        })?;
        let Some((bytes, media_type)) = found else {
            let text = format!("{} has none", client.repository().registry);
            return Err(Error::unknown(&self.reference, text));
        };
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(Error::too_large("manifest"));
        }
        Ok((bytes, media_type))
    }

    /// Requests the image from one location.
    fn image_at(&self, number: usize, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let no_tag = || {
            let reason = Cause::new(ErrorKind::InvalidName, "it has no tag");
            Error::unknown(&self.reference, reason)
        };
        let client = self.clients.get(number).ok_or_else(no_tag)?;
        let digest = self.reference.digest();
        let name = match digest {
            Some(digest) => digest.to_string(),
            None => self.reference.tag().ok_or_else(no_tag)?.to_owned(),
        };
        let (bytes, media_type) = self.manifest(client, &name)?;
        let found = Digest::of(&bytes);
        if let Some(digest) = digest.filter(|digest| *digest != found) {
            return Err(Error::Blob {
                digest: digest.to_string(),
                reason: format!("the registry returned contents with digest {found}"),
            });
        }
        let read = |named: &Named| Ok(self.manifest(client, &named.digest.to_string())?.0);
        let resolved = resolve(bytes, media_type.as_deref(), platform, &read)?;
        let read = |named: &Named, what: &str| self.document(number, named, what);
        let image = describe(&read, resolved, platform)?;
        Ok(SourceImage {
            origin: Some(Origin {
                registry: self.reference.registry().to_owned(),
                repository: self.reference.repository().to_owned(),
                base: None,
            }),
            ..image
        })
    }

    /// Returns the locations of a blob: the one with the image, then the following ones.
    fn from(&self, number: usize) -> Vec<&Client<'_>> {
        self.clients.iter().skip(number).collect()
    }

    /// Requests a small blob.
    fn document(&self, number: usize, named: &Named, what: &str) -> Result<Vec<u8>, Error> {
        if named.size > MAX_DOCUMENT {
            return Err(Error::too_large(what));
        }
        let mut bytes = Vec::new();
        if let Some(mut blob) = Blob::new(self.from(number), named.digest, named.size) {
            blob.read_to_end(&mut bytes).map_err(registry_error)?;
        }
        named.check(&bytes)?;
        Ok(bytes)
    }
}

/// Extracts the error of a blob's reader from an I/O error.
fn registry_error(error: std::io::Error) -> Error {
    let reason = Cause::of(&error);
    match error.into_inner().map(|inner| inner.downcast::<Error>()) {
        Some(Ok(error)) => *error,
        _ => Error::document("blob", reason),
    }
}

impl Source for Registry<'_> {
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let last = self.clients.len().saturating_sub(1);
        for number in 0..last {
            match self.image_at(number, platform) {
                Ok(image) => {
                    self.chosen.store(number, Ordering::Relaxed);
                    return Ok(image);
                }
                Err(error) => (self.session.message)(&format!("cannot use a mirror: {error}")),
            }
            if self.session.cancel.is_cancelled() {
                break;
            }
        }
        self.chosen.store(last, Ordering::Relaxed);
        self.image_at(last, platform)
    }

    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        let clients = self.from(self.chosen.load(Ordering::Relaxed));
        let blob = layer
            .size
            .and_then(|size| Blob::new(clients, layer.digest, size));
        match blob {
            Some(blob) => Ok(Box::new(blob)),
            None => Err(Error::document("manifest", "a layer has no size")),
        }
    }
}

#[cfg(test)]
mod tests;
