//! Handles of virtual machines.

use std::time::Duration;

use sm_control::Control;
use sm_control::launch::{ControlAnswer, ControlCall, SnapshotReport, StageTimes, Status};
use sm_control::session::Session;
use sm_control::signal;
use sm_control::timings::Phase;
use sm_guest_proto::control::GuestStats;
use sm_guest_proto::exec::GuestProcess;

use crate::exec::ExecBuilder;
use crate::logs::Logs;
use crate::reaper::Process;
use crate::record::{Damaged, ExitRecord, Record, Records, VmConfig, VmState};
use crate::sm::Sm;
use crate::{Error, Refusal};

mod removal;
mod state;
mod storage;
mod survey;
mod update;

pub use self::removal::Force;
pub use self::state::{Inspection, StateView, VmStatus};
pub use self::storage::{MountKindView, MountView, StorageView};
pub use self::update::VmUpdate;

/// A handle of a virtual machine, running or exited. Dropping it does not affect the VM.
#[derive(Debug)]
pub struct Vm {
    sm: Sm,
    record: Record,
    /// The VMM process, if this process has started it.
    _child: Option<Process>,
    session: Option<Session>,
    phases: Vec<Phase>,
    pub(crate) warnings: Vec<String>,
}

/// The input of a client of a workload; see [`Vm::attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Input {
    /// The client sends none.
    None,
    /// The client sends standard input.
    Stdin,
}

/// The VMs of a user; see [`Sm::vms`].
#[derive(Clone, Debug)]
pub struct Vms {
    sm: Sm,
}

/// The result of [`Vms::inspect`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspections {
    /// The VMs, newest first.
    pub vms: Vec<Inspection>,
    /// Records that cannot be read.
    pub damaged: Vec<Damaged>,
}

impl Sm {
    /// Finds the VM with this name, identifier, or unambiguous prefix of an identifier.
    ///
    /// # Errors
    /// No VM matches, or several do.
    pub fn vm(&self, query: &str) -> Result<Vm, Error> {
        let record = Records::open(self.home())?.find(query)?;
        Ok(Vm::from_record(self, record))
    }

    /// Returns all VMs.
    #[must_use]
    pub fn vms(&self) -> Vms {
        Vms { sm: self.clone() }
    }
}

impl Vms {
    /// Returns all VMs whose records can be read, newest first, after cleaning up after
    /// VMs that died.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn list(&self) -> Result<Vec<Vm>, Error> {
        let records = Records::open(self.sm.home())?.swept()?.0;
        let vm = |record| Vm::from_record(&self.sm, record);
        Ok(records.into_iter().map(vm).collect())
    }

    /// Inspects all VMs, newest first, after cleaning up after those that died, and
    /// returns the damaged records as well. All VMs are queried concurrently; those that
    /// do not answer within `timeout` are [`VmStatus::Unresponsive`].
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn inspect(&self, timeout: Duration) -> Result<Inspections, Error> {
        let (records, damaged) = Records::open(self.sm.home())?.swept()?;
        let vms = survey::inspect_all(records, timeout);
        Ok(Inspections { vms, damaged })
    }

    /// Removes the damaged record of the VM whose identifier begins with `query`.
    ///
    /// # Errors
    /// No record matches, or several do; its VM is alive; a later version of this program
    /// can read it; its files cannot be removed.
    pub fn remove_damaged(&self, query: &str) -> Result<(), Error> {
        Ok(Records::open(self.sm.home())?.remove_damaged(query)?)
    }
}

impl Vm {
    pub(crate) fn started(
        sm: Sm,
        record: Record,
        child: Process,
        session: Option<Session>,
        phases: Vec<Phase>,
    ) -> Self {
        Self {
            sm,
            record,
            _child: Some(child),
            session,
            phases,
            warnings: Vec::new(),
        }
    }

