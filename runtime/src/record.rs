//! Records of virtual machines on disk, and the lock that shows whether a VM is alive.
//!
//! `<data>/vms/<id>/` contains `config.json`, `lock`, `console.log`, `vmm.log`, the
//! output log and, after the exit, `exit.json`. `<run>/vms/<short id>/` contains only the
//! sockets. The directory of a VM is the same in all its runs.
//!
//! Invariant: a VM's process is alive exactly while its `lock` is flocked exclusively.
//! The lock is taken by the process that starts the VM, and passed to the VMM as an open
//! file description; the kernel releases it whenever and however the VMM ends. It is taken
//! under the registry's lock (or before a new record gets its name), and no other process
//! ever locks it exclusively. A process that gets a shared lock knows that there is no
//! VMM, and none appears while it holds the lock; concurrent observers get the same
//! answer. Clean-up after dead VMs happens under the registry's lock.
//! Order of locks: the registry's before that of a record; no process waits for the
//! registry's lock while it holds that of a record.
//!
//! A VM has *ended* when `exit.json` exists; its VMM may still release resources for some
//! milliseconds, and only removal and the next start have to wait for that. An end after
//! which the VM's process starts another run is marked in that file, and counts only when
//! the process is gone.
//!
//! `idle.rs` has the files of a VM without a process, and what a start does with them;
//! `file_access.rs` has the processes that only access the files of such a VM.

mod file_access;
mod files;
#[cfg(test)]
mod full;
mod idle;
mod records;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sm_control::Endpoint;
use sm_control::config::StartSettingsV1;
pub use sm_control::config::{RecordFormError, VmConfig};
pub use sm_control::exit::{ExitReason, ExitRecord};
use sm_control::id::VmId;
use thiserror::Error;

pub(crate) use self::file_access::FileAccessRecord;
use self::files::{read_config, read_json, remove_tree, write_json};
pub use self::records::Damaged;
pub(crate) use self::records::{Draft, Records};
use crate::events::{EventAction, EventLog, EventRecord};
use crate::home::HomeError;

const CONFIG: &str = "config.json";
const LOCK: &str = "lock";
const EXIT: &str = "exit.json";
/// Exists in the record of a VM that has never been started.
const CREATED: &str = "created";
/// The log of the guest's serial console.
pub(crate) const CONSOLE: &str = "console.log";
/// The log of the VMM process.
pub(crate) const VMM_LOG: &str = "vmm.log";

/// An error of using a record.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The directories cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// No record matches.
    #[error("no such VM: \"{0}\"")]
    NotFound(String),
    /// Several records match a prefix.
    #[error("\"{0}\" matches several VMs: give more characters of the ID")]
    Ambiguous(String),
    /// Another record has the name.
    #[error("the name \"{name}\" is already taken by VM {id}")]
    NameTaken {
        /// The name.
        name: String,
        /// Short identifier of the VM with that name.
        id: String,
    },
    /// A name outside the permitted characters.
    #[error(
        "\"{0}\" is not a valid name: start with a letter or digit, then letters, digits, '_', '.' or '-', 64 at most"
    )]
    BadName(String),
    /// The record cannot be parsed.
    #[error("the record of VM {id} is damaged: {reason}")]
    Damaged {
        /// Identifier of the VM.
        id: VmId,
        /// The cause.
        reason: String,
    },
    /// The record is of a later version of this program, which can read it.
    #[error("the record of VM {id} is of a later version: {reason}")]
    Later {
        /// Identifier of the VM.
        id: VmId,
        /// The cause.
        reason: String,
    },
    /// The VM is alive, and the operation requires an exited one.
    #[error("VM \"{0}\" is running")]
    Running(String),
    /// A process accesses the files of the idle VM.
    #[error("the files of VM \"{0}\" are being read or written: try again when that has ended")]
    FilesInUse(String),
    /// A file of a record is of no form that this program knows.
    #[error("cannot understand {path:?}")]
    Form {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: RecordFormError,
    },
    /// A file of a record cannot be read or written.
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
}

