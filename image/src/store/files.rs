//! Files of the store: their paths, creation, publication and removal.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::thread;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Store;
use crate::Error;
use crate::digest::Digest;
use crate::index::{IndexReader, Totals};
use crate::skeleton::Assembler;

/// Number of bytes read of a stored layer after which the system is asked to write out
/// the converted data.
const WRITE_OUT: u64 = 8 << 20;
/// Lock file in a directory below `tmp`, held while the operation in the directory runs.
pub(super) const WORK_LOCK: &str = "lock";

impl Store {
    pub(super) fn layer_path(&self, diff_id: Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    pub(super) fn disk_path(&self, digest: Digest) -> PathBuf {
        self.root.join("disks").join(digest.hex())
    }

    pub(super) fn blob_path(&self, digest: Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }

    pub(super) fn ref_path(&self, reference: &str) -> PathBuf {
        let hash = Digest::of(reference.as_bytes()).hex();
        self.root.join("refs").join(format!("{hash}.json"))
    }

    /// Takes the lock of the store, shared or exclusive.
    pub(super) fn lock(&self, operation: FlockOperation) -> Result<File, Error> {
        let path = self.root.join("lock");
        let file = open_lock(&path)?;
        // Without users of the store, the directories below `tmp` belong to running
        // operations or are left from dead processes.
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            self.clear_tmp()?;
        }
        rustix::io::retry_on_intr(|| flock(&file, operation))
            .map_err(|errno| Error::file("lock", &path)(errno.into()))?;
        Ok(file)
    }

    /// Takes the exclusive lock of the store, unless another process uses the store.
    pub(super) fn try_lock_exclusive(&self) -> Result<Option<File>, Error> {
        let path = self.root.join("lock");
        let file = open_lock(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(Error::file("lock", &path)(errno.into())),
        }
    }