    pub(crate) fn from_record(sm: &Sm, record: Record) -> Self {
        Self {
            sm: sm.clone(),
            record,
            _child: None,
            session: None,
            phases: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Returns its record.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Returns the handle that found or started it.
    pub(crate) fn sm(&self) -> &Sm {
        &self.sm
    }

    /// Returns its identifier.
    #[must_use]
    pub fn id(&self) -> &crate::id::VmId {
        &self.record.config().id
    }

    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.config().name
    }

    /// Returns its configuration.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        self.record.config()
    }

    /// Returns the end times of the phases of its start, as far as this handle observed
    /// them.
    #[must_use]
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// Returns the warnings of its start: sentences about problems that did not prevent
    /// it.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the session with the workload of a VM that was started attached, on the
    /// first call only. Dropping the session detaches.
    pub fn take_session(&mut self) -> Option<Session> {
        self.session.take()
    }

    /// Attaches to the workload: its output from now on and, with [`Input::Stdin`], its
    /// input.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn attach(&self, input: Input) -> Result<Session, Error> {
        let control = self.control()?;
        let endpoint = self.record.control_endpoint();
        let stdin = input == Input::Stdin;
        Ok(Session::attach(endpoint, control, stdin)?)
    }

    fn control(&self) -> Result<Control, Error> {
        Ok(Control::connect(&self.record.control_endpoint())?)
    }

    fn call(&self, call: &ControlCall) -> Result<ControlAnswer, Error> {
        Ok(self.control()?.call(call)?)
    }

    /// Returns whether it runs, or its exit record.
    ///
    /// # Errors
    /// Its record cannot be read.
    pub fn state(&self) -> Result<VmState, Error> {
        Ok(self.record.state()?)
    }

    fn status(&self) -> Result<Status, Error> {
        match self.call(&ControlCall::Status)? {
            ControlAnswer::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns its configuration and state. A damaged record is one of the states.
    ///
    /// # Errors
    /// The record does not exist any more.
    pub fn inspect(&self) -> Result<Inspection, Error> {
        let state = match self.record.state() {
            Ok(VmState::Running | VmState::Restarting(_)) => match self.status() {
                Ok(status) => StateView::alive(&self.record, status),
                Err(error) => StateView::unresponsive(&self.record, &error)?,
            },
            other => StateView::exited(other)?,
        };
        Ok(Inspection {
            config: self.config().clone(),
            state,
            storage: StorageView::of(&self.record),
        })
    }

    /// Waits for its exit. A session that was not taken with [`Self::take_session`] is
    /// closed, so that unread output does not block the workload.
    ///
    /// # Errors
    /// The VM was removed at its exit before the exit status was read.
    pub fn wait(&mut self) -> Result<ExitRecord, Error> {
        self.session = None;
        if let Ok(mut control) = self.control()
            && let Ok(ControlAnswer::Ended(exit)) = control.call_and_wait(&ControlCall::Wait)
        {
            return Ok(exit);
        }
        // A machine for its files may hold the lock of a VM that has exited.
        if let Ok(VmState::Exited(exit)) = self.record.state() {
            return Ok(exit);
        }
        self.record.wait_until_unlocked()?;
        match self.record.state()? {
            VmState::Exited(exit) | VmState::Restarting(exit) => Ok(exit),
            VmState::Running | VmState::Created => {
                Err(Refusal::NoExitStatus(self.name().to_owned()).into())
            }
        }
    }

    /// Sends the workload its stop signal, then SIGKILL after `grace` (the VM's own
    /// setting if `None`), and waits until the VM has exited.
    ///
    /// # Errors
    /// The VM does not answer. A VM that has already exited is no error.
    pub fn stop(&mut self, grace: Option<Duration>) -> Result<(), Error> {
        let grace_ms = grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
        let mut control = match self.control() {
            Ok(control) => control,
            Err(Error::NotRunning(_)) => return self.ended_or(Error::not_running),
            Err(error) => return Err(error),
        };
        control.call(&ControlCall::Stop { grace_ms })?;
        // Both the answer and the end of the connection mean that the VM has exited.
        let _ = control.call_and_wait(&ControlCall::Wait);
        Ok(())
    }

    fn ended_or(&self, error: impl Fn(&Record) -> Error) -> Result<(), Error> {
        match self.record.state() {
            Ok(VmState::Exited(_) | VmState::Created) => Ok(()),
            _ => Err(error(&self.record)),
        }
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// The name is invalid or taken, or the VM was removed.
    pub fn rename(&mut self, name: &str) -> Result<(), Error> {
        self.change(|config| {
            name.clone_into(&mut config.name);
            Ok(())
        })
    }

    /// Changes parts of its configuration, also while it runs: its memory and the rules of its
    /// network at once, the others from its next stop or end on.
    ///
    /// # Errors
    /// It cannot have the restart policy or the memory, or was removed, or does not answer.
    pub fn update(&mut self, update: &VmUpdate) -> Result<(), Error> {
        self.change(|config| update.apply(config))?;
        let is_idle = || {
            matches!(
                self.record.state(),
                Ok(VmState::Exited(_) | VmState::Created)
            )
        };
        let config = self.record.config();
        let memory = update.changes_memory().then_some(ControlCall::LimitMemory {
            bytes: config.memory_limit,
        });
        let network = update.changes_network().then(|| ControlCall::NetworkRules {
            allow: config.network.allow.clone(),
            deny: config.network.deny.clone(),
        });
        for call in memory.into_iter().chain(network) {
            if is_idle() {
                break;
            }
            match self.call(&call) {
                Ok(_) => {}
                // It has ended, and finds the change when it is started again.
                Err(_) if is_idle() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn change(
        &mut self,
        change: impl FnOnce(&mut VmConfig) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.record = Records::open(self.sm.home())?.change(&self.record, change)?;
        Ok(())
    }

    /// Sends a signal to the workload's main process. After SIGKILL, waits until the VM has
    /// exited.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn kill(&self, signal: u8) -> Result<(), Error> {
        let mut control = self.control()?;
        control.call(&ControlCall::Signal { signal })?;
        if signal == signal::KILL {
            // Both the answer and the end of the connection mean that the VM has exited.
            let _ = control.call_and_wait(&ControlCall::Wait);
        }
        Ok(())
    }

    /// Returns a sender of signals for use by other threads.
    #[must_use]
    pub fn signals(&self) -> SignalSender {
        SignalSender {
            record: self.record.clone(),
        }
    }

    /// Pauses all vCPUs.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn pause(&self) -> Result<(), Error> {
        let done = self.call(&ControlCall::Pause).map(drop);
        done.map_err(|error| self.refused("pause", error))
    }

    /// Resumes the vCPUs.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn resume(&self) -> Result<(), Error> {
        let done = self.call(&ControlCall::Resume).map(drop);
        done.map_err(|error| self.refused("unpause", error))
    }

    /// Resets a VM that was started from a workload snapshot to the state of the
    /// snapshot, with a new identity. Only memory that has changed is restored, so this
    /// is faster than starting another VM. Commands that run beside its workload, and all
    /// connections, end; clients of the workload stay attached.
    ///
    /// # Errors
    /// The VM is not running, or was not started from a workload snapshot.
    pub fn reset(&self) -> Result<(), Error> {
        let done = self.control()?.call_and_wait(&ControlCall::Reset);
        let done = done.map(drop).map_err(Error::from);
        done.map_err(|error| self.refused("reset", error))
    }

    /// Adds the operation and the VM to a refusal of the VM's process, which names neither.
    fn refused(&self, operation: &str, error: Error) -> Error {
        match error {
            Error::Refused(Refusal::Vm(reason)) => {
                let name = self.name();
                Refusal::Vm(format!("cannot {operation} VM \"{name}\": {reason}")).into()
            }
            other => other,
        }
    }

    /// Returns resource usage of the guest.
    ///
    /// # Errors
    /// The VM is not running, or its agent does not answer.
    pub fn stats(&self) -> Result<GuestStats, Error> {
        match self.call(&ControlCall::Stats)? {
            ControlAnswer::Stats(stats) => Ok(stats),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns the processes of the workload, and of commands beside it.
    ///
    /// # Errors
    /// The VM is not running, or is paused; or its agent is of a version without the list.
    pub fn processes(&self) -> Result<Vec<GuestProcess>, Error> {
        crate::exec::processes(&self.record)
    }

    /// Starts to measure the stages of the VM's connections.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn start_profile(&self) -> Result<(), Error> {
        match self.call(&ControlCall::Profile { on: true })? {
            ControlAnswer::Profile(_) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns the measurements since [`Self::start_profile`], and stops measuring.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn end_profile(&self) -> Result<Vec<StageTimes>, Error> {
        match self.call(&ControlCall::Profile { on: false })? {
            ControlAnswer::Profile(times) => Ok(times),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) fn create_snapshot(
        &self,
        name: &str,
        then: AfterSnapshot,
        lifetime: Lifetime,
    ) -> Result<NewSnapshot, Error> {
        let call = ControlCall::Snapshot {
            name: name.to_owned(),
            stop: then == AfterSnapshot::End,
            ephemeral: lifetime == Lifetime::LastUser,
        };
        let mut control = self.control()?;
        match control.call_and_wait(&call)? {
            ControlAnswer::Snapshot(report) => Ok(NewSnapshot {
                report,
                _control: control,
            }),
            other => Err(unexpected(&other)),
        }
    }

    /// Creates a command to run beside the workload.
    pub fn exec<I, S>(&self, command: I) -> ExecBuilder
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        let command = command.into_iter().map(Into::into).collect();
        ExecBuilder::new(self.record.clone(), command)
    }

    /// Opens the log of the workload's output.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn logs(&self) -> Result<Logs, Error> {
        Logs::open(self.record.clone())
    }

    /// Returns what the VM's process has logged about its network, the oldest first: flows of
    /// the guest, and refusals, the same one once in ten seconds. Old ones are dropped.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn network_events(&self) -> Result<Vec<crate::logs::NetworkEvent>, Error> {
        crate::logs::network_events(&self.record)
    }

    /// Returns the path of the guest's console log.
    #[must_use]
    pub fn console_log(&self) -> std::path::PathBuf {
        self.record.directory().join(crate::record::CONSOLE)
    }
}

/// The continuation of a VM after [`Vm::snapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AfterSnapshot {
    /// It continues.
    Continue,
    /// It ends.
    End,
}

/// The lifetime of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// It exists until it is removed.
    Permanent,
    /// The last VM that uses it removes it.
    LastUser,
}

/// A new snapshot. The VM's process prevents its removal while this connection is open.
#[derive(Debug)]
pub(crate) struct NewSnapshot {
    pub(crate) report: SnapshotReport,
    _control: Control,
}

/// Sends signals to a VM's workload; see [`Vm::signals`].
#[derive(Clone, Debug)]
pub struct SignalSender {
    record: Record,
}

impl SignalSender {
    /// Sends a signal, on a connection of its own, so that it does not wait behind input
    /// that the workload has not read.
    ///
    /// # Errors
    /// The workload is not running.
    pub fn send(&self, signal: u8) -> Result<(), Error> {
        let mut control = Control::connect(&self.record.control_endpoint())?;
        control.call(&ControlCall::Signal { signal })?;
        Ok(())
    }

    /// Sends the workload its stop signal, then SIGKILL after `grace`. Does not wait for
    /// its exit.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn stop(&self, grace: Duration) -> Result<(), Error> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let mut control = Control::connect(&self.record.control_endpoint())?;
        control.call(&ControlCall::Stop {
            grace_ms: Some(grace_ms),
        })?;
        Ok(())
    }
}

fn unexpected(answer: &ControlAnswer) -> Error {
    Refusal::Answer(format!("{answer:?}")).into()
}

#[cfg(test)]
mod tests;
