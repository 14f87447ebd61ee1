//! The image store of a user.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::path::Path;

use sm_image::{
    Config, Digest, DockerReference, FindUsers, ImageDetails, ImageSummary, Loaded, Platform,
    PruneOptions, Pruned, PullOptions, Reference, Store, Usage, Verified,
};

use super::users::{Unknown, image_users};
use crate::events::{EventAction, EventLog, EventRecord, EventSubject};
use crate::sm::Sm;
use crate::{Error, OptionError, Refusal};

/// The image store; see [`Sm::images`].
#[derive(Clone, Debug)]
pub struct Images {
    sm: Sm,
}

impl Sm {
    /// Returns the store of images.
    #[must_use]
    pub fn images(&self) -> Images {
        Images { sm: self.clone() }
    }
}

impl Images {
    fn store(&self) -> Result<Store, Error> {
        Ok(Store::open(&self.sm.home().images())?)
    }

    /// Calls an operation that removes data, with the images that snapshots need.
    fn removing<T>(
        &self,
        operation: impl FnOnce(&Store, FindUsers<'_>) -> Result<T, sm_image::Error>,
    ) -> Result<T, Error> {
        let unreadable = RefCell::new(None);
        let users = || {
            image_users(self.sm.home()).map_err(|unknown| match unknown {
                Unknown::Store(text) => text,
                Unknown::Snapshot { name, reason } => {
                    let refusal = Refusal::UnreadableSnapshot { name, reason };
                    let text = refusal.to_string();
                    unreadable.replace(Some(refusal));
                    text
                }
            })
        };
        let result = operation(&self.store()?, &users);
        result.map_err(|error| match (error, unreadable.take()) {
            (sm_image::Error::Users(_), Some(refusal)) => refusal.into(),
            (error, _) => error.into(),
        })
    }

    /// Returns true if [`Sm::image`] would find the image of `reference` in the store.
    ///
    /// # Errors
    /// The reference is invalid, or the store cannot be read.
    pub fn contains(&self, reference: &str, platform: Option<&Platform>) -> Result<bool, Error> {
        let parsed = Reference::parse_with_aliases(reference)?;
        Ok(self.store()?.has(&parsed, platform)?)
    }

    /// Returns all images in the store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, Error> {
        Ok(self.store()?.list()?)
    }

    /// Returns the details of an image.
    ///
    /// # Errors
    /// No image has that name or ID, or the store cannot be read.
    pub fn inspect(&self, query: &str) -> Result<ImageDetails, Error> {
        Ok(self.store()?.inspect(query)?)
    }

    /// Returns the disk usage of the images.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn usage(&self) -> Result<Usage, Error> {
        Ok(self.store()?.usage()?)
    }

    /// Verifies an image against its digests.
    ///
    /// # Errors
    /// No image has that name or ID, or the store cannot be read.
    pub fn verify(&self, query: &str) -> Result<Verified, Error> {
        Ok(self.store()?.verify(query, None)?)
    }

    /// Like [`Self::verify`], and removes damaged blobs, unless a VM or a snapshot needs
    /// them.
    ///
    /// # Errors
    /// As for [`Self::verify`], or it cannot be determined which images snapshots need.
    pub fn repair(&self, query: &str) -> Result<Verified, Error> {
        self.removing(|store, users| store.verify(query, Some(users)))
    }

    /// Adds a name to an image, for instance one in a registry to push to.
    ///
    /// # Errors
    /// There is no such image, or the name is invalid.
    pub fn tag(&self, query: &str, name: &str) -> Result<(), Error> {
        let name = docker_name(name)?;
        Ok(self.store()?.tag(query, &name)?)
    }

    /// Writes images to one archive, for `docker load`, `podman load`, skopeo and
    /// [`Self::load`].
    ///
    /// # Errors
    /// One of them does not exist or is damaged, or `out` cannot be written.
    pub fn save(
        &self,
        queries: &[String],
        out: &mut dyn Write,
        options: &PullOptions<'_>,
    ) -> Result<(), Error> {
        Ok(self.store()?.save(queries, out, options)?)
    }

    /// Adds all images of an archive to the store; errors name the archive `origin`.
    ///
    /// # Errors
    /// The stream is no archive of images, or one of them is refused.
    pub fn load(
        &self,
        stream: impl Read,
        origin: &str,
        options: &PullOptions<'_>,
    ) -> Result<Vec<Loaded>, Error> {
        Ok(self.store()?.load(stream, origin, options)?)
    }

    /// Like [`Self::load`], from a file, which is read without a copy.
    ///
    /// # Errors
    /// As for [`Self::load`].
    pub fn load_file(&self, path: &Path, options: &PullOptions<'_>) -> Result<Vec<Loaded>, Error> {
        Ok(self.store()?.load_file(path, options)?)
    }

    /// Pushes an image, by its name in the store, to the registry of that name; returns the
    /// digest of its manifest there.
    ///
    /// # Errors
    /// No image has that name, or the registry refuses it.
    pub fn push(&self, name: &str, options: &PullOptions<'_>) -> Result<Digest, Error> {
        Ok(self.store()?.push(&docker_name(name)?, options)?)
    }

    /// Creates an image from a root file system in a tar stream, which may be compressed;
    /// returns its ID.
    ///
    /// # Errors
    /// The stream is no archive, the name is invalid, or the store cannot be written.
    pub fn import(
        &self,
        stream: impl Read + Send,
        name: Option<&str>,
        config: Config,
        comment: &str,
        options: &PullOptions<'_>,
    ) -> Result<Digest, Error> {
        let name = name.map(docker_name).transpose()?;
        let store = self.store()?;
        let image = store.import(stream, name.as_ref(), config, comment, options)?;
        Ok(image.digest)
    }

    /// Removes an image by reference, or by (a prefix of) its ID.
    ///
    /// # Errors
    /// There is no such image, a snapshot needs it, or the store cannot be changed.
    pub fn remove(&self, query: &str) -> Result<Pruned, Error> {
        let removed = self.removing(|store, users| store.remove(query, users))?;
        let event = EventRecord::now(EventSubject::Image, EventAction::Remove, query, query);
        EventLog::of(self.sm.home()).note(&event);
        Ok(removed)
    }

    /// Removes unneeded data; see [`PruneOptions`]. Images in use by VMs and snapshots
    /// stay.
    ///
    /// # Errors
    /// Files cannot be read or removed.
    pub fn prune(&self, options: PruneOptions) -> Result<Pruned, Error> {
        self.removing(|store, users| store.prune(options, users))
    }

    /// Removes the least recently used images until the rest takes at most `max_bytes`,
    /// unless another process uses the store at the moment.
    ///
    /// # Errors
    /// Files cannot be read or removed, or the needs of snapshots cannot be determined.
    pub fn prune_to(&self, max_bytes: u64) -> Result<Option<Pruned>, Error> {
        let options = PruneOptions::new().max_bytes(max_bytes);
        self.removing(|store, users| store.try_prune(options, users))
    }
}

pub(crate) fn docker_name(name: &str) -> Result<DockerReference, Error> {
    DockerReference::parse(name).map_err(|reason| {
        OptionError::ImageName {
            name: name.to_owned(),
            reason: reason.to_string(),
        }
        .into()
    })
}
