//! Images, as this library's callers see them.

use serde::Serialize;
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

/// A step of bringing an image into the store.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What is being done, to what.
    pub what: &'a str,
    /// Bytes done.
    pub done: u64,
    /// Bytes to do, when known.
    pub total: Option<u64>,
}

/// An image in the local store.
#[derive(Clone, Debug, Serialize)]
pub struct ImageSummary {
    /// Digest of its manifest.
    pub id: String,
    /// The reference it was stored by.
    pub reference: String,
    /// Bytes it takes, layers shared with others included.
    pub size: u64,
    /// When it was stored, in nanoseconds since the Unix epoch.
    pub stored_ns: u64,
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
        let _ = (home, progress);
        Err(ImageError::Unknown(reference.to_owned()).into())
    }

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
}

/// All images in the store.
///
/// # Errors
/// The store cannot be read.
pub fn list(home: &Home) -> Result<Vec<ImageSummary>, RuntimeError> {
    let _ = home;
    Ok(Vec::new())
}

/// Removes an image by reference, or by (the beginning of) its digest.
///
/// # Errors
/// There is none, or the store cannot be changed.
pub fn remove(home: &Home, query: &str) -> Result<(), RuntimeError> {
    let _ = home;
    Err(ImageError::Unknown(query.to_owned()).into())
}