    /// Takes the lock for the creation of an object, and waits while another process
    /// creates the same one. `message` is called before a wait. The caller must not hold
    /// the store's lock, because the creator of an object needs it at times.
    pub(super) fn lock_creation(
        &self,
        what: &str,
        digest: Digest,
        message: &dyn Fn(&str),
    ) -> Result<File, Error> {
        let name = format!("{what}-{}", digest.hex());
        let path = self.root.join("locks").join(name);
        let failed = |errno: Errno| Error::file("lock", &path)(errno.into());
        loop {
            let file = open_lock(&path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    message(&format!(
                        "waiting for another process that creates {what} {digest}"
                    ));
                    rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                        .map_err(failed)?;
                }
                locked => locked.map_err(failed)?,
            }
            // The file may have been removed before it was locked.
            if is_at(&file, &path).map_err(Error::file("look at", &path))? {
                return Ok(file);
            }
        }
    }

    /// Removes lock files that no process holds.
    pub(super) fn clear_locks(&self) -> Result<(), Error> {
        for path in entries(&self.root.join("locks"))? {
            let file = open_lock(&path)?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                fs::remove_file(&path).map_err(Error::file("remove", &path))?;
            }
        }
        Ok(())
    }

    pub(super) fn temporary(&self) -> Result<tempfile::TempDir, Error> {
        let path = &self.tmp;
        tempfile::TempDir::new_in(path).map_err(Error::file("create a directory in", path))
    }

    /// Removes directories of dead processes. The caller holds the exclusive lock.
    pub(super) fn clear_tmp(&self) -> Result<(), Error> {
        for path in entries(&self.root.join("tmp"))? {
            if is_alive(&path)? {
                continue;
            }
            let removed = match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            match removed {
                // The owner of the directory is exiting.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(Error::file("remove", &path))?,
            }
        }
        Ok(())
    }

    /// Removes a published object atomically: it never exists partially under its final
    /// name. No file is created, because the disk may be full.
    pub(super) fn discard(&self, path: &Path) -> Result<(), Error> {
        let renamed = tempfile::Builder::new()
            .prefix("removed-")
            .make_in(&self.tmp, |tombstone| fs::rename(path, tombstone))
            .and_then(|tombstone| Ok(tombstone.into_temp_path().keep()?));
        let tombstone = renamed.map_err(Error::file("remove", path))?;
        // The object is removed already. Remaining files are cleared by a later process.
        let _ = match tombstone.is_dir() {
            true => fs::remove_dir_all(&tombstone),
            false => fs::remove_file(&tombstone),
        };
        Ok(())
    }

    /// Publishes a complete directory under its final name, and replaces an incomplete
    /// one.
    pub(super) fn publish(&self, created: tempfile::TempDir, path: &Path) -> Result<(), Error> {
        let failed = Error::file("publish", path);
        // Nothing is replaced before all of the replacement is on the disk.
        if let Err(error) = File::open(created.path()).and_then(|created| created.sync_all()) {
            return Err(failed(error));
        }
        // Only incomplete objects are created again. A rename over a directory succeeds
        // only if that directory is empty.
        if may_exist(path) {
            self.discard(path)?;
        }
        let published = fs::rename(created.path(), path).and_then(|()| sync_parent(path));
        match published {
            Ok(()) => {
                // The directory has been renamed, so there is nothing to clean up.
                let _ = created.keep();
                Ok(())
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Stores a document under its digest.
    pub(super) fn store_document(&self, digest: Digest, bytes: &[u8]) -> Result<(), Error> {
        let path = self.blob_path(digest);
        if fs::read(&path).is_ok_and(|known| known == bytes) {
            return Ok(());
        }
        self.write_file(&path, bytes)
    }

    /// Publishes a compressed layer. The caller has checked its digest, and has synced
    /// it.
    pub(super) fn store_blob(&self, digest: Digest, created: &Path) -> Result<(), Error> {
        let path = self.blob_path(digest);
        fs::rename(created, &path)
            .and_then(|()| sync_parent(&path))
            .map_err(Error::file("write", &path))
    }

    /// Writes a document under its final name.
    pub(super) fn write_json(&self, path: &Path, value: &impl Serialize) -> Result<(), Error> {
        let json = serde_json::to_vec(value).map_err(|error| Error::document("record", error))?;
        self.write_file(path, &json)
    }

    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let created = self.temporary()?;
        let fresh = created.path().join("file");
        write_synced(&fresh, bytes)?;
        fs::rename(&fresh, path)
            .and_then(|()| sync_parent(path))
            .map_err(Error::file("write", path))
    }

    /// Opens the tar stream of a stored layer.
    pub(super) fn assemble(&self, diff_id: Digest) -> Result<Assembler, Error> {
        let path = self.layer_path(diff_id);
        let stored = StoredLayer::open_published(path.clone())?;
        let (blob, small) = (stored.file("blob")?, stored.file("small")?);
        Assembler::new(stored.file("skeleton")?, blob, small).map_err(Error::file("read", &path))
    }

    /// Returns a stored document, if it is intact.
    pub(super) fn document(&self, digest: Digest) -> Result<Option<Vec<u8>>, Error> {
        let path = self.blob_path(digest);
        match fs::read(&path) {
            Ok(bytes) => Ok((Digest::of(&bytes) == digest).then_some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file("read", &path)(error)),
        }
    }
}

/// The files of a layer.
pub(super) struct StoredLayer {
    pub(super) path: PathBuf,
    pub(super) index: IndexReader,
}

impl StoredLayer {
    /// Opens a layer. Returns `None` if it is missing or incomplete.
    ///
    /// # Errors
    /// The files cannot be examined, which is no evidence of damage.
    pub(super) fn open(path: PathBuf) -> Result<Option<Self>, Error> {
        match Self::index_of_whole(&path) {
            Ok(index) => Ok(index.map(|index| Self { path, index })),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(Error::file("read", &path)(error)),
        }
    }

    /// Opens a layer that was published before.
    pub(super) fn open_published(path: PathBuf) -> Result<Self, Error> {
        Self::open(path.clone())?
            .ok_or_else(|| Error::file("read", &path)(io::ErrorKind::NotFound.into()))
    }

    /// Returns the index if all files have the lengths that it states.
    fn index_of_whole(path: &Path) -> io::Result<Option<IndexReader>> {
        let Some(index) = IndexReader::open(File::open(path.join("index"))?)? else {
            return Ok(None);
        };
        let totals = index.totals();
        let len = |name: &str| Ok::<_, io::Error>(fs::metadata(path.join(name))?.len());
        len("skeleton")?;
        let whole = len("blob")? == totals.blob_len && len("small")? == totals.small_len;
        Ok(whole.then_some(index))
    }

    pub(super) fn totals(&self) -> Totals {
        self.index.totals()
    }

    pub(super) fn file(&self, name: &str) -> Result<File, Error> {
        let path = self.path.join(name);
        File::open(&path).map_err(Error::file("open", &path))
    }
}

/// Returns true if an error proves that a file is missing or shorter than it should be.
/// All others, such as a lack of descriptors, say nothing about the file.
pub(super) fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::UnexpectedEof
    )
}

