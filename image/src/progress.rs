//! Progress reports of image operations.

use crate::digest::Digest;

/// A progress event of importing or exporting an image. It can be reported from any
/// thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// Progress of a layer of the image.
    Layer {
        /// Number of the layer, from 1.
        number: usize,
        /// Number of layers.
        of: usize,
        /// Digest of the layer in the manifest.
        digest: Digest,
        /// The progress.
        step: LayerStep,
    },
    /// A sentence for users: the reason for a delay, or a decision.
    Message(&'a str),
}

/// Progress of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerStep {
    /// Bytes of the stored layer have been read or sent.
    Moving {
        /// Number of bytes so far.
        done: u64,
        /// Total number of bytes, if known.
        total: Option<u64>,
    },
    /// The layer is complete.
    Done,
    /// The layer already existed at the destination.
    Present,
}

/// Callback for progress events. It is called on worker threads and must return quickly.
pub type Report<'a> = &'a (dyn Fn(Progress<'_>) + Sync);
