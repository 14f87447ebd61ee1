//! Pushing of an image to a registry (OCI distribution-spec, "Push").

use std::cell::RefCell;
use std::io::{self, Read};

use ureq::http::{Method, Uri, header};

use super::super::registries::Registries;
use super::super::repository::Repository;
use super::backoff::ATTEMPTS;
use super::client::Client;
use super::failure::Failure;
use super::http::Answer;
use super::url::{escape, join, with_query};
use crate::Error;
use crate::cancel::Cancel;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::error::{Cause, ErrorKind};
use crate::source::Session;

const DIGEST: &str = "docker-content-digest";

/// A repository that an image is pushed to: first its blobs, from any threads, then its
/// manifest.
///
/// Location and authentication are determined as for pulling, except that mirrors are not
/// used.
pub struct Pusher<'s> {
    client: Client<'s>,
    tag: String,
    /// Other repositories of the registry that may contain the same blobs.
    others: Vec<String>,
}

/// Result of pushing a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pushed {
    /// The registry already had the blob.
    Existed,
    /// The blob was mounted from another repository.
    Mounted,
    /// The blob was uploaded.
    Sent,
}

/// Opens a blob's contents. Each call starts at the first byte.
pub type OpenBlob<'a> = &'a (dyn Fn() -> io::Result<Box<dyn Read + Send>> + Sync);

impl<'s> Pusher<'s> {
    /// Creates a pusher for the name `reference`, which must have a tag. `others` are
    /// repositories of the same registry that may contain some of the blobs, which are
    /// then mounted instead of uploaded. `message` is called with sentences that explain
    /// delays.
    ///
    /// # Errors
    /// There is no tag, or the user's configuration of registries is invalid.
    pub fn open(
        reference: &DockerReference,
        others: &[&str],
        cancel: &'s Cancel,
        message: &'s (dyn Fn(&str) + Sync),
    ) -> Result<Self, Error> {
        let no_tag = || Error::Reference {
            reference: reference.to_string(),
            reason: "a push needs a tag",
        };
        let tag = reference.tag().ok_or_else(no_tag)?.to_owned();
        let own = Registries::load()?.locations(reference)?.own;
        let session = Session {
            scratch: std::path::Path::new(""),
            cancel,
            message,
        };
        Ok(Self::at(own, tag, others, session))
    }

    fn at(repository: Repository, tag: String, others: &[&str], session: Session<'s>) -> Self {
        let others = others.iter().filter(|other| **other != repository.name);
        let others: Vec<String> = others.map(|other| (*other).to_owned()).collect();
        let mut scopes = vec![format!("repository:{}:pull,push", repository.name)];
        scopes.extend(
            others
                .iter()
                .map(|other| format!("repository:{other}:pull")),
        );
        Self {
            client: Client::new(repository, session, ATTEMPTS, scopes),
            tag,
            others,
        }
    }

