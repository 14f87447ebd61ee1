//! The writable disks of a VM: directories of layers in its record.
//!
//! `<record>/disk-3/` has the layers of the disk in slot 3: `0` is the lowest one, the one
//! with the highest number is written to (see `chain` for gaps). All others are immutable, and
//! hard links to files that snapshots, other VMs or the store of templates have as well, so
//! that the file system counts their users: removing a VM or a snapshot is removing its own
//! names.
//!
//! **Invariant: no process writes to a layer that has a layer above it, and nobody links the
//! topmost one.**

mod chain;
pub(crate) mod merging;
mod template;
mod verify;
pub(crate) mod volume;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sm_control::id::random;
use sm_vmm_core::layout::{SLOT_DATA_DISK, SLOTS_VOLUMES};
use sm_vmm_core::virtio::layered::{DiskLayer, LayerError, LayerId, LayeredDisk};
use thiserror::Error;

use self::chain::{LayerFile, remove_file};

pub use self::template::Templates;
pub use self::verify::VerifiedDisks;
pub use self::volume::writer;

/// Number of volumes that a VM can mount as disks.
pub const MAX_VOLUME_DISKS: u32 = *SLOTS_VOLUMES.end() - *SLOTS_VOLUMES.start() + 1;

/// Failure to use the layers of a disk.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A file or directory cannot be used.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is no layer that fits.
    #[error("cannot use {path:?}")]
    Layer {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: LayerError,
    },
    /// No file system of this size can be made.
    #[error("cannot make a file system of {bytes} bytes")]
    Format {
        /// The size in bytes.
        bytes: u64,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io {
        operation,
        path,
        source,
    }
}

fn layer_error(path: &Path) -> impl FnOnce(LayerError) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Layer { path, source }
}

fn new_id() -> LayerId {
    random::<16>()
}

fn create(path: &Path) -> Result<File, DiskError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("create", path))
}

/// The directory of a disk's layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskDirectory {
    path: PathBuf,
}

impl DiskDirectory {
    /// Returns the disk in the directory `path`, which need not exist.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Returns the directory of the disk for changes to the root of the VM whose record is in
    /// `record`.
    #[must_use]
    pub fn of_root(record: &Path) -> Self {
        Self::new(record, SLOT_DATA_DISK)
    }

    /// Returns the directory for the disk in `slot` of the VM whose record is in `record`.
    pub(crate) fn new(record: &Path, slot: u32) -> Self {
        Self {
            path: record.join(format!("disk-{slot}")),
        }
    }

    /// Returns the path of the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns true if the VM has this disk, from an earlier run.
    ///
    /// # Errors
    /// The directory cannot be examined: it may exist.
    pub fn exists(&self) -> Result<bool, DiskError> {
        self.path
            .try_exists()
            .map_err(io_error("examine", &self.path))
    }

    /// Returns the space in bytes that this user has in its file system; `None` if that is
    /// unknown.
    pub(crate) fn free_bytes(&self) -> Option<u64> {
        let found = rustix::fs::statvfs(&self.path).ok()?;
        Some(found.f_bavail.saturating_mul(found.f_frsize))
    }

    fn layer(&self, number: usize) -> PathBuf {
        self.path.join(number.to_string())
    }