impl RecordError {
    /// Returns true if only a later version of this program can read the record.
    pub(crate) fn is_of_later_version(&self) -> bool {
        let unknown = |source| matches!(source, &RecordFormError::UnknownVersion(_));
        match self {
            Self::Form { source, .. } => unknown(source),
            Self::Later { .. } => true,
            _ => false,
        }
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io {
        operation,
        path,
        source,
    }
}

/// The state of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmState {
    /// It was created, and has never been started.
    Created,
    /// A process holds its lock.
    Running,
    /// It has ended like this, and its process is about to start it again.
    Restarting(ExitRecord),
    /// It has ended.
    Exited(ExitRecord),
}

/// The names of a VM's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SocketNames {
    control: &'static str,
    exec: &'static str,
}

/// Those of a VM's process.
const SOCKETS: SocketNames = SocketNames {
    control: "control.sock",
    exec: "exec.sock",
};

/// One VM's record.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    config: VmConfig,
    /// `None` in the VMM, and for records of versions without it.
    start: Option<StartSettingsV1>,
    directory: PathBuf,
    sockets: PathBuf,
    names: SocketNames,
    events: EventLog,
}

impl Record {
    /// Returns the VM's configuration.
    #[must_use]
    pub(crate) fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Returns the settings of its starts.
    pub(crate) fn start_settings(&self) -> Option<&StartSettingsV1> {
        self.start.as_ref()
    }

    /// Returns its directory.
    #[must_use]
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the directory of its sockets.
    #[cfg(test)]
    pub(crate) fn sockets(&self) -> &Path {
        &self.sockets
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.sockets.join(self.names.control)
    }

    pub(crate) fn exec_socket(&self) -> PathBuf {
        self.sockets.join(self.names.exec)
    }

    /// Returns the control socket of its VMM.
    pub(crate) fn control_endpoint(&self) -> Endpoint {
        Endpoint::new(self.control_socket(), &self.config.name)
    }

    /// Returns the socket of the exec server in its guest.
    pub(crate) fn exec_endpoint(&self) -> Endpoint {
        Endpoint::new(self.exec_socket(), &self.config.name)
    }

    /// Returns the state of the VM.
    ///
    /// # Errors
    /// Its files cannot be read.
    pub(crate) fn state(&self) -> Result<VmState, RecordError> {
        let restarting = match self.exit()? {
            Some(exit) if exit.restarting => Some(exit),
            Some(exit) => return Ok(VmState::Exited(exit)),
            None => None,
        };
        // While this is held, no start changes the files.
        let Some(_dead) = self.try_lock(FlockOperation::NonBlockingLockShared)? else {
            return Ok(match restarting {
                Some(exit) => VmState::Restarting(exit),
                None if self.is_created()? => VmState::Created,
                None => VmState::Running,
            });
        };
        if let Some(exit) = self.exit()? {
            return Ok(VmState::Exited(exit));
        }
        if self.is_created()? {
            return Ok(VmState::Created);
        }
        let interrupted = self.interrupted_exit()?;
        Ok(VmState::Exited(
            interrupted.unwrap_or_else(ExitRecord::lost),
        ))
    }

    /// Reads the exit record, if there is one.
    pub(crate) fn exit(&self) -> Result<Option<ExitRecord>, RecordError> {
        read_json(&self.directory.join(EXIT))
    }

