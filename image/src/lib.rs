//! Converts OCI and Docker images to EROFS disks in a crash-safe content store.
//!
//! | module | content |
//! |---|---|
//! | `source` | registries, engines, storages, archives and directories |
//! | `documents`, `reference`, `platform` | JSON of images, their names, choosing one of several |
//! | `layer`, `pipeline` | conversion of a layer: digests, decompression, entries and whiteouts |
//! | `blob`, `index`, `skeleton` | the parts of a converted layer |
//! | `tree` | the layers of an image merged: whiteouts, opaque directories and links applied |
//! | `erofs` | the metadata image |
//! | `store` | files, locks, pulling, pushing, verifying, removing |
//! | `limits` | limits on hostile images |
//!
//! A layer is converted once ([`Store`]) to a *blob* of file contents at 4 KiB boundaries
//! and an *index* of everything else. An image is then an EROFS *metadata image* whose
//! inodes refer to the blobs of its layers. The metadata image and the blobs together are
//! the read-only disk that a guest mounts.
//!
//! # Features
//!
//! All are enabled by default. Without any, images come from OCI layouts (`oci:`),
//! directories (`rootfs:`) and tar streams ([`Store::import`]).
//!
//! | feature | sources |
//! |---|---|
//! | `archive` | `docker-archive:`, `oci-archive:`, `Store::load` and `Store::save` |
//! | `containers-storage` | `containers-storage:` |
//! | `engine` | `docker-daemon:`; includes `archive` |
//! | `registry` | names in registries, `Store::push`, `Reference::parse_with_aliases` |
//!
//! A reference to a source whose feature is disabled is parsed, and refused with
//! [`Error::Disabled`] when it is opened.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod blob;
mod builder;
mod cancel;
mod config;
mod digest;
mod docker_reference;
mod documents;
mod erofs;
mod error;
#[cfg(any(feature = "fuzzing", test))]
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod layer;
mod limits;
mod pipeline;
mod platform;
mod progress;
mod reference;
mod skeleton;
mod source;
mod store;
mod tree;

pub use builder::{Compression, LayoutBuilder, MemoryFile};
pub use cancel::Cancel;
pub use config::{Config, Healthcheck, History, ImageConfig, RootFs};
pub use digest::Digest;
pub use docker_reference::DockerReference;
pub use error::{Cause, Error, ErrorKind};
pub use limits::Limits;
pub use platform::Platform;
pub use progress::{LayerStep, Progress, Report};
pub use reference::Reference;
#[cfg(feature = "registry")]
pub use source::{OpenBlob, Pushed, Pusher};
#[cfg(feature = "archive")]
pub use store::Loaded;
pub use store::{
    Commit, FindUsers, ImageDetails, ImageSummary, ImageUsage, LayerDetails, PruneOptions, Pruned,
    PullOptions, Store, StoredImage, StoredSegment, Usage, Users, Verified,
};