    /// Creates a disk over immutable layers, the lowest one first. The directory appears
    /// whole or not at all.
    ///
    /// # Errors
    /// A layer cannot be linked or copied, does not fit, or the directory exists.
    pub fn create(&self, below: &[PathBuf]) -> Result<LayeredDisk, DiskError> {
        let fresh = Self {
            path: self.path.with_extension("new"),
        };
        match fs::remove_dir_all(&fresh.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &fresh.path)(error));
            }
            _ => {}
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&fresh.path)
            .map_err(io_error("create directory", &fresh.path))?;
        let mut layers = Vec::with_capacity(below.len() + 1);
        for (number, source) in below.iter().enumerate() {
            let path = fresh.layer(number);
            link(source, &path)?;
            layers.push(open_layer(&path, false)?);
        }
        let path = fresh.layer(below.len());
        let lowest = layers.last().map(|layer| (layer.id(), layer.capacity()));
        let (id, capacity) = lowest
            .ok_or(LayerError::Count(0))
            .map_err(layer_error(&path))?;
        let top = DiskLayer::create(create(&path)?, new_id(), Some(id), capacity);
        layers.push(top.map_err(layer_error(&path))?);
        let disk = LayeredDisk::new(layers).map_err(layer_error(&self.path))?;
        fs::rename(&fresh.path, &self.path).map_err(io_error("create", &self.path))?;
        Ok(disk)
    }

    /// Opens the disk, and removes files that are no part of it. Nobody else may write to
    /// it.
    ///
    /// # Errors
    /// A layer is missing or damaged.
    pub fn open(&self) -> Result<LayeredDisk, DiskError> {
        let files = self.numbered()?;
        let chain = self.chain(&files)?;
        let highest = |files: Option<&LayerFile>| files.map(|file| file.number);
        let has_top = highest(files.first()) == highest(chain.last());
        self.sweep(&chain)?;
        let disk = self.open_files(&chain)?;
        match has_top {
            true => Ok(disk),
            false => self.grow(&disk),
        }
    }

    fn open_files(&self, files: &[LayerFile]) -> Result<LayeredDisk, DiskError> {
        let layers: Result<_, _> = files
            .iter()
            .enumerate()
            .map(|(place, file)| open_layer(&file.path, place + 1 == files.len()))
            .collect();
        LayeredDisk::new(layers?).map_err(layer_error(&self.path))
    }

    /// Adds a layer to `disk`, which is of this directory and is not written to any more.
    ///
    /// # Errors
    /// The file cannot be created, or there are too many layers.
    pub(crate) fn grow(&self, disk: &LayeredDisk) -> Result<LayeredDisk, DiskError> {
        let files = self.files_of(&disk.ids())?;
        let number = files.last().map_or(0, |top| top.number) + 1;
        let path = self.layer(number);
        // Left by a failure: a file that has no disk above this one is of no use.
        for left in self.numbered()? {
            if left.number >= number {
                remove_file(&left.path)?;
            }
        }
        let file = create(&path)?;
        let grown = disk.freeze(file, new_id(), disk.capacity());
        if grown.is_err() {
            remove_file(&path)?;
        }
        grown.map_err(layer_error(&path))
    }

    /// Removes all layers above `highest`, and returns the disk with a new top over it.
    ///
    /// # Errors
    /// A layer cannot be removed, opened or created.
    pub(crate) fn truncate(&self, highest: LayerId) -> Result<LayeredDisk, DiskError> {
        let mut chain = self.chain(&self.numbered()?)?;
        let mut above = Vec::new();
        while let Some(top) = chain.last()
            && chain::header(&top.path)?.id != highest
        {
            above.extend(chain.pop());
        }
        if chain.is_empty() {
            return Err(layer_error(&self.path)(LayerError::Order(above.len())));
        }
        // From the top, so that a failure leaves a disk.
        above
            .iter()
            .try_for_each(|layer| remove_file(&layer.path))?;
        let below = self.open_files(&chain)?;
        self.grow(&below)
    }

    /// Removes the disk, if there is one.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove(&self) -> Result<(), DiskError> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &self.path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Makes the disk a copy-on-write copy of this one, which nobody may use meanwhile. It
    /// takes the same time for every size.
    ///
    /// # Errors
    /// A layer cannot be opened, written back or linked, or `copy` exists.
    pub fn clone_to(&self, copy: &Self) -> Result<(), DiskError> {
        copy.create(&self.frozen()?).map(drop)
    }

    /// Makes all that was written immutable, and durable; returns the files, the lowest one
    /// first. Nobody may use the disk meanwhile.
    ///
    /// # Errors
    /// A layer cannot be opened, created or written back.
    pub(crate) fn frozen(&self) -> Result<Vec<PathBuf>, DiskError> {
        let mut disk = self.merge_if_full(self.open()?)?;
        if !disk.is_unchanged() {
            disk = self.grow(&disk)?;
        }
        disk.flush().map_err(io_error("write back", &self.path))?;
        let mut layers = self.layers_of(&disk)?;
        layers.pop();
        Ok(layers)
    }

    /// Returns the files of the layers, the lowest one first.
    ///
    /// # Errors
    /// The directory cannot be examined, or a layer is missing or damaged.
    pub fn layers(&self) -> Result<Vec<PathBuf>, DiskError> {
        let chain = self.chain(&self.numbered()?)?;
        Ok(chain.into_iter().map(|file| file.path).collect())
    }

    /// Returns the files of the layers of `disk`, which is of this directory, the lowest one
    /// first.
    ///
    /// # Errors
    /// The directory cannot be examined, or a layer is missing.
    pub(crate) fn layers_of(&self, disk: &LayeredDisk) -> Result<Vec<PathBuf>, DiskError> {
        let files = self.files_of(&disk.ids())?;
        Ok(files.into_iter().map(|file| file.path).collect())
    }
}

/// Opens a layer. Only the topmost one of a disk is written to.
fn open_layer(path: &Path, is_top: bool) -> Result<DiskLayer, DiskError> {
    let file = OpenOptions::new()
        .read(true)
        .write(is_top)
        .open(path)
        .map_err(io_error("open", path))?;
    DiskLayer::open(file).map_err(layer_error(path))
}

/// Gives an immutable file another name, or copies it if the names are in different file
/// systems.
///
/// # Errors
/// The file cannot be linked, nor copied.
pub(crate) fn link(source: &Path, target: &Path) -> Result<(), DiskError> {
    match fs::hard_link(source, target) {
        Ok(()) => Ok(()),
        // Another file system, one without hard links, or one with too many of this file.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::CrossesDevices
                    | io::ErrorKind::TooManyLinks
                    | io::ErrorKind::Unsupported
                    | io::ErrorKind::PermissionDenied
            ) =>
        {
            template::copy_sparse(source, target)
        }
        Err(error) => Err(io_error("link", source)(error)),
    }
}

#[cfg(test)]
mod tests;
