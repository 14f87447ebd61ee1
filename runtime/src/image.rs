//! Images, as this library's callers see them.

use std::path::Path;

use thiserror::Error;

use crate::Error as RuntimeError;
use crate::home::Home;
use crate::launch::DiskSegment;
use crate::run::{RunOptions, start};
use crate::vm::Vm;
use crate::workload::ImageDefaults;

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Not there yet.
    #[error("unknown image \"{0}\"")]
    Unknown(String),
}

/// An image in the local store, ready to be run.
#[derive(Clone, Debug)]
pub struct Image {
    home: Home,
    reference: String,
    digest: String,
    defaults: ImageDefaults,
    segments: Vec<DiskSegment>,
}

impl Image {
    /// Starts a VM from this image and returns once its workload runs.
    ///
    /// # Errors
    /// See [`RuntimeError`]; nothing is left behind, except the record of a VM
    /// whose command could not be run.
    pub fn run(&self, options: RunOptions) -> Result<Vm, RuntimeError> {
        start(&self.home, self, options)
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

    /// What its configuration says about running it.
    #[must_use]
    pub fn defaults(&self) -> &ImageDefaults {
        &self.defaults
    }

    pub(crate) fn segments(&self) -> &[DiskSegment] {
        &self.segments
    }

    /// Opens.
    ///
    /// # Errors
    /// Always, for now.
    pub fn open_in(home: &Home, reference: &str) -> Result<Self, ImageError> {
        let _ = (home, Path::new(reference));
        Err(ImageError::Unknown(reference.to_owned()))
    }
}
