//! Images in the public API.

mod store;
mod users;

use sm_control::launch::DiskSegment;
use sm_control::workload::ImageDefaults;
pub use sm_image::{
    Cancel, Config, Digest, Error as ImageError, ErrorKind as ImageErrorKind, ImageDetails,
    ImageSummary, ImageUsage, LayerDetails, LayerStep, Platform, Progress, PruneOptions, Pruned,
    PullOptions, Report, Usage, Verified,
};
use sm_image::{ImageConfig, Reference, Store, StoredImage};

pub use self::store::{
    import, inspect, is_stored, keep_within, list, load, load_file, prune, push, remove, save, tag,
    usage, verify,
};

use crate::Error as RuntimeError;
use crate::home::Home;

/// Options for getting an image.
#[derive(Clone, Debug, Default)]
pub struct Fetch<'a> {
    /// Asks the registry even if the store has the image.
    pub anew: bool,
    /// Platform, progress callback and other options of the pull.
    pub options: PullOptions<'a>,
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
    /// Opens an image. Pulls it into the store first if it is not there.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub fn open(reference: &str) -> Result<Self, RuntimeError> {
        Self::open_in(&Home::from_env()?, reference, &Fetch::default())
    }

    /// Like [`Self::open`], in the given home and with options.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub fn open_in(home: &Home, reference: &str, fetch: &Fetch<'_>) -> Result<Self, RuntimeError> {
        let parsed = Reference::parse_with_aliases(reference)?;
        let store = Store::open(&home.images())?;
        let stored = match fetch.anew {
            true => store.pull(&parsed, &fetch.options)?,
            false => store.open_image(&parsed, &fetch.options)?,
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

    /// Returns the reference by which it was opened.
    #[must_use]
    pub fn reference(&self) -> &str {
        &self.reference
    }

    /// Returns the digest of its manifest.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Returns the platform of its programs.
    #[must_use]
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Returns the home whose store contains it.
    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// Returns an error if VMs of this host cannot run it.
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

    /// Returns its configuration of the process.
    #[must_use]
    pub fn defaults(&self) -> &ImageDefaults {
        &self.defaults
    }

    pub(crate) fn segments(&self) -> &[DiskSegment] {
        &self.segments
    }
}

/// Extracts the defaults of the process from an image's configuration.
fn defaults(config: &ImageConfig) -> ImageDefaults {
    let Some(config) = &config.config else {
        return ImageDefaults::default();
    };
    ImageDefaults {
        entrypoint: config.entrypoint.clone().unwrap_or_default(),
        cmd: config.cmd.clone().unwrap_or_default(),
        env: config.env.clone().unwrap_or_default(),
        user: config.user.clone().unwrap_or_default(),
        working_dir: config.working_dir.clone().unwrap_or_default(),
        stop_signal: config.stop_signal.clone(),
    }
}
