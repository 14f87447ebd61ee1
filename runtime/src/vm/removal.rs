//! Removing VMs.

use std::io;
use std::time::Duration;

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sm_control::launch::ControlCall;
use sm_control::{Control, ControlError};

use super::Vm;
use crate::Error;
use crate::record::{Record, RecordError, VmState};

/// Time that a VMM has to destroy its VM on request, before it is killed.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(10);

/// The treatment of a running VM by [`Vm::remove`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Force {
    /// A running VM is an error.
    No,
    /// A running VM is destroyed, without notifying its workload.
    Yes,
}

impl Vm {
    /// Removes its record and logs. With [`Force::Yes`], a running VM is destroyed first,
    /// without notifying its workload.
    ///
    /// # Errors
    /// The VM is running and not to be destroyed, or files cannot be removed.
    pub fn remove(&mut self, force: Force) -> Result<(), Error> {
        let force = force == Force::Yes;
        // A damaged record does not count as a running VM.
        let alive = |state| matches!(state, Ok(VmState::Running | VmState::Restarting(_)));
        if force && alive(self.record.state()) {
            self.destroy(&self.record)?;
        } else if force {
            // An access to its files does not keep it.
            self.destroy(&self.record.for_file_access())?;
        }
        match self.record.remove() {
            // An ephemeral VM removed itself when it exited.
            Err(RecordError::NotFound(_)) if force => Ok(()),
            other => Ok(other?),
        }
    }

    /// Removes it as [`Self::remove`] does, and the volumes that were created for it and that
    /// no other VM refers to.
    ///
    /// # Errors
    /// As for [`Self::remove`]; a volume cannot be removed, when the VM is gone.
    pub fn remove_with_volumes(&mut self, force: Force) -> Result<(), Error> {
        self.remove(force)?;
        self.sm.volumes().remove_anonymous_of(&self.record)
    }

    /// Ends the process with the sockets of `record`, and waits for its end.
    fn destroy(&self, record: &Record) -> Result<(), Error> {
        let mut control = match Control::connect(&record.control_endpoint()) {
            Ok(control) => control,
            // The VM is starting or exiting; the lock of its record is released at its
            // end.
            Err(ControlError::NotRunning(_)) => return Ok(record.wait_until_unlocked()?),
            Err(error) => return Err(error.into()),
        };
        let operation = "end the VM's process";
        let vmm = |source: io::Error| Error::Vmm { operation, source };
        let pid = control.peer_pid().map_err(vmm)?;
        // The PID is not reused while the connection to the process is open.
        let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| vmm(e.into()))?;
        let reply = control.call(&ControlCall::Destroy);
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(DESTROY_TIMEOUT.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let mut fds = [rustix::event::PollFd::new(
            &process,
            rustix::event::PollFlags::IN,
        )];
        let ended = reply.is_ok()
            && rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&timeout)))
                .is_ok_and(|ready| ready > 0);
        if !ended {
            tracing::warn!(vm = self.name(), "killing a VMM that does not answer");
            pidfd_send_signal(&process, Signal::KILL).map_err(|e| vmm(e.into()))?;
        }
        Ok(record.wait_until_unlocked()?)
    }
}
