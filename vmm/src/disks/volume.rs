//! The disk of a volume in use by a VM.
//!
//! A volume's directory has `lock` and `disk/`. **Invariant: who writes to the disk, or adds
//! a layer, holds the lock exclusively; who reads it holds the lock shared.**

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sm_vmm_core::virtio::layered::LayeredDisk;

use super::{DiskDirectory, DiskError, io_error};

/// A volume that a VM uses. Its lock is released when this is dropped.
#[derive(Debug)]
pub(crate) struct UsedVolume {
    pub(crate) directory: DiskDirectory,
    pub(crate) disk: LayeredDisk,
    pub(crate) lock: File,
}

/// The use of a volume.
#[derive(Clone, Copy, Debug)]
pub(crate) enum VolumeUse<'a> {
    /// The VM of this name writes to it.
    Write(&'a str),
    /// The VM reads it. Its own changes, which a file system makes although it is mounted for
    /// reading, go to a disk in this directory, which is created.
    Read(&'a DiskDirectory),
}

fn try_lock(file: &File, path: &Path, operation: FlockOperation) -> Result<bool, DiskError> {
    match rustix::io::retry_on_intr(|| flock(file, operation)) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(io_error("lock", path)(errno.into())),
    }
}

/// Locks and opens the volume in `volume`; `None` if another VM uses it in a way that
/// excludes this one.
///
/// # Errors
/// Its files cannot be used.
pub(crate) fn open(volume: &Path, how: VolumeUse<'_>) -> Result<Option<UsedVolume>, DiskError> {
    let path = volume.join("lock");
    let mut lock = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io_error("open", &path))?;
    let directory = DiskDirectory::at(volume.join("disk"));
    match how {
        VolumeUse::Write(vm) => {
            if !try_lock(&lock, &path, FlockOperation::NonBlockingLockExclusive)? {
                return Ok(None);
            }
            // For messages to those who want it, too.
            lock.set_len(0)
                .and_then(|()| lock.write_all(vm.as_bytes()))
                .map_err(io_error("write", &path))?;
            let disk = directory.open()?;
            Ok(Some(UsedVolume {
                directory,
                disk,
                lock,
            }))
        }
        VolumeUse::Read(own) => {
            // The first reader makes the topmost layer an immutable one.
            if try_lock(&lock, &path, FlockOperation::NonBlockingLockExclusive)? {
                lock.set_len(0).map_err(io_error("write", &path))?;
                let disk = directory.open()?;
                if !disk.is_unchanged() {
                    let grown = directory.grow(&disk)?;
                    grown.flush().map_err(io_error("write back", &path))?;
                }
            }
            if !try_lock(&lock, &path, FlockOperation::NonBlockingLockShared)? {
                return Ok(None);
            }
            let mut below = directory.layers()?;
            if !directory.open()?.is_unchanged() {
                // Between the two locks, another VM wrote to it and ended.
                return Ok(None);
            }
            below.pop();
            own.remove()?;
            let disk = own.create(&below)?;
            Ok(Some(UsedVolume {
                directory: own.clone(),
                disk,
                lock,
            }))
        }
    }
}

/// Returns the name of the VM that writes to the volume in `volume`, if it is known.
pub(crate) fn writer(volume: &Path) -> Option<String> {
    let text = std::fs::read_to_string(volume.join("lock")).ok()?;
    let name = text.trim();
    sm_control::id::is_valid_name(name).then(|| name.to_owned())
}
