//! Named volumes: disks that outlive VMs.
//!
//! `<data>/volumes/<name>/` contains `volume.json`, `lock` and `disk/`, the layers of a disk
//! ([`sm_vmm::disks`]) with an ext4 file system, of which VMs see the directory `data`.
//!
//! **Invariant: who writes to the disk of a volume holds its `lock` exclusively, who reads
//! it holds it shared**: two machines that write to one file system destroy it. The process
//! of a VM takes the lock, so that the kernel releases it however that process ends.
//!
//! The host never mounts or parses the file system, which guests control.

pub(crate) mod continued;
mod host;
mod mounts;
mod plan;
mod requests;
mod store;
#[cfg(test)]
mod tests;
mod tree;
mod users;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sm_vmm::disks::DiskError;
use thiserror::Error;

pub(crate) use self::host::warnings;
pub use self::mounts::Mount;
pub(crate) use self::plan::{MountPlan, VolumesOf, plan};
pub(crate) use self::requests::requests;
pub use self::users::PrunedVolumes;
use crate::error::kind_of_io;
use crate::sm::Sm;
use crate::{Error, ErrorKind};

/// Size in bytes of a volume for which none is requested: 64 GiB. Only what is written takes
/// space on the host.
pub const DEFAULT_VOLUME_BYTES: u64 = 64 << 30;
/// Smallest volume in bytes.
pub const MIN_VOLUME_BYTES: u64 = 16 << 20;
/// Largest volume in bytes.
pub const MAX_VOLUME_BYTES: u64 = 8 << 40;

/// Failure of an operation on volumes.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// There is no volume of this name.
    #[error("no such volume: \"{0}\"")]
    NotFound(String),
    /// Another volume has the name.
    #[error("a volume named \"{0}\" exists already")]
    Exists(String),
    /// A name outside the permitted characters.
    #[error(
        "\"{0}\" is not a valid name of a volume: start with a letter or digit, then letters, digits, '_', '.' or '-', 64 at most"
    )]
    BadName(String),
    /// A size outside the permitted range.
    #[error(
        "no volume has {0} bytes: give a size from {min} MiB to {max} TiB",
        min = MIN_VOLUME_BYTES >> 20,
        max = MAX_VOLUME_BYTES >> 40
    )]
    Size(u64),
    /// A size for a directory.
    #[error("a volume that is a directory has no size of its own")]
    SizeOfDirectory,
    /// A directory cannot be copied in constant time.
    #[error("volume \"{0}\" is a directory: only disks can be cloned")]
    CloneOfDirectory(String),
    /// A VM, or another operation, uses it.
    #[error("volume \"{name}\" is in use{}", by.as_ref().map_or_else(String::new, |vm| format!(" by VM \"{vm}\"")))]
    InUse {
        /// The name.
        name: String,
        /// The name of the VM, if it is known.
        by: Option<String>,
    },
    /// Its description cannot be read.
    #[error("volume \"{name}\" is damaged: {reason}")]
    Damaged {
        /// The name.
        name: String,
        /// The cause.
        reason: String,
    },
    /// A file cannot be used.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Its disk cannot be used.
    #[error("cannot use the disk of volume \"{name}\"")]
    Disk {
        /// The name.
        name: String,
        /// The cause.
        #[source]
        source: DiskError,
    },
}

impl VolumeError {
    /// Returns its kind.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::Exists(_) => ErrorKind::AlreadyExists,
            Self::BadName(_)
            | Self::Size(_)
            | Self::SizeOfDirectory
            | Self::CloneOfDirectory(_) => ErrorKind::Invalid,
            Self::InUse { .. } => ErrorKind::Busy,
            Self::Damaged { .. } => ErrorKind::Damaged,
            Self::Io { source, .. }
            | Self::Disk {
                source: DiskError::Io { source, .. },
                ..
            } => kind_of_io(source),
            Self::Disk { .. } => ErrorKind::Damaged,
        }
    }
}

/// The storage of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VolumeKind {
    /// A sparse disk with a file system, to which one VM at a time writes.
    #[default]
    Disk,
    /// A directory of the host, which several VMs use at a time. Host and guest share its
    /// files; databases are slower on it than on a disk.
    #[serde(rename = "dir")]
    Directory,
}

impl VolumeKind {
    /// Returns its name, as in JSON: `disk` or `dir`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Directory => "dir",
        }
    }
}

