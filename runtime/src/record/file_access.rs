//! Access to the files of a VM without a process.
//!
//! A machine is started for it, whose process holds the lock of the record as that of a run
//! does: at no time do two machines have the VM's disks. Its files say that the VM is idle,
//! and stay as they are; its sockets have other names, so that no client takes the machine
//! for the running VM. A start, or another access, waits for its end.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use sm_control::exit::ExitRecord;
use sm_control::id::VmId;
use sm_control::{Control, ControlError};
use sm_guest_proto::frame::FrameType;
use sm_vmm::environment::{OutputLog, VmRecord};

use super::records::{Records, clean_up};
use super::{Record, RecordError, SocketNames};

/// The names of the sockets.
const SOCKETS: SocketNames = SocketNames {
    control: "access.sock",
    exec: "files.sock",
};
/// The log of the guest's serial console.
const CONSOLE: &str = "files.log";
/// Time that a start or a removal waits for the end of an access.
const ACCESS_TIMEOUT: Duration = match cfg!(test) {
    true => Duration::from_millis(100),
    false => Duration::from_secs(10),
};

impl Record {
    /// Returns the record with the sockets of an access to its files.
    pub(crate) fn for_file_access(&self) -> Self {
        Self {
            names: SOCKETS,
            ..self.clone()
        }
    }

    /// Waits until no process holds the lock of an idle VM: for moments after its end, or for
    /// the end of an access to its files.
    ///
    /// # Errors
    /// An access takes long, or the record was removed.
    pub(super) fn wait_until_free(&self) -> Result<(), RecordError> {
        let lock = self.try_lock(FlockOperation::NonBlockingLockShared)?;
        if lock.is_some() {
            return Ok(());
        }
        let endpoint = self.for_file_access().control_endpoint();
        if let Ok(control) = Control::connect(&endpoint)
            && let Err(ControlError::Io { source, .. }) =
                control.wait_until(Instant::now() + ACCESS_TIMEOUT)
            && source.kind() == io::ErrorKind::TimedOut
        {
            return Err(RecordError::FilesInUse(self.config.name.clone()));
        }
        drop(self.try_lock(FlockOperation::LockShared)?);
        Ok(())
    }
}

impl Records {
    /// Takes the lock of an idle VM for an access to its files; returns it with the record
    /// as it is now, or `None` if the VM has a process.
    ///
    /// # Errors
    /// The record was removed, or its files cannot be used; another access takes long.
    pub(crate) fn claim_files(
        &self,
        record: &Record,
    ) -> Result<Option<(Record, File)>, RecordError> {
        let claimed = self.claim_idle(record, |record| {
            // A process that was killed has not written how it ended. Otherwise, the VM
            // would seem to run from here on.
            if !record.is_idle() {
                clean_up(record)?;
            }
            match record.directory.exists() {
                true => Ok(()),
                false => Err(RecordError::NotFound(record.config.name.clone())),
            }
        });
        Ok(claimed?.map(|(record, lock)| (record.for_file_access(), lock)))
    }
}

/// The record of an idle VM as the machine for its files has it: nothing is changed.
#[derive(Clone, Debug)]
pub(crate) struct FileAccessRecord(pub(crate) Record);

impl VmRecord for FileAccessRecord {
    fn directory(&self) -> &Path {
        self.0.directory()
    }

    fn console(&self) -> PathBuf {
        self.0.directory().join(CONSOLE)
    }

    fn control_socket(&self) -> PathBuf {
        self.0.control_socket()
    }

    fn exec_socket(&self) -> PathBuf {
        self.0.exec_socket()
    }

    fn name_of(&self, vm: &VmId) -> Option<String> {
        self.0.name_of(vm)
    }

    fn output_log(&self) -> io::Result<Box<dyn OutputLog>> {
        Ok(Box::new(NoOutput))
    }

    fn write_exit(&self, _: &ExitRecord) -> io::Result<()> {
        Ok(())
    }

    fn remove_sockets(&self) -> io::Result<()> {
        // The log is that of this access.
        let _ = std::fs::remove_file(self.console());
        self.0.remove_sockets().map_err(io::Error::other)
    }

    fn erase(&self) -> io::Result<()> {
        self.remove_sockets()
    }
}

/// The log of a machine without a workload.
struct NoOutput;

impl OutputLog for NoOutput {
    fn append(&mut self, _: FrameType, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn note_dropped(&mut self) -> io::Result<()> {
        Ok(())
    }
}
