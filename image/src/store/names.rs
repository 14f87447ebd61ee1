//! Names of images.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::files::{entries, read_json};
use super::{Store, StoredImage};
use crate::Error;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::platform::Platform;
use crate::reference::Reference;

/// Minimum number of digits of an ID prefix where the text could also be a name.
const SHORTEST_ID: usize = 6;
/// Minimum number of digits of every ID prefix, as in Docker's containerd image store.
const SHORTEST_PREFIX: usize = 4;

/// A name in the store and its image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ImageSummary {
    /// The reference.
    pub reference: String,
    /// Digest of the image.
    #[serde(rename = "id")]
    pub digest: Digest,
    /// Digest of the document that the reference named at the source: an index, or the
    /// image itself.
    #[serde(rename = "digest")]
    pub named: Digest,
    /// Size of its file contents and metadata in bytes, including shared layers.
    pub size: u64,
    /// Time at which it was stored, in nanoseconds since the Unix epoch.
    pub stored_ns: u64,
}

impl Store {
    /// Returns all names, sorted.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, Error> {
        let mut found = Vec::new();
        for path in entries(&self.root.join("refs"))? {
            let is_json = path.extension().is_some_and(|end| end == "json");
            if is_json {
                found.extend(read_json::<ImageSummary>(&path)?);
            }
        }
        found.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(found)
    }

    /// Returns the record of a name in its stored form.
    pub(super) fn named(&self, reference: &str) -> Result<Option<ImageSummary>, Error> {
        let found = read_json::<ImageSummary>(&self.ref_path(reference))?;
        Ok(found.filter(|found| found.reference == reference))
    }

    /// Finds the image with this name, in any notation, or with an ID that starts with
    /// these four or more digits. Names take precedence.
    ///
    /// # Errors
    /// No image or several match.
    pub fn find(&self, query: &str) -> Result<ImageSummary, Error> {
        Ok(self.lookup(query)?.0)
    }

    /// As [`Self::find`]; the second value is true if the image was found by its name.
    pub(super) fn lookup(&self, query: &str) -> Result<(ImageSummary, bool), Error> {
        if let Some(named) = self.named(query)? {
            return Ok((named, true));
        }
        if let Ok(meant) = Reference::parse(query)
            && let Some(named) = self.named(&absolute(&meant))?
        {
            return Ok((named, true));
        }
        let digits = query.strip_prefix("sha256:").unwrap_or(query);
        let is_id =
            digits.len() >= SHORTEST_PREFIX && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let all = match is_id {
            true => self.list()?,
            false => Vec::new(),
        };
        let mut matching = all
            .into_iter()
            .filter(|image| image.digest.hex().starts_with(digits));
        let first = matching
            .next()
            .ok_or_else(|| Error::unknown(query, "the store has no image of this name or ID"))?;
        match matching.all(|other| other.digest == first.digest) {
            true => Ok((first, false)),
            false => Err(Error::Ambiguous(query.to_owned())),
        }
    }

    /// Returns true if [`Self::open_image`] would find the image in the store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn has(&self, reference: &Reference, platform: Option<&Platform>) -> Result<bool, Error> {
        if let Reference::Docker(name) = reference {
            let stored = self.stored_by_name(name)?;
            return Ok(stored.is_some_and(|stored| stored.serves(platform)));
        }
        match self.find(&absolute(reference)) {
            Ok(_) => Ok(true),
            Err(Error::Unknown { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Finds a name without a transport in the store: as a name, or as the prefix of an
    /// ID.
    pub(super) fn stored_by_name(
        &self,
        name: &DockerReference,
    ) -> Result<Option<StoredImage>, Error> {
        let text = name.to_string();
        let bare = text.strip_suffix(":latest").unwrap_or(&text);
        let is_id = bare.len() >= SHORTEST_ID && bare.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(named) = self.named(&text)? {
            return self.stored(named.digest);
        }
        match is_id.then(|| self.find(bare)) {
            Some(Ok(found)) => self.stored(found.digest),
            None | Some(Err(Error::Unknown { .. })) => Ok(None),
            Some(Err(error)) => Err(error),
        }
    }

    /// Gives an image another name, which is taken from any other image that has it.
    ///
    /// # Errors
    /// No image or several match, or the store cannot be written.
    pub fn tag(&self, query: &str, name: &DockerReference) -> Result<(), Error> {
        let _in_use = self.lock(FlockOperation::LockShared)?;
        let found = self.find(query)?;
        self.write_name(&ImageSummary {
            reference: name.to_string(),
            ..found
        })
    }

    /// Records the name of an image, unless it is recorded already.
    pub(super) fn name(&self, text: &str, named: Digest, image: &StoredImage) -> Result<(), Error> {
        let _in_use = self.lock(FlockOperation::LockShared)?;
        let known = read_json::<ImageSummary>(&self.ref_path(text))?;
        if known.is_some_and(|known| known.digest == image.digest && known.named == named) {
            return Ok(());
        }
        self.write_name(&ImageSummary {
            reference: text.to_owned(),
            digest: image.digest,
            named,
            size: image.segments.iter().map(|segment| segment.len).sum(),
            stored_ns: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .ok()
                .and_then(|time| u64::try_from(time.as_nanos()).ok())
                .unwrap_or(0),
        })
    }

    fn write_name(&self, summary: &ImageSummary) -> Result<(), Error> {
        self.write_json(&self.ref_path(&summary.reference), summary)
    }

    pub(super) fn remove_name(&self, reference: &str) -> Result<(), Error> {
        let path = self.ref_path(reference);
        fs::remove_file(&path).map_err(Error::file("remove", &path))
    }
}

/// Returns the reference with an absolute path, so that it is independent of the current
/// directory.
pub(super) fn absolute(reference: &Reference) -> String {
    let mut reference = reference.clone();
    let path = match &mut reference {
        Reference::Oci { directory, .. } | Reference::RootFs { directory } => directory,
        Reference::OciArchive { file, .. } | Reference::DockerArchive { file, .. } => file,
        Reference::Docker(_)
        | Reference::DockerDaemon { .. }
        | Reference::ContainersStorage { .. }
        | Reference::Stored(_) => return reference.to_string(),
    };
    // Data from the standard input has no path.
    if path.as_os_str() != "-"
        && let Ok(real) = path.canonicalize()
    {
        *path = real;
    }
    reference.to_string()
}
