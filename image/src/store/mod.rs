//! The content store: converted layers and disks, shared by all images.
//!
//! ```text
//! lock                    shared by whoever looks for something or notes what it
//!                         needs, exclusive for whoever removes; never held for long
//! locks/                  one for each thing that is being made
//! tmp/                    what is being made, by work that goes on; see `work`
//! layers/<diff_id>/       blob, small, index, skeleton
//! disks/<image digest>/   meta.erofs, image.json
//! blobs/<digest>          manifests, configurations; layers as a registry had them
//! refs/<hash>.json        names of images
//! ```
//!
//! Invariant: what has its final name is complete and on disk. It is made under
//! `tmp`, synced, and renamed. Two processes never make the same thing: the
//! second one waits and finds it made. (Layers in `blobs` are not synced: they are
//! wanted for pushing and saving only, and checked by their digests then.)
//!
//! Disks in use are not removed: whoever uses one holds a shared `flock` on its
//! `meta.erofs` ([`DiskSegment::open`]).

mod collect;
mod export;
mod files;
mod import;
mod load;
mod names;
mod pull;
mod push;
mod record;
mod save;
mod usage;
mod verify;
mod work;

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;
use rustix::fs::{FlockOperation, flock};

pub use self::collect::{FindUsers, PruneOptions, Pruned, Users};
pub use self::load::Loaded;
pub use self::names::ImageSummary;
pub use self::pull::PullOptions;
pub use self::record::{ImageDetails, LayerDetails};
pub use self::usage::{ImageUsage, Usage};
pub use self::verify::Verified;
use crate::Error;
use crate::digest::Digest;
use crate::limits::Limits;
use crate::platform::Platform;

/// Version of everything the store writes; other versions are made again.
const FORMAT: u32 = 4;

/// A part of a disk: bytes of one file, in disk order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSegment {
    /// The file.
    pub path: PathBuf,
    /// First byte.
    pub offset: u64,
    /// Length in bytes; a multiple of 4096.
    pub len: u64,
}

impl DiskSegment {
    /// Opens the file for reading. The store removes neither it nor any other
    /// part of its disk while the first segment is open in this way, in any
    /// process.
    ///
    /// # Errors
    /// The file cannot be opened or locked.
    pub fn open(&self) -> Result<File, Error> {
        let file = File::open(&self.path).map_err(Error::file("open", &self.path))?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockShared))
            .map_err(|errno| Error::file("lock", &self.path)(errno.into()))?;
        // It may have been removed while it was waited for.
        if !files::is_at(&file, &self.path) {
            return Err(Error::file("open", &self.path)(
                std::io::ErrorKind::NotFound.into(),
            ));
        }
        Ok(file)
    }
}

/// An image in the store. It is not removed from there while this lives.
#[derive(Clone, Debug)]
pub struct StoredImage {
    /// Digest of its manifest (of its configuration, where there is no manifest).
    pub digest: Digest,
    /// Its configuration.
    pub config: ImageConfiguration,
    /// Its root disk: an EROFS file system over these, one after another.
    pub segments: Vec<DiskSegment>,
    /// Keeps the disk in the store.
    _in_use: Arc<File>,
}

impl StoredImage {
    /// What its programs run on.
    #[must_use]
    pub fn platform(&self) -> Platform {
        Platform::of(&self.config)
    }

    /// Returns true if it is for the platform that is wanted.
    fn serves(&self, platform: Option<&Platform>) -> bool {
        platform.is_none_or(|wanted| wanted.accepts(&self.platform()))
    }
}

/// The store of one user.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    /// For what is being made.
    tmp: PathBuf,
    limits: Limits,
}

impl Store {
    /// Opens the store at `root`, making it if there is none.
    ///
    /// # Errors
    /// Its directories cannot be made.
    pub fn open(root: &Path) -> Result<Self, Error> {
        for name in ["locks", "tmp", "layers", "disks", "blobs", "refs"] {
            let path = root.join(name);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(Error::file("create directory", &path))?;
        }
        Ok(Self {
            root: root.to_owned(),
            tmp: root.join("tmp"),
            limits: Limits::default(),
        })
    }

    /// The same store, with other limits for what it takes in.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}
