//! What whoever waits for an image gets to know.

use crate::digest::Digest;

/// A step on the way of an image into the store, or out of it. Told from any
/// thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// One of the image's layers has come further.
    Layer {
        /// Which one, from 1 on.
        number: usize,
        /// How many there are.
        of: usize,
        /// Its digest, as the manifest has it.
        digest: Digest,
        /// What about it.
        step: LayerStep,
    },
    /// Why nothing happens for a while, or what was decided; a sentence for people.
    Notice(&'a str),
}

/// How far a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerStep {
    /// Bytes of the layer as it is stored elsewhere have been read, or sent.
    Moving {
        /// So many.
        done: u64,
        /// Of so many, when known.
        total: Option<u64>,
    },
    /// It is complete.
    Done,
    /// It was there already.
    Present,
}

/// Takes reports of progress. Runs on threads that have other things to do: short.
pub type Report<'a> = &'a (dyn Fn(Progress<'_>) + Sync);
