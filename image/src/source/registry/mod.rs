//! Registries (OCI distribution-spec v1.1, and Docker's).

mod challenge;
mod client;
mod credentials;
mod trust;

use std::io::{self, Cursor, Read};

use ureq::http::{StatusCode, header};

use self::client::{Client, Wanted};
use super::{Files, Origin, Session, Source, SourceImage, SourceLayer, describe};
use crate::Error;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::documents::{MAX_DOCUMENT, Named, resolve};
use crate::platform::Platform;

/// Where Docker's own registry answers.
const DEFAULT_HOST: &str = "registry-1.docker.io";
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json,\
                         application/vnd.oci.image.manifest.v1+json,\
                         application/vnd.docker.distribution.manifest.list.v2+json,\
                         application/vnd.docker.distribution.manifest.v2+json";
const ANYTHING: &str = "*/*";
/// How often the reading of one blob is taken up again.
const RESUMES: u32 = 5;

/// Reads a challenge.
#[cfg(feature = "fuzzing")]
pub(super) fn challenge(header: &str) {
    let _ = challenge::Challenge::parse(header);
}

/// An image in a registry.
pub(crate) struct Registry<'s> {
    client: Client<'s>,
    reference: DockerReference,
}

impl<'s> Registry<'s> {
    /// Finds out who to be and where to go; the image is asked for later.
    pub(crate) fn open(reference: &DockerReference, session: Session<'s>) -> Self {
        let host = match reference.is_default_registry() {
            true => DEFAULT_HOST,
            false => reference.registry(),
        };
        let credentials = credentials::find(
            reference.registry(),
            reference.is_default_registry(),
            reference.repository(),
        );
        let client = Client::new(
            reference.registry(),
            host,
            reference.repository(),
            credentials,
            session,
        );
        Self {
            client,
            reference: reference.clone(),
        }
    }

    /// A manifest or index by tag or digest, and what the registry calls it.
    fn manifest(&self, name: &str) -> Result<(Vec<u8>, Option<String>), Error> {
        let wanted = Wanted {
            kind: "manifests",
            name,
            accept: MANIFESTS,
            from: 0,
        };
        let Some(mut response) = self.client.get(wanted)? else {
            return Err(Error::Unknown {
                reference: self.reference.to_string(),
                reason: format!("{} has none", self.reference.registry()),
            });
        };
        let media_type = response.headers().get(header::CONTENT_TYPE);
        let media_type = media_type.and_then(|value| {
            let media_type = value.to_str().ok()?.split(';').next()?;
            Some(media_type.trim().to_owned())
        });
        let mut bytes = Vec::new();
        let body = response.body_mut().as_reader();
        body.take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.client.error(error.to_string()))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(Error::document("manifest", "it is larger than 8 MiB"));
        }
        Ok((bytes, media_type))
    }
}

impl Source for Registry<'_> {
    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        let digest = self.reference.digest();
        let name = match (digest, self.reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_owned(),
            (None, None) => return Err(self.client.error("the reference has no tag")),
        };
        let (bytes, media_type) = self.manifest(&name)?;
        let found = Digest::of(&bytes);
        if let Some(digest) = digest.filter(|digest| *digest != found) {
            return Err(Error::Blob {
                digest: digest.to_string(),
                reason: format!("the registry gives contents with digest {found}"),
            });
        }
        let read = |named: &Named| Ok(self.manifest(&named.digest.to_string())?.0);
        let resolved = resolve(bytes, media_type.as_deref(), platform, &read)?;
        let image = describe(self, resolved, platform)?;
        Ok(SourceImage {
            origin: Some(Origin {
                registry: self.reference.registry().to_owned(),
                repository: self.reference.repository().to_owned(),
            }),
            ..image
        })
    }

    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        let blob = Blob {
            registry: self,
            digest: layer.digest,
            size: layer.size,
            at: 0,
            body: None,
            resumes: 0,
        };
        Ok(Box::new(blob))
    }
}

/// Blobs by their paths in a layout.
impl Files for Registry<'_> {
    fn open<'a>(&'a self, path: &str) -> Result<Option<Box<dyn Read + Send + 'a>>, Error> {
        let hex = path.rsplit('/').next().unwrap_or(path);
        let Some(digest) = Digest::parse(&format!("sha256:{hex}")) else {
            return Ok(None);
        };
        let mut blob = Blob {
            registry: self,
            digest,
            size: None,
            at: 0,
            body: None,
            resumes: 0,
        };
        // Documents are small: an error of the registry is told as one.
        let mut bytes = Vec::new();
        let read = blob.by_ref().take(MAX_DOCUMENT + 1).read_to_end(&mut bytes);
        read.map_err(|error| self.client.error(error.to_string()))?;
        Ok(Some(Box::new(Cursor::new(bytes))))
    }
}

/// A blob on its way: taken up again where it broke off.
struct Blob<'a> {
    registry: &'a Registry<'a>,
    digest: Digest,
    /// Its length, where a document tells.
    size: Option<u64>,
    at: u64,
    body: Option<Box<dyn Read + Send>>,
    resumes: u32,
}

impl Blob<'_> {
    fn request(&self) -> io::Result<Box<dyn Read + Send>> {
        let wanted = Wanted {
            kind: "blobs",
            name: &self.digest.to_string(),
            accept: ANYTHING,
            from: self.at,
        };
        let response = self.registry.client.get(wanted).map_err(io::Error::other)?;
        let response = response.ok_or_else(|| io::Error::other("the registry does not have it"))?;
        let starts_here = response.status() == StatusCode::PARTIAL_CONTENT
            && response
                .headers()
                .get(header::CONTENT_RANGE)
                .and_then(|value| value.to_str().ok()?.strip_prefix("bytes "))
                .and_then(|range| range.split('-').next()?.trim().parse::<u64>().ok())
                == Some(self.at);
        let mut body = response.into_body().into_reader();
        if self.at > 0 && !starts_here {
            // All of it came: what is known already is read again.
            let skipped = io::copy(&mut body.by_ref().take(self.at), &mut io::sink())?;
            if skipped != self.at {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Box::new(body))
    }

    fn read_once(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut body = match self.body.take() {
            Some(body) => body,
            None => self.request()?,
        };
        let count = body.read(buffer);
        // Kept also after an error, which says that there was a connection.
        self.body = Some(body);
        let count = count?;
        if count == 0 && self.size.is_some_and(|size| self.at < size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(count)
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // More than was announced is for the digest to find.
        let size = self.size.map_or(u64::MAX, |size| size.saturating_add(1));
        let left = usize::try_from(size.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let most = buffer.len().min(left);
        let Some(buffer) = buffer.get_mut(..most).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        loop {
            let had_body = self.body.is_some();
            match self.read_once(buffer) {
                Ok(count) => {
                    self.at += count as u64;
                    return Ok(count);
                }
                // What the client has given up is not tried again.
                Err(error) if !had_body && self.body.is_none() => return Err(error),
                Err(error) if self.resumes == RESUMES => return Err(error),
                Err(_) => {
                    self.resumes += 1;
                    self.body = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
