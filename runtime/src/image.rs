//! Images, as this library's callers see them.

pub use sm_image::{Error as ImageError, ImageSummary, Platform, Progress};
use sm_image::{ImageConfiguration, Reference, Store, StoredImage};

use crate::Error as RuntimeError;
use crate::home::Home;
use crate::launch::DiskSegment;
use crate::run::{RunOptions, start};
use crate::snapshots::{Snapshot, users_of_image, warm_up};
use crate::vm::Vm;
use crate::workload::ImageDefaults;

/// How an image is got.
#[derive(Clone, Debug, Default)]
pub struct Fetch {
    /// What its programs shall run on; without it, whatever is chosen for guests
    /// of this host.
    pub platform: Option<Platform>,
    /// A registry is asked even for what the store has.
    pub anew: bool,
}

/// An image in the local store, ready to be run.
#[derive(Clone, Debug)]
pub struct Image {
    home: Home,
    reference: String,
    digest: String,
    platform: Platform,
    defaults: ImageDefaults,
    segments: Vec<DiskSegment>,
    /// Keeps the disk in the store until a VM has opened it.
    _stored: StoredImage,
}

impl Image {
    /// Opens an image, converting it into the store first if it is not there.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub fn open(reference: &str) -> Result<Self, RuntimeError> {
        Self::open_in(&Home::from_env()?, reference, &mut |_| {})
    }

    /// Like [`Self::open`], in explicit places and with reports of progress.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub fn open_in(
        home: &Home,
        reference: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self, RuntimeError> {
        Self::fetch_in(home, reference, &Fetch::default(), progress)
    }

    /// Like [`Self::open_in`], for a platform, or anew from a registry.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub fn fetch_in(
        home: &Home,
        reference: &str,
        fetch: &Fetch,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self, RuntimeError> {
        let parsed = Reference::parse(reference)?;
        let store = Store::open(&home.images())?.with_platform(fetch.platform.clone());
        let stored = match fetch.anew {
            true => store.pull(&parsed, progress)?,
            false => store.open_image(&parsed, progress)?,
        };
        Ok(Self::of(home, reference, stored))
    }

    fn of(home: &Home, reference: &str, stored: StoredImage) -> Self {
        let segments = stored
            .segments
            .iter()
            .map(|segment| DiskSegment {
                path: segment.path.clone(),
                offset: segment.offset,
                len: segment.len,
            })
            .collect();
        Self {
            home: home.clone(),
            reference: reference.to_owned(),
            digest: stored.digest.to_string(),
            platform: stored.platform(),
            defaults: defaults(&stored.config),
            segments,
            _stored: stored,
        }
    }

    /// Starts a VM from this image and returns once its workload runs.
    ///
    /// # Errors
    /// See [`RuntimeError`]; nothing is left behind, except the record of a VM
    /// whose command could not be run.
    pub fn run(&self, options: RunOptions) -> Result<Vm, RuntimeError> {
        start(&self.home, self, options)
    }

    /// Runs the image, has `prepare` bring its workload to where clones shall
    /// begin, and makes the snapshot `name` of it; see
    /// [`crate::snapshots::warm_up`].
    ///
    /// # Errors
    /// The VM cannot be started or captured, or `prepare` failed.
    pub fn warm_up<T>(
        &self,
        options: RunOptions,
        name: &str,
        prepare: impl FnOnce(&mut Vm) -> Result<T, RuntimeError>,
    ) -> Result<(Snapshot, T), RuntimeError> {
        warm_up(&self.home, self, options, name, prepare)
    }

    /// The reference it was opened by.
    #[must_use]
    pub fn reference(&self) -> &str {
        &self.reference
    }

    /// Digest of its manifest.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What its programs run on.
    #[must_use]
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Whether VMs of this host can run it.
    pub(crate) fn check_platform(&self) -> Result<(), RuntimeError> {
        match self.platform.is_host() {
            true => Ok(()),
            false => Err(RuntimeError::Refused(format!(
                "image \"{}\" is for {}, and VMs of this host run programs for {} only",
                self.reference,
                self.platform,
                Platform::host()
            ))),
        }
    }

    /// What its configuration says about running it.
    #[must_use]
    pub fn defaults(&self) -> &ImageDefaults {
        &self.defaults
    }

    pub(crate) fn segments(&self) -> &[DiskSegment] {
        &self.segments
    }
}

/// What of an image's configuration decides how it is run.
fn defaults(config: &ImageConfiguration) -> ImageDefaults {
    let Some(config) = config.config() else {
        return ImageDefaults::default();
    };
    ImageDefaults {
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        env: config.env().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone(),
    }
}

/// Whether [`Image::fetch_in`] would find what `reference` means in the store.
///
/// # Errors
/// The reference cannot be understood, or the store not be read.
pub fn is_stored(
    home: &Home,
    reference: &str,
    platform: Option<&Platform>,
) -> Result<bool, RuntimeError> {
    let parsed = Reference::parse(reference)?;
    let store = Store::open(&home.images())?.with_platform(platform.cloned());
    Ok(store.has(&parsed)?)
}

/// All images in the store.
///
/// # Errors
/// The store cannot be read.
pub fn list(home: &Home) -> Result<Vec<ImageSummary>, RuntimeError> {
    Ok(Store::open(&home.images())?.list()?)
}

/// Removes an image by reference, or by (the beginning of) its digest.
///
/// # Errors
/// There is none, a snapshot needs it, or the store cannot be changed.
pub fn remove(home: &Home, query: &str) -> Result<(), RuntimeError> {
    let named = list(home)?
        .into_iter()
        .find(|image| image.reference == query || image.digest.to_string() == query);
    if let Some(image) = named
        && let Some(user) = users_of_image(home, &image.digest.to_string())?.first()
    {
        return Err(RuntimeError::Refused(format!(
            "image \"{query}\" is used by snapshot \"{user}\": remove that first (sm snapshot rm {user})"
        )));
    }
    Ok(Store::open(&home.images())?.remove(query)?)
}