    /// Ensures that the registry has a blob of `size` bytes. `progress` is called with
    /// the number of bytes sent, which restarts at 0 for each attempt.
    ///
    /// # Errors
    /// The registry refuses the blob, or the blob cannot be read.
    pub fn blob(
        &self,
        digest: Digest,
        size: u64,
        open: OpenBlob<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Pushed, Error> {
        if self.client.with_retries(|| self.has(digest))? {
            return Ok(Pushed::Existed);
        }
        for other in &self.others {
            if self.client.with_retries(|| self.mount(digest, other))? {
                return Ok(Pushed::Mounted);
            }
        }
        self.client
            .with_retries(|| self.upload(digest, size, open, progress))?;
        Ok(Pushed::Sent)
    }

    /// Pushes the manifest under the tag. Its blobs must have been pushed before.
    ///
    /// # Errors
    /// The registry refuses the manifest, or reports another digest for it.
    pub fn manifest(&self, media_type: &str, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        self.client.with_retries(|| {
            let uri = self.client.uri(&format!("manifests/{}", self.tag))?;
            let length = bytes.len().to_string();
            let headers = [
                (header::CONTENT_TYPE, media_type),
                (header::CONTENT_LENGTH, &*length),
            ];
            let mut answer = self
                .client
                .send(&Method::PUT, &uri, &headers, || Ok(Box::new(bytes)))?;
            if !matches!(answer.status(), 200..=202) {
                return Err(self.client.failure(&mut answer));
            }
            match answer
                .response
                .headers()
                .get(DIGEST)
                .and_then(|value| value.to_str().ok())
            {
                Some(other) if other != digest.to_string() => Err(Failure::last(format!(
                    "it reports digest {other:?} for manifest {digest}"
                ))),
                _ => Ok(()),
            }
        })?;
        Ok(digest)
    }

    fn has(&self, digest: Digest) -> Result<bool, Failure> {
        let path = format!("blobs/{digest}");
        let mut answer = self.client.send_request(Method::HEAD, &path, &[])?;
        match answer.status() {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(self.client.failure(&mut answer)),
        }
    }

    /// Requests the mount of a blob from another repository. A registry that cannot mount
    /// it starts an upload instead, which expires.
    fn mount(&self, digest: Digest, other: &str) -> Result<bool, Failure> {
        let text = digest.to_string();
        let path = format!(
            "blobs/uploads/?mount={}&from={}",
            escape(&text),
            escape(other)
        );
        let mut answer = self.begin(&path)?;
        match answer.status() {
            201 => Ok(true),
            202 | 400..=405 => Ok(false),
            _ => Err(self.client.failure(&mut answer)),
        }
    }

    fn begin(&self, path: &str) -> Result<Answer, Failure> {
        let uri = self.client.uri(path)?;
        self.client
            .send(&Method::POST, &uri, &[(header::CONTENT_LENGTH, "0")], empty)
    }

    /// Uploads a blob: start, contents, completion.
    fn upload(
        &self,
        digest: Digest,
        size: u64,
        open: OpenBlob<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let path = "blobs/uploads/";
        let mut answer = self.begin(path)?;
        if answer.status() != 202 {
            return Err(self.client.failure(&mut answer));
        }
        let location = self.next_location(&answer)?;
        let length = size.to_string();
        // The callback is lent to each reader in turn.
        let progress = RefCell::new(progress);
        let headers = [
            (header::CONTENT_TYPE, "application/octet-stream"),
            (header::CONTENT_LENGTH, &*length),
        ];
        let mut answer = self.client.send(&Method::PATCH, &location, &headers, || {
            let blob = open().map_err(|error| {
                let text = format!("cannot read blob {digest}: {error}");
                Failure::Final(Cause::with(text, &error).or(ErrorKind::Io))
            })?;
            Ok(Box::new(Sending {
                blob,
                left: size,
                size,
                progress: &progress,
            }))
        })?;
        if !matches!(answer.status(), 202 | 204) {
            return Err(self.client.failure(&mut answer));
        }
        let location = self.next_location(&answer)?;
        let text = with_query(&location, "digest", &digest.to_string());
        let location = text
            .parse()
            .map_err(|_| Failure::last(format!("{text:?} is not a valid address")))?;
        let headers = [(header::CONTENT_LENGTH, "0")];
        let mut answer = self.client.send(&Method::PUT, &location, &headers, empty)?;
        match answer.status() {
            201 | 204 => Ok(()),
            _ => Err(self.client.failure(&mut answer)),
        }
    }

    /// Returns the address at which an upload continues, which `answer` contains.
    fn next_location(&self, answer: &Answer) -> Result<Uri, Failure> {
        let location = answer.response.headers().get(header::LOCATION);
        let location = location.and_then(|location| join(&answer.from, location.to_str().ok()?));
        let location = location.ok_or_else(|| {
            Failure::last("its answer does not state where an upload continues".to_owned())
        })?;
        self.client.check_location(answer, &location)?;
        Ok(location)
    }
}

fn empty() -> Result<Box<dyn Read>, Failure> {
    Ok(Box::new(io::empty()))
}

/// A blob's contents, limited to the announced size.
struct Sending<'p, 'q> {
    blob: Box<dyn Read + Send>,
    left: u64,
    size: u64,
    progress: &'p RefCell<&'q mut dyn FnMut(u64)>,
}

impl Read for Sending<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let most = buffer.len().min(left);
        let Some(buffer) = buffer.get_mut(..most).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        let count = self.blob.read(buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        (self.progress.borrow_mut())(self.size - self.left);
        Ok(count)
    }
}
