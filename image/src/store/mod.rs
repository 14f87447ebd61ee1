//! The content store: converted layers and disks, shared by all images.
//!
//! ```text
//! lock                    shared for lookups and for recording needs, exclusive for
//!                         removal; never held for long
//! locks/                  one lock file for each object being created
//! tmp/                    objects being created by running operations; see `work`
//! layers/<diff_id>/       blob, small, index, skeleton
//! disks/<image digest>/   meta.erofs, image.json
//! blobs/<digest>          manifests, configurations, and original layers of registries
//! refs/<hash>.json        names of images
//! ```
//!
//! Invariant: an object with its final name is complete and synced. It is created below
//! `tmp`, synced and renamed. Two processes never create the same object: the second one
//! waits and finds it. (Original layers in `blobs` are not synced, because they are only
//! needed for pushing and saving, which check their digests.)
//!
//! Disks in use are not removed: every user of a disk holds a shared `flock` on its
//! `meta.erofs` ([`StoredSegment::open`]). The file is opened under a shared `flock` on the
//! directory `disks`. A removal holds that lock exclusively, so that no disk is opened
//! between its check and its removal.

mod collect;
mod commit;
mod damaged;
#[cfg(any(feature = "archive", feature = "registry"))]
mod export;
mod files;
mod import;
#[cfg(feature = "archive")]
mod load;
mod names;
mod options;
mod pull;
#[cfg(feature = "registry")]
mod push;
mod record;
#[cfg(feature = "archive")]
mod save;
mod usage;
mod verify;
mod work;
#[cfg(any(feature = "archive", feature = "registry"))]
mod written;

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};

pub use self::collect::{FindUsers, PruneOptions, Pruned, Users};
pub use self::commit::Commit;
#[cfg(feature = "archive")]
pub use self::load::Loaded;
pub use self::names::ImageSummary;
pub use self::options::PullOptions;
pub use self::record::{ImageDetails, LayerDetails};
pub use self::usage::{ImageUsage, Usage};
pub use self::verify::Verified;
use crate::Error;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::limits::Limits;
use crate::platform::Platform;

/// Version of all formats in the store. Objects of other versions are created again.
const FORMAT: u32 = 4;

/// A segment of a disk: a range of bytes of one file. Segments are in disk order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSegment {
    /// Path of the file.
    pub path: PathBuf,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Length in bytes; a multiple of 4096.
    pub len: u64,
}

impl StoredSegment {
    /// Opens the file for reading. While the first segment of a disk is open in any
    /// process, the store does not remove any part of the disk.
    ///
    /// # Errors
    /// The file cannot be opened or locked.
    pub fn open(&self) -> Result<File, Error> {
        let _opening = match self.path.ancestors().nth(2) {
            Some(parts) if !parts.as_os_str().is_empty() => {
                Some(files::lock_opening(parts, FlockOperation::LockShared)?)
            }
            _ => None,
        };
        let file = File::open(&self.path).map_err(Error::file("open", &self.path))?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockShared))
            .map_err(|errno| Error::file("lock", &self.path)(errno.into()))?;
        // The file may have been removed before it was locked.
        if !files::is_at(&file, &self.path).map_err(Error::file("look at", &self.path))? {
            return Err(Error::file("open", &self.path)(
                std::io::ErrorKind::NotFound.into(),
            ));
        }
        Ok(file)
    }
}

/// An image in the store, which is not removed during the lifetime of this value.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StoredImage {
    /// Digest of its manifest, or of its configuration if there is no manifest.
    pub digest: Digest,
    /// Its configuration.
    pub config: ImageConfig,
    /// Its root disk: the concatenation of these segments contains an EROFS file system.
    pub segments: Vec<StoredSegment>,
    /// Prevents removal of the disk.
    _in_use: Arc<File>,
}

impl StoredImage {
    /// Returns the image's platform.
    #[must_use]
    pub fn platform(&self) -> Platform {
        Platform::of(&self.config)
    }

    /// Returns true if the image can be used for the requested platform.
    fn serves(&self, platform: Option<&Platform>) -> bool {
        platform.is_none_or(|wanted| wanted.accepts(&self.platform()))
    }
}

/// The image store of a user.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    /// Directory for objects being created.
    tmp: PathBuf,
    limits: Limits,
}

impl Store {
    /// Opens the store at `root`, and creates it if it does not exist.
    ///
    /// # Errors
    /// Its directories cannot be created.
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

    /// Returns the same store with other limits for new images.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}
