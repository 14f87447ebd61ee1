//! Files of a VM without a process, and the start that ends this state.
//!
//! ```text
//! created ─────┐                    ┌─▶ (removed)       the process of the VM
//!              ├─▶ prior-… ─────────┤                   has taken over
//! exit.json ───┘   a process starts └─▶ last-exit.json
//!                  the VM
//! ```
//!
//! The process that starts a VM holds its lock. When it is killed before the VM's process
//! has taken over, the lock is free, and a `prior-` file says that the VM is as before: the
//! next sweep or start renames it back.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::{fs, io};

use rustix::fs::{FlockOperation, flock};

use super::files::read_json;
use super::records::{Records, registry_lock};
use super::{CREATED, EXIT, ExitRecord, LOCK, Record, RecordError, io_error};

/// [`CREATED`] while a process starts the VM.
const PRIOR_CREATED: &str = "prior-created";
/// The exit record while a process starts the VM.
const PRIOR_EXIT: &str = "prior-exit.json";
/// The exit record of the previous run of a VM that was started again.
const LAST_EXIT: &str = "last-exit.json";

impl Record {
    /// Returns true if the VM has never been started.
    pub(super) fn is_created(&self) -> Result<bool, RecordError> {
        Ok(exists(&self.directory.join(CREATED))? || exists(&self.directory.join(PRIOR_CREATED))?)
    }

    /// Returns true if the record shows that no process runs the VM.
    pub(super) fn is_idle(&self) -> bool {
        self.has_ended() || self.is_accessed()
    }

    /// Returns true if a process that holds the lock, as the caller has seen under the
    /// registry's lock, only accesses the files of a VM that was never started.
    pub(super) fn is_accessed(&self) -> bool {
        exists(&self.directory.join(CREATED)).unwrap_or(false)
    }

    /// Returns the exit record of a VM whose next start was interrupted.
    pub(super) fn interrupted_exit(&self) -> Result<Option<ExitRecord>, RecordError> {
        read_json(&self.directory.join(PRIOR_EXIT))
    }

    /// Returns the exit record of the run before the current one.
    pub(crate) fn last_exit(&self) -> Result<Option<ExitRecord>, RecordError> {
        read_json(&self.directory.join(LAST_EXIT))
    }

    /// Begins a start. The caller holds the lock.
    fn leave_idle(&self) -> Result<(), RecordError> {
        self.rename(CREATED, PRIOR_CREATED)?;
        self.rename(EXIT, PRIOR_EXIT)
    }

    /// Undoes [`Self::leave_idle`], unless the VM's process has taken over. The caller holds
    /// the lock, or the registry's lock and knows that no process is there.
    pub(crate) fn return_to_idle(&self) -> Result<(), RecordError> {
        self.rename(PRIOR_CREATED, CREATED)?;
        // An exit record is later than one that a start has set aside.
        match exists(&self.directory.join(EXIT))? {
            true => Ok(()),
            false => self.rename(PRIOR_EXIT, EXIT),
        }
    }

    /// Ends the start: the calling process is that of the VM, and the run counts from here.
    pub(crate) fn take_over(&self) -> Result<(), RecordError> {
        // A restart by the VM's own process finds the exit record in its place.
        self.rename(EXIT, LAST_EXIT)?;
        self.rename(PRIOR_EXIT, LAST_EXIT)?;
        let created = self.directory.join(PRIOR_CREATED);
        match fs::remove_file(&created) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &created)(error))
            }
            _ => Ok(()),
        }
    }

    /// Renames a file of the record, if it exists.
    fn rename(&self, from: &str, to: &str) -> Result<(), RecordError> {
        let from = self.directory.join(from);
        match fs::rename(&from, self.directory.join(to)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("rename", &from)(error))
            }
            _ => Ok(()),
        }
    }
}

impl Records {
    /// Takes the lock of a VM that is to be started; returns it with the record as it is
    /// now, or `None` if a process is there already.
    ///
    /// # Errors
    /// The record was removed, or its files cannot be used.
    pub(crate) fn claim(&self, record: &Record) -> Result<Option<(Record, fs::File)>, RecordError> {
        self.claim_idle(record, Record::leave_idle)
    }

    /// Takes the lock of a VM without a process; returns it with the record as it is now, or
    /// `None` if there is a process. `prepare` is called before the lock of all records is
    /// released.
    pub(super) fn claim_idle(
        &self,
        record: &Record,
        prepare: impl FnOnce(&Record) -> Result<(), RecordError>,
    ) -> Result<Option<(Record, fs::File)>, RecordError> {
        loop {
            // A VM that has ended releases its lock within moments.
            if record.has_ended() {
                record.wait_until_free()?;
            }
            let registry = registry_lock(&self.directory)?;
            // The record may have another name by now, or other labels.
            let record = self.reread(record)?;
            if record
                .try_lock(FlockOperation::NonBlockingLockShared)?
                .is_none()
            {
                if record.has_ended() {
                    continue;
                }
                if !record.is_accessed() {
                    return Ok(None);
                }
                drop(registry);
                record.wait_until_free()?;
                continue;
            }
            let lock = record.lock_for_a_start()?;
            record.return_to_idle()?;
            // Sockets of a process that was killed may be there.
            record.remove_sockets()?;
            DirBuilder::new()
                .mode(0o700)
                .create(&record.sockets)
                .map_err(io_error("create", &record.sockets))?;
            prepare(&record)?;
            return Ok(Some((record, lock)));
        }
    }
}

impl Record {
    /// Takes the lock exclusively. Only observers can hold it, for moments: the caller holds
    /// the registry's lock and has seen that no process of the VM does.
    fn lock_for_a_start(&self) -> Result<fs::File, RecordError> {
        let path = self.directory.join(LOCK);
        // Opened for writing, so that a watch of the directory reports its end.
        let file = OpenOptions::new()
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
            .map_err(|errno| io_error("lock", &path)(errno.into()))?;
        Ok(file)
    }
}

fn exists(path: &Path) -> Result<bool, RecordError> {
    path.try_exists().map_err(io_error("examine", path))
}

#[cfg(test)]
mod tests;