/// Returns true if a file exists or may exist.
pub(super) fn may_exist(path: &Path) -> bool {
    path.try_exists().unwrap_or(true)
}

/// Returns true if a process works in a directory below `tmp`.
pub(super) fn is_alive(directory: &Path) -> Result<bool, Error> {
    let path = directory.join(WORK_LOCK);
    match File::open(&path) {
        Ok(lock) => match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(Error::file("lock", &path)(errno.into())),
        },
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(Error::file("open", &path)(error)),
    }
}

/// Takes part in the opening of disks in the directory `disks`, or prevents it.
pub(super) fn lock_opening(disks: &Path, operation: FlockOperation) -> Result<File, Error> {
    let file = File::open(disks).map_err(Error::file("open", disks))?;
    rustix::io::retry_on_intr(|| flock(&file, operation))
        .map_err(|errno| Error::file("lock", disks)(errno.into()))?;
    Ok(file)
}

fn open_lock(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("open", path))
}

/// Returns true if the open file is the one at `path`.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let named = match fs::metadata(path) {
        Err(error) if is_absence(&error) => return Ok(false),
        named => named?,
    };
    let file = file.metadata()?;
    Ok((file.dev(), file.ino()) == (named.dev(), named.ino()))
}

/// Returns true if a process has the disk open through [`super::StoredSegment::open`].
pub(super) fn in_use(disk: &Path) -> bool {
    File::open(disk.join("meta.erofs")).is_ok_and(|file| {
        flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK)
    })
}

/// Syncs the parent directory of `path`.
fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries: Vec<_> = fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .map_err(Error::file("list", directory))?;
    #[cfg(test)]
    count_reads(entries.len());
    Ok(entries)
}

#[cfg(test)]
thread_local! {
    /// Number of directory entries and documents that this thread has read.
    pub(super) static READS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
fn count_reads(more: usize) {
    READS.with(|reads| reads.set(reads.get() + more));
}

/// Parses the digest at the end of a path in the store.
pub(super) fn digest_of(path: &Path) -> Option<Digest> {
    let name = path.file_name()?.to_str()?;
    Digest::parse(&format!("sha256:{name}"))
}

pub(super) fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("create", path))
}

pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create(path)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(Error::file("write", path))
}

/// Returns `None` if there is no such file, or it has another format.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    #[cfg(test)]
    count_reads(1);
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", path)(error)),
    }
}

/// Runs `work`, which reports the number of bytes read of a layer, and lets the system
/// write out `files` meanwhile, so that the final sync is short.
///
/// # Errors
/// Writing failed. The system reports such an error only once for each open file, so it
/// must be returned.
pub(super) fn writing_out<T>(
    files: &[&File],
    progress: &mut dyn FnMut(u64),
    work: impl FnOnce(&mut dyn FnMut(u64)) -> T,
) -> io::Result<T> {
    thread::scope(|scope| {
        let (due, wait) = sync_channel(1);
        let name = thread::Builder::new().name("write-out".to_owned());
        let writer = name.spawn_scoped(scope, move || {
            let mut all = wait.iter().flat_map(|()| files);
            all.try_for_each(|file| file.sync_data())
        });
        let mut last = 0;
        let done = work(&mut |read| {
            if read >= last + WRITE_OUT {
                last = read;
                // The writer may be busy; a later call follows.
                let _ = due.try_send(());
            }
            progress(read);
        });
        drop(due);
        // Without a thread, everything is written by the final sync.
        if let Ok(writer) = writer {
            writer.join().unwrap_or(Ok(()))?;
        }
        Ok(done)
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn write_out_errors_and_progress_are_reported() {
        // The system cannot sync sockets.
        let (socket, _other) = UnixStream::pair().unwrap();
        let file = File::from(OwnedFd::from(socket));
        let mut reported = Vec::new();
        let mut progress = |read| reported.push(read);
        let fails = writing_out(&[&file], &mut progress, |progress| progress(WRITE_OUT));
        assert!(fails.is_err());
        let little = writing_out(&[&file], &mut progress, |progress| progress(WRITE_OUT - 1));
        assert!(little.is_ok());
        assert_eq!(reported, [WRITE_OUT, WRITE_OUT - 1]);
    }
}