    /// Blocks until no process holds its lock.
    pub(crate) fn wait_until_unlocked(&self) -> Result<(), RecordError> {
        match self.try_lock(FlockOperation::LockShared) {
            Ok(_) | Err(RecordError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Returns true if an exit record exists, readable or not, after which there is no
    /// other run.
    fn has_ended(&self) -> bool {
        match self.exit() {
            Ok(exit) => exit.is_some_and(|exit| !exit.restarting),
            Err(_) => true,
        }
    }

    /// Returns true if the record is removed, or the VM has ended and its VMM will remove
    /// it.
    fn is_vanishing(&self) -> bool {
        is_vanishing(&self.directory, self.config.auto_remove)
    }

    /// Returns the present name of another VM of this user.
    pub(crate) fn name_of(&self, vm: &VmId) -> Option<String> {
        name_of(self.directory.parent()?, vm)
    }

    /// Writes the exit record durably. Called by the VMM.
    pub(crate) fn write_exit(&self, exit: &ExitRecord) -> Result<(), RecordError> {
        write_json(&self.directory, EXIT, exit)
    }

    /// Takes the lock; `None` if the VMM holds it.
    fn try_lock(&self, operation: FlockOperation) -> Result<Option<File>, RecordError> {
        try_lock(&self.directory, &self.config.name, operation)
    }

    /// Removes the record of a VM that is not alive.
    ///
    /// # Errors
    /// The VM is alive, or its files cannot be removed.
    pub(crate) fn remove(&self) -> Result<(), RecordError> {
        // The VMM of a VM that has ended is about to release the lock. The registry's lock
        // is not held meanwhile.
        if self.has_ended() {
            self.wait_until_free()?;
        }
        loop {
            let records = self.directory.parent().unwrap_or(Path::new("/"));
            let registry = records::registry_lock(records)?;
            let lock = self.try_lock(FlockOperation::NonBlockingLockShared)?;
            if lock.is_some() {
                return self.erase();
            }
            if !self.is_accessed() {
                return Err(RecordError::Running(self.config.name.clone()));
            }
            drop(registry);
            self.wait_until_free()?;
        }
    }

    /// Removes the record. The caller is the VMM, or holds the registry's lock and has
    /// verified that the VMM is dead.
    pub(crate) fn erase(&self) -> Result<(), RecordError> {
        let existed = self.directory.exists();
        self.remove_sockets()?;
        bury(&self.directory, &self.config.id)?;
        if existed {
            self.note(EventAction::Destroy, |event| event);
        }
        Ok(())
    }

    /// Adds an event about the VM to the log; `details` completes it.
    pub(crate) fn note(
        &self,
        action: EventAction,
        details: impl FnOnce(EventRecord) -> EventRecord,
    ) {
        let event = EventRecord::of_vm(action, &self.config);
        self.events.note(&details(event));
    }

    /// Returns the log of events.
    pub(crate) fn events(&self) -> &EventLog {
        &self.events
    }

    pub(crate) fn remove_sockets(&self) -> Result<(), RecordError> {
        remove_tree(&self.sockets)
    }
}

/// Returns the present name of a VM; `vms` is the directory of all records.
pub(crate) fn name_of(vms: &Path, vm: &VmId) -> Option<String> {
    let path = vms.join(vm.as_str()).join(CONFIG);
    Some(read_config(&path).ok()??.config.name)
}

/// Returns true if the record in `directory` is removed, or its VM has ended and its VMM
/// will remove it (`auto_remove`).
fn is_vanishing(directory: &Path, auto_remove: bool) -> bool {
    // A VMM removes its record without the registry's lock. A directory that is there after
    // the look at its files was there at that look, as identifiers are never used again.
    let ended = auto_remove && directory.join(EXIT).exists();
    ended || !directory.try_exists().unwrap_or(true)
}

/// Takes the lock of the record in `directory`; `None` if the VMM holds it.
fn try_lock(
    directory: &Path,
    name: &str,
    operation: FlockOperation,
) -> Result<Option<File>, RecordError> {
    let path = directory.join(LOCK);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(RecordError::NotFound(name.to_owned()));
        }
        Err(error) => return Err(io_error("open", &path)(error)),
    };
    match rustix::io::retry_on_intr(|| flock(&file, operation)) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(io_error("lock", &path)(errno.into())),
    }
}

/// Removes the directory of a record.
fn bury(directory: &Path, id: &VmId) -> Result<(), RecordError> {
    // The rename comes first, so that a listing never sees an incomplete record.
    let parent = directory.parent().unwrap_or(Path::new("/"));
    let grave = parent.join(format!("{}{id}", records::REMOVED_PREFIX));
    match std::fs::rename(directory, &grave) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("remove", directory)(error)),
    }
    remove_tree(&grave)
}
