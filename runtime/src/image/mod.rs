//! Images in the public API.

mod store;
mod users;

use sm_control::config::HealthCheck;
use sm_control::launch::DiskSegment;
use sm_control::workload::ImageDefaults;
pub use sm_image::{
    Cancel, Config, Digest, Error as ImageError, ErrorKind as ImageErrorKind, ImageDetails,
    ImageSummary, ImageUsage, LayerDetails, LayerStep, Loaded, Platform, Progress, PruneOptions,
    Pruned, PullOptions, Report, Usage, Verified,
};
use sm_image::{ImageConfig, Reference, Store, StoredImage};

pub use self::store::Images;
pub(crate) use self::store::docker_name;
use crate::events::{EventAction, EventLog, EventRecord, EventSubject};
use crate::sm::Sm;
use crate::{Error, Refusal};

/// Options for getting an image.
#[derive(Clone, Debug, Default)]
pub struct Fetch<'a> {
    refresh: bool,
    options: PullOptions<'a>,
}

impl<'a> Fetch<'a> {
    /// Creates options with platform, progress callback and other options of a pull.
    #[must_use]
    pub fn new(options: PullOptions<'a>) -> Self {
        Self {
            refresh: false,
            options,
        }
    }

    /// Asks the registry even if the store has the image.
    #[must_use]
    pub fn refresh(mut self, refresh: bool) -> Self {
        self.refresh = refresh;
        self
    }
}

/// An image in the local store, ready to be run; see [`Sm::image`].
#[derive(Clone, Debug)]
pub struct Image {
    sm: Sm,
    reference: String,
    digest: String,
    platform: Platform,
    defaults: ImageDefaults,
    segments: Vec<DiskSegment>,
    /// Keeps the disk in the store until a VM has opened it.
    _stored: StoredImage,
}

impl Sm {
    /// Opens an image, which is pulled into the store first if it is not there.
    ///
    /// # Errors
    /// The reference is invalid, there is no such image, or it cannot be pulled.
    pub fn image(&self, reference: &str) -> Result<Image, Error> {
        self.image_with(reference, &Fetch::default())
    }

    /// Like [`Self::image`], with options of the pull.
    ///
    /// # Errors
    /// As for [`Self::image`].
    pub fn image_with(&self, reference: &str, fetch: &Fetch<'_>) -> Result<Image, Error> {
        Image::open(self, reference, fetch)
    }
}

impl Image {
    fn open(sm: &Sm, reference: &str, fetch: &Fetch<'_>) -> Result<Self, Error> {
        let parsed = Reference::parse_with_aliases(reference)?;
        let store = Store::open(&sm.home().images())?;
        let stored = match fetch.refresh {
            true => {
                let stored = store.pull(&parsed, &fetch.options)?;
                let digest = stored.digest.to_string();
                let (subject, action) = (EventSubject::Image, EventAction::Pull);
                let event = EventRecord::now(subject, action, &digest, reference);
                EventLog::of(sm.home()).note(&event);
                stored
            }
            false => store.open_image(&parsed, &fetch.options)?,
        };
        Ok(Self::of(sm, reference, stored))
    }

    fn of(sm: &Sm, reference: &str, stored: StoredImage) -> Self {
        let segments = segments(&stored);
        Self {
            sm: sm.clone(),
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

    /// Returns the handle that opened it.
    pub(crate) fn sm(&self) -> &Sm {
        &self.sm
    }

    /// Returns an error if VMs of this host cannot run it.
    pub(crate) fn check_platform(&self) -> Result<(), Refusal> {
        match self.platform.is_host() {
            true => Ok(()),
            false => Err(Refusal::Platform {
                image: self.reference.clone(),
                platform: self.platform.clone(),
            }),
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

/// Converts the health check of an image; `None` if it has none, or an unknown kind.
fn health_check(image: &sm_image::Healthcheck) -> Option<HealthCheck> {
    let millis = |nanoseconds: i64, default: u64| match u64::try_from(nanoseconds) {
        Ok(0) | Err(_) => default,
        Ok(nanoseconds) => (nanoseconds / 1_000_000).max(1),
    };
    let (kind, arguments) = image.test.as_deref()?.split_first()?;
    let check = match (kind.as_str(), arguments) {
        ("CMD", [_, ..]) => HealthCheck::new(arguments.to_vec()),
        ("CMD-SHELL", [line]) => HealthCheck::shell(line),
        _ => return None,
    };
    Some(HealthCheck {
        interval_ms: millis(image.interval, check.interval_ms),
        timeout_ms: millis(image.timeout, check.timeout_ms),
        start_period_ms: millis(image.start_period, 0),
        retries: u32::try_from(image.retries)
            .ok()
            .filter(|retries| *retries > 0)
            .unwrap_or(check.retries),
        ..check
    })
}

/// Returns the segments of an image's root disk.
pub(crate) fn segments(stored: &StoredImage) -> Vec<DiskSegment> {
    let segments = stored.segments.iter().map(|segment| DiskSegment {
        path: segment.path.clone(),
        offset: segment.offset,
        len: segment.len,
    });
    segments.collect()
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
        volumes: config.volumes.iter().flatten().cloned().collect(),
        health: config.healthcheck.as_ref().and_then(health_check),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(json: &str) -> Option<HealthCheck> {
        health_check(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn health_checks_of_images_have_dockers_meaning() {
        let check = converted(
            r#"{"Test": ["CMD-SHELL", "curl -f localhost"], "Interval": 5000000000,
                "Timeout": 100, "StartPeriod": 2000000, "Retries": 2}"#,
        );
        let expected = HealthCheck {
            interval_ms: 5000,
            timeout_ms: 1,
            start_period_ms: 2,
            retries: 2,
            ..HealthCheck::shell("curl -f localhost")
        };
        assert_eq!(check, Some(expected));
        let plain = converted(r#"{"Test": ["CMD", "true", "x"], "Interval": -1}"#);
        let expected = HealthCheck::new(vec!["true".to_owned(), "x".to_owned()]);
        assert_eq!(plain, Some(expected));
        for none in [
            "{}",
            r#"{"Test": []}"#,
            r#"{"Test": ["NONE"]}"#,
            r#"{"Test": ["CMD"]}"#,
            r#"{"Test": ["CMD-SHELL", "a", "b"]}"#,
        ] {
            assert_eq!(converted(none), None, "{none}");
        }
    }
}