/// Options of a new volume.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VolumeOptions {
    kind: VolumeKind,
    size: Option<u64>,
    labels: BTreeMap<String, String>,
    anonymous: bool,
}

impl VolumeOptions {
    /// Returns the defaults: [`DEFAULT_VOLUME_BYTES`], without labels.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the storage; the default is a disk.
    #[must_use]
    pub fn kind(mut self, kind: VolumeKind) -> Self {
        self.kind = kind;
        self
    }

    /// Sets the size in bytes of a disk, rounded up to a multiple of 4096; from [`MIN_VOLUME_BYTES`] to
    /// [`MAX_VOLUME_BYTES`].
    #[must_use]
    pub fn size(mut self, bytes: u64) -> Self {
        self.size = Some(bytes);
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(name.into(), value.into());
        self
    }
}

/// A volume.
///
/// ```
/// use sm_runtime::{Sm, VolumeOptions};
///
/// # fn main() -> Result<(), sm_runtime::Error> {
/// # let directory = tempfile::tempdir().expect("a temporary directory");
/// let sm = Sm::builder().below(directory.path()).build()?;
/// let volume = sm.volumes().create(Some("db"), &VolumeOptions::new().size(1 << 30))?;
/// assert_eq!((volume.name(), volume.size_bytes()), ("db", Some(1 << 30)));
/// assert!(volume.disk_bytes().is_some_and(|bytes| bytes < 1 << 20));
/// sm.volumes().remove("db")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Volume {
    name: String,
    #[serde(rename = "type")]
    kind: VolumeKind,
    size_bytes: Option<u64>,
    disk_bytes: Option<u64>,
    created_ns: u64,
    labels: BTreeMap<String, String>,
    anonymous: bool,
    #[serde(rename = "mountpoint")]
    path: PathBuf,
}

impl Volume {
    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns its storage.
    #[must_use]
    pub fn kind(&self) -> VolumeKind {
        self.kind
    }

    /// Returns its size in bytes, as its file system has it; `None` for a directory, which has
    /// the space of the host's file system.
    #[must_use]
    pub fn size_bytes(&self) -> Option<u64> {
        self.size_bytes
    }

    /// Returns the space in bytes that its own layers took on the host when this value was
    /// made; `None` for a directory, all of which would have to be read.
    #[must_use]
    pub fn disk_bytes(&self) -> Option<u64> {
        self.disk_bytes
    }

    /// Returns its creation time.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.created_ns)
    }

    /// Returns its labels.
    #[must_use]
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// Returns true if it was created for one VM and has a generated name.
    #[must_use]
    pub fn is_anonymous(&self) -> bool {
        self.anonymous
    }

    /// Returns its directory: that of the files, or that of the disk.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

/// The volumes of a user; see [`Sm::volumes`].
#[derive(Clone, Debug)]
pub struct Volumes {
    sm: Sm,
}

impl Sm {
    /// Returns all volumes.
    #[must_use]
    pub fn volumes(&self) -> Volumes {
        Volumes { sm: self.clone() }
    }
}

impl Volumes {
    /// Creates a volume. As in Docker, one that exists already is returned unchanged.
    ///
    /// # Errors
    /// An invalid name or size, or its files cannot be written.
    pub fn create(&self, name: Option<&str>, options: &VolumeOptions) -> Result<Volume, Error> {
        Ok(self.store()?.create(name, options)?)
    }

    /// Returns a volume.
    ///
    /// # Errors
    /// There is none of this name, or it is damaged.
    pub fn get(&self, name: &str) -> Result<Volume, Error> {
        Ok(self.store()?.get(name)?)
    }

    /// Returns the names of all volumes, in order. Their files are not read.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        Ok(self.store()?.names()?)
    }

    /// Returns all volumes, by name, and the errors of those that cannot be read.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn list(&self) -> Result<(Vec<Volume>, Vec<VolumeError>), Error> {
        Ok(self.store()?.list()?)
    }

    /// Creates a volume with the content of another one, which is not copied: both share it
    /// until they change it. It takes the same time for every size.
    ///
    /// # Errors
    /// A VM uses the source, which is a disk, or the name is taken.
    pub fn copy(&self, source: &str, name: &str) -> Result<Volume, Error> {
        Ok(self.store()?.copy(source, name)?)
    }

    fn store(&self) -> Result<store::VolumeStore, Error> {
        Ok(store::VolumeStore::open(self.sm.home())?)
    }
}
