//! Options of importing images.

use std::num::NonZero;
use std::thread;

use crate::cancel::Cancel;
use crate::platform::Platform;
use crate::progress::{Progress, Report};

/// Maximum number of layers that are read concurrently, if there are enough CPUs: one
/// more than Docker downloads.
const MAX_CONCURRENT: usize = 4;

/// Options of importing an image into the store.
#[derive(Clone)]
#[non_exhaustive]
pub struct PullOptions<'a> {
    /// Platform to select if the image is for several. The default is Linux on this
    /// host's architecture.
    pub platform: Option<Platform>,
    /// Callback for progress reports.
    pub report: Report<'a>,
    /// Cancels the operation.
    pub cancel: Cancel,
    /// Maximum number of layers that are read concurrently.
    pub max_concurrent: NonZero<usize>,
    /// Store the original layers of registries in addition to the converted ones, so that
    /// pushing and saving produce the same bytes.
    pub store_compressed: bool,
}

impl Default for PullOptions<'_> {
    fn default() -> Self {
        let cpus = thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
        Self {
            platform: None,
            report: &|_| {},
            cancel: Cancel::new(),
            max_concurrent: cpus.min(NonZero::new(MAX_CONCURRENT).unwrap_or(cpus)),
            store_compressed: true,
        }
    }
}

impl<'a> PullOptions<'a> {
    /// Returns the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the field `platform`.
    #[must_use]
    pub fn platform(self, platform: impl Into<Option<Platform>>) -> Self {
        Self {
            platform: platform.into(),
            ..self
        }
    }

    /// Sets the field `report`.
    #[must_use]
    pub fn report(self, report: Report<'a>) -> Self {
        Self { report, ..self }
    }

    /// Sets the field `cancel`.
    #[must_use]
    pub fn cancel(self, cancel: Cancel) -> Self {
        Self { cancel, ..self }
    }

    /// Sets the field `max_concurrent`.
    #[must_use]
    pub fn max_concurrent(self, max_concurrent: NonZero<usize>) -> Self {
        Self {
            max_concurrent,
            ..self
        }
    }

    /// Sets the field `store_compressed`.
    #[must_use]
    pub fn store_compressed(self, store_compressed: bool) -> Self {
        Self {
            store_compressed,
            ..self
        }
    }
}

impl std::fmt::Debug for PullOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PullOptions")
            .field("platform", &self.platform)
            .field("max_concurrent", &self.max_concurrent)
            .field("store_compressed", &self.store_compressed)
            .finish_non_exhaustive()
    }
}

impl PullOptions<'_> {
    /// Returns a copy with its own cancellation: a failing layer cancels the other
    /// layers, but not other operations of the caller.
    pub(super) fn child(&self) -> Self {
        Self {
            cancel: self.cancel.child(),
            ..self.clone()
        }
    }

    pub(super) fn message(&self) -> impl Fn(&str) {
        |text| (self.report)(Progress::Message(text))
    }
}
