//! The disk of a volume in use by a VM.
//!
//! A volume's directory has `lock` and `disk/`. **Invariant: who writes to the disk, or adds
//! a layer, holds the lock exclusively; who reads it holds the lock shared.**

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sm_control::id::{VmId, is_valid_name};
use sm_vmm_core::virtio::layered::LayeredDisk;

use super::{DiskDirectory, DiskError, io_error};

/// Mark in the lock file, after the name of the VM, which is about to end.
const ENDING: &str = "\nending\n";

/// Time limit for such an end. A guest has a minute to write its disks back.
const END_TIMEOUT: Duration = Duration::from_secs(70);

/// A volume that a VM uses. Its lock is released when this is dropped.
#[derive(Debug)]
pub(crate) struct UsedVolume {
    pub(crate) directory: DiskDirectory,
    pub(crate) disk: LayeredDisk,
    pub(crate) lock: File,
}

/// A VM that writes to a volume, as the lock file names it: by its name on one line and its
/// identifier, which stays when the VM gets another name, on the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VolumeWriter<'a> {
    pub(crate) name: &'a str,
    pub(crate) id: &'a str,
}

/// The use of a volume.
#[derive(Clone, Copy, Debug)]
pub(crate) enum VolumeUse<'a> {
    /// A VM writes to it.
    Write(&'a VolumeWriter<'a>),
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

/// Takes the lock; false if another VM holds it. If that is about to end, its end is waited
/// for: its clients know already that it has ended.
fn wait_for_lock(file: &File, path: &Path, operation: FlockOperation) -> Result<bool, DiskError> {
    let at_once = match operation {
        FlockOperation::LockShared => FlockOperation::NonBlockingLockShared,
        _ => FlockOperation::NonBlockingLockExclusive,
    };
    if try_lock(file, path, at_once)? {
        return Ok(true);
    }
    if !is_ending(path) {
        // It may have ended in between.
        return try_lock(file, path, at_once);
    }
    // flock(2) has no time limit. The thread locks the same open file; after a failure this
    // process ends, and the thread with it.
    let waiting = file.try_clone().map_err(io_error("open", path))?;
    let (locked, is_locked) = channel();
    let spawned = std::thread::Builder::new()
        .name("volume".to_owned())
        .spawn(move || {
            let result = rustix::io::retry_on_intr(|| flock(&waiting, operation));
            // Without a receiver the time is over.
            let _ = locked.send(result);
        });
    spawned.map_err(io_error("wait for", path))?;
    match is_locked.recv_timeout(END_TIMEOUT) {
        Ok(result) => result
            .map(|()| true)
            .map_err(|errno| io_error("lock", path)(errno.into())),
        Err(_) => Ok(false),
    }
}

/// Marks the volume as that of a VM that is about to end and to release the lock, which the
/// caller holds exclusively.
pub(crate) fn mark_as_ending(mut lock: &File) -> io::Result<()> {
    lock.write_all(ENDING.as_bytes())
}

fn is_ending(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.ends_with(ENDING))
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
            if !wait_for_lock(&lock, &path, FlockOperation::LockExclusive)? {
                return Ok(None);
            }
            // For messages to those who want it, too.
            lock.set_len(0)
                .and_then(|()| write!(lock, "{}\n{}", vm.name, vm.id))
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
            if wait_for_lock(&lock, &path, FlockOperation::LockExclusive)? {
                lock.set_len(0).map_err(io_error("write", &path))?;
                directory.frozen()?;
            }
            if !wait_for_lock(&lock, &path, FlockOperation::LockShared)? {
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

/// Returns the VM that writes to a volume, or has last written to it, by the volume's lock
/// file: its name at the start of that, and its identifier if the file has it.
#[must_use]
pub fn writer(lock: &Path) -> Option<(String, Option<VmId>)> {
    let text = std::fs::read_to_string(lock).ok()?;
    let mut lines = text.lines();
    let name = lines.next().filter(|name| is_valid_name(name))?;
    Some((name.to_owned(), lines.next().and_then(VmId::parse)))
}
