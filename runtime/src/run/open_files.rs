//! Access to the files of a VM, running or not.
//!
//! Only a guest reads the disk of a VM, whose file system is the work of whatever ran in the
//! VM. For a VM without a process, a machine is started with it, whose agent performs
//! operations as that of a running VM does.

use std::ops::Deref;

use super::files_machine::FilesMachine;
use crate::Error;
use crate::files::{FileAccess, FileScope, Files};
use crate::record::VmState;
use crate::vm::Vm;

/// The files of a VM, running or not; see [`Vm::open_files`].
#[derive(Debug)]
pub struct OpenFiles {
    files: Files,
    machine: Option<FilesMachine>,
}

impl Deref for OpenFiles {
    type Target = Files;

    fn deref(&self) -> &Files {
        &self.files
    }
}

impl Vm {
    /// Opens the files of a VM that runs, has exited, or was never started. A VM that is not
    /// running cannot be started meanwhile; a start waits some seconds for the end of the
    /// access. Nothing but its disks changes: no workload runs, there are no events, and its
    /// state and exit status stay.
    ///
    /// # Errors
    /// The changes to the VM's root were in guest memory, or are discarded by its next start
    /// ([`FileAccess::Write`]); another access takes long; its image or a mount cannot be
    /// used; the VM is starting or paused.
    pub fn open_files(&self, scope: FileScope, access: FileAccess) -> Result<OpenFiles, Error> {
        let idle = matches!(self.state()?, VmState::Created | VmState::Exited(_));
        let machine = match idle {
            true => FilesMachine::start(self.sm(), self.record(), scope, access)?,
            false => None,
        };
        let files = match &machine {
            Some(machine) => Files::of(machine.record()),
            None => self.files(),
        };
        Ok(OpenFiles { files, machine })
    }
}

impl OpenFiles {
    /// Returns true if a machine was started for the access.
    pub(crate) fn is_of_idle_vm(&self) -> bool {
        self.machine.is_some()
    }

    /// Ends the access. What was written to a VM that is not running is on its disk then;
    /// dropping the value does not report a failure of that.
    ///
    /// # Errors
    /// The machine failed: what was written may be lost.
    pub fn close(self) -> Result<(), Error> {
        self.machine.map_or(Ok(()), FilesMachine::close)
    }
}
