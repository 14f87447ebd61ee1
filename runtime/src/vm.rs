//! A virtual machine, seen by its owner.

use std::io;
use std::time::Duration;

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;
use sm_control::Control;
use sm_control::launch::{ControlAnswer, ControlCall, SnapshotReport, StageTimes, Status};
use sm_control::publish::PublishedPort;
use sm_control::session::Session;
use sm_control::timings::Phase;

use crate::Error;
use crate::exec::ExecBuilder;
use crate::home::Home;
use crate::logs::Logs;
use crate::reaper::Process;
use crate::record::{Damaged, ExitRecord, Record, RecordError, Records, VmConfig, VmState};

mod survey;

/// How long a VMM may take to end a VM once told to, before it is killed.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(10);

/// A handle to a virtual machine, running or ended. Dropping it leaves the VM
/// alone.
#[derive(Debug)]
pub struct Vm {
    record: Record,
    /// The VMM process, when this process has started it.
    _child: Option<Process>,
    session: Option<Session>,
    phases: Vec<Phase>,
    pub(crate) warnings: Vec<String>,
}

/// What [`Vm::inspect`] tells.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// What the VM was started with.
    #[serde(flatten)]
    pub config: VmConfig,
    /// What it is doing.
    pub state: StateView,
}

/// What a VM is doing, for people and programs to read.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StateView {
    /// `starting`, `running`, `paused`, `ending` or `exited`; `unresponsive` when its
    /// process does not answer, `damaged` when its record cannot be read.
    pub status: &'static str,
    /// Why it is unresponsive or damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Process identifier of the VMM, while there is one.
    pub pid: Option<u32>,
    /// When the workload was started, in nanoseconds since the Unix epoch; 0 if
    /// it was not.
    pub started_ns: u64,
    /// Identifies the guest since its last start or reset; it finds it in
    /// `/run/sm-epoch`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub epoch: String,
    /// Ports of the guest that the host listens for now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<PublishedPort>,
    /// Exit status, once it has ended.
    pub exit_code: Option<u32>,
    /// Everything else about its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitRecord>,
}

impl Vm {
    pub(crate) fn started(
        record: Record,
        child: Process,
        session: Option<Session>,
        phases: Vec<Phase>,
    ) -> Self {
        Self {
            record,
            _child: Some(child),
            session,
            phases,
            warnings: Vec::new(),
        }
    }

    /// The VM with this name, identifier, or unambiguous prefix of one.
    ///
    /// # Errors
    /// There is none, or several.
    pub fn find(home: &Home, query: &str) -> Result<Self, Error> {
        Ok(Self::from_record(Records::open(home)?.find(query)?))
    }

    /// All VMs whose records can be read, newest first, after cleaning up after
    /// those that died.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn list(home: &Home) -> Result<Vec<Self>, Error> {
        Ok(Self::swept(home)?.0)
    }

    /// Everything about all VMs, newest first, after cleaning up after those that
    /// died, and the records that cannot be read. All VMs are asked at the same
    /// time; those that do not answer within `timeout` are `unresponsive`.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn inspect_all(
        home: &Home,
        timeout: Duration,
    ) -> Result<(Vec<Inspection>, Vec<Damaged>), Error> {
        let (vms, damaged) = Self::swept(home)?;
        let records = vms.into_iter().map(|vm| vm.record).collect();
        Ok((survey::inspect_all(records, timeout), damaged))
    }

    fn swept(home: &Home) -> Result<(Vec<Self>, Vec<Damaged>), Error> {
        let records = Records::open(home)?;
        if let Err(error) = records.sweep() {
            tracing::warn!(%error, "cannot clean up after VMs");
        }
        let (records, damaged) = records.read_all(false)?;
        Ok((
            records.into_iter().map(Self::from_record).collect(),
            damaged,
        ))
    }

    /// Removes the record that cannot be read of the VM whose identifier begins with
    /// `query`.
    ///
    /// # Errors
    /// There is none, or several; its VM is alive; its files cannot be removed.
    pub fn remove_damaged(home: &Home, query: &str) -> Result<(), Error> {
        Ok(Records::open(home)?.remove_damaged(query)?)
    }

    fn from_record(record: Record) -> Self {
        Self {
            record,
            _child: None,
            session: None,
            phases: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Its identifier.
    #[must_use]
    pub fn id(&self) -> &crate::id::VmId {
        &self.record.config().id
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.config().name
    }

    /// What it was started with.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        self.record.config()
    }

    /// When each phase of its start was complete, as far as this handle saw.
    #[must_use]
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// What did not go as it should on the way, and stopped nothing; sentences.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The session with the workload, for a VM that was started attached. Only
    /// the first call returns it; dropping it detaches.
    pub fn take_session(&mut self) -> Option<Session> {
        self.session.take()
    }

    /// Becomes a client of the workload: its output from now on and, with
    /// `stdin`, its input.
    ///
    /// # Errors
    /// It is not running.
    pub fn attach(&self, stdin: bool) -> Result<Session, Error> {
        let control = self.control()?;
        let endpoint = self.record.control_endpoint();
        Ok(Session::attach(endpoint, control, stdin)?)
    }

    fn control(&self) -> Result<Control, Error> {
        Ok(Control::connect(&self.record.control_endpoint())?)
    }

    fn call(&self, call: &ControlCall) -> Result<ControlAnswer, Error> {
        Ok(self.control()?.call(call)?)
    }

    /// Whether it runs, and how it ended if not.
    ///
    /// # Errors
    /// Its record cannot be read.
    pub fn state(&self) -> Result<VmState, Error> {
        Ok(self.record.state()?)
    }

    /// What a running VM is doing.
    ///
    /// # Errors
    /// It is not running, or does not answer.
    pub fn status(&self) -> Result<Status, Error> {
        match self.call(&ControlCall::Status)? {
            ControlAnswer::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Everything about it. A record that cannot be read is one of the states.
    ///
    /// # Errors
    /// It is not there any more.
    pub fn inspect(&self) -> Result<Inspection, Error> {
        let state = match self.record.state() {
            Ok(VmState::Running) => match self.status() {
                Ok(status) => StateView::alive(status),
                Err(error) => StateView::silent(&self.record, &error)?,
            },
            other => StateView::dead(other)?,
        };
        Ok(Inspection {
            config: self.config().clone(),
            state,
        })
    }

    /// Waits for its end. Output that nobody has taken with [`Self::take_session`]
    /// is dropped: the attached session ends, so that the workload is not held up
    /// by output that nobody reads.
    ///
    /// # Errors
    /// It removed itself at its end before anybody could be told.
    pub fn wait(&mut self) -> Result<ExitRecord, Error> {
        // Nobody reads the session any more, so it must not hold up the workload.
        self.session = None;
        if let Ok(mut control) = self.control()
            && let Ok(ControlAnswer::Ended(exit)) = control.call_and_wait(&ControlCall::Wait)
        {
            return Ok(exit);
        }
        self.record.wait_until_dead()?;
        match self.record.state()? {
            VmState::Exited(exit) => Ok(exit),
            VmState::Running => Err(Error::Refused(format!(
                "VM \"{}\" does not tell its exit status",
                self.name()
            ))),
        }
    }

    /// Asks the workload to end, and waits until the VM has: its stop signal,
    /// then SIGKILL after `grace` (the VM's own setting when `None`).
    ///
    /// # Errors
    /// It does not answer. A VM that has ended already is no error.
    pub fn stop(&mut self, grace: Option<Duration>) -> Result<(), Error> {
        let grace_ms = grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
        let mut control = match self.control() {
            Ok(control) => control,
            Err(Error::NotRunning(_)) => return self.ended_or(Error::not_running),
            Err(error) => return Err(error),
        };
        control.call(&ControlCall::Stop { grace_ms })?;
        // The answer, or the end of the connection: both mean it has ended.
        let _ = control.call_and_wait(&ControlCall::Wait);
        Ok(())
    }

    fn ended_or(&self, error: impl Fn(&Record) -> Error) -> Result<(), Error> {
        match self.record.state() {
            Ok(VmState::Exited(_)) => Ok(()),
            _ => Err(error(&self.record)),
        }
    }

    /// Signals the workload's main process.
    ///
    /// # Errors
    /// It is not running.
    pub fn kill(&self, signal: u8) -> Result<(), Error> {
        self.call(&ControlCall::Signal { signal }).map(drop)
    }

    /// A way to signal the workload from other threads.
    #[must_use]
    pub fn signals(&self) -> SignalSender {
        SignalSender {
            record: self.record.clone(),
        }
    }

    /// Holds all vCPUs.
    ///
    /// # Errors
    /// It is not running.
    pub fn pause(&self) -> Result<(), Error> {
        self.call(&ControlCall::Pause).map(drop)
    }

    /// Lets the vCPUs run again.
    ///
    /// # Errors
    /// It is not running.
    pub fn resume(&self) -> Result<(), Error> {
        self.call(&ControlCall::Resume).map(drop)
    }

    /// Puts a VM that was started from a snapshot of a workload back to where it
    /// was then, with another identity. Only what it changed is undone, so this
    /// is faster than starting another. Commands that run beside its workload,
    /// and every connection, end; clients of the workload stay.
    ///
    /// # Errors
    /// It does not run, or was started in another way.
    pub fn reset(&self) -> Result<(), Error> {
        self.control()?.call_and_wait(&ControlCall::Reset)?;
        Ok(())
    }

    /// Usage figures of the guest.
    ///
    /// # Errors
    /// It is not running, or its agent does not answer.
    pub fn stats(&self) -> Result<sm_guest_proto::control::GuestStats, Error> {
        match self.call(&ControlCall::Stats)? {
            ControlAnswer::Stats(stats) => Ok(stats),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins to measure where the time of the VM's connections goes.
    ///
    /// # Errors
    /// It is not running.
    pub fn begin_profile(&self) -> Result<(), Error> {
        match self.call(&ControlCall::Profile { on: true })? {
            ControlAnswer::Profile(_) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// What was measured since [`Self::begin_profile`]; measures no more.
    ///
    /// # Errors
    /// It is not running.
    pub fn end_profile(&self) -> Result<Vec<StageTimes>, Error> {
        match self.call(&ControlCall::Profile { on: false })? {
            ControlAnswer::Profile(times) => Ok(times),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) fn make_snapshot(
        &self,
        name: &str,
        stop: bool,
        ephemeral: bool,
    ) -> Result<Held, Error> {
        let call = ControlCall::Snapshot {
            name: name.to_owned(),
            stop,
            ephemeral,
        };
        let mut control = self.control()?;
        match control.call_and_wait(&call)? {
            ControlAnswer::Snapshot(report) => Ok(Held {
                report,
                _control: control,
            }),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes it: its record, its logs. With `force` a running VM is ended
    /// first, without asking its workload.
    ///
    /// # Errors
    /// It is running and `force` is not set, or files cannot be removed.
    pub fn remove(&mut self, force: bool) -> Result<(), Error> {
        // A record that cannot be read is no process that runs.
        if force && matches!(self.record.state(), Ok(VmState::Running)) {
            self.destroy()?;
        }
        match self.record.remove() {
            // It removed itself at its end.
            Err(RecordError::NotFound(_)) if force => Ok(()),
            other => Ok(other?),
        }
    }

    fn destroy(&mut self) -> Result<(), Error> {
        let mut control = match self.control() {
            Ok(control) => control,
            // It is starting or ending; its lock will tell.
            Err(Error::NotRunning(_)) => return Ok(self.record.wait_until_dead()?),
            Err(error) => return Err(error),
        };
        let operation = "end the VM's process";
        let vmm = |source: io::Error| Error::Vmm { operation, source };
        let pid = control.peer_pid().map_err(vmm)?;
        // While the connection stands, the number is that process's.
        let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| vmm(e.into()))?;
        let asked = control.call(&ControlCall::Destroy);
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(DESTROY_TIMEOUT.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let mut fds = [rustix::event::PollFd::new(
            &process,
            rustix::event::PollFlags::IN,
        )];
        let ended = asked.is_ok()
            && rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&timeout)))
                .is_ok_and(|ready| ready > 0);
        if !ended {
            tracing::warn!(vm = self.name(), "killing a VMM that does not answer");
            pidfd_send_signal(&process, Signal::KILL).map_err(|e| vmm(e.into()))?;
        }
        Ok(self.record.wait_until_dead()?)
    }

    /// A command to run next to the workload.
    pub fn exec<I, S>(&self, command: I) -> ExecBuilder
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        let command = command.into_iter().map(Into::into).collect();
        ExecBuilder::new(self.record.clone(), command)
    }

    /// What the workload wrote.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn logs(&self) -> Result<Logs, Error> {
        Logs::open(self.record.clone())
    }

    /// Path of the guest's console log.
    #[must_use]
    pub fn console_log(&self) -> std::path::PathBuf {
        self.record.directory().join(crate::record::CONSOLE)
    }
}

/// A snapshot that was just made, which the VM's process keeps from being removed
/// while this connection to it stands.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) report: SnapshotReport,
    _control: Control,
}

/// Signals a VM's workload; see [`Vm::signals`].
#[derive(Clone, Debug)]
pub struct SignalSender {
    record: Record,
}

impl SignalSender {
    /// Sends a signal, by a connection of its own, so that it does not wait
    /// behind input that the workload does not read.
    ///
    /// # Errors
    /// The workload is not running.
    pub fn send(&self, signal: u8) -> Result<(), Error> {
        let mut control = Control::connect(&self.record.control_endpoint())?;
        control.call(&ControlCall::Signal { signal })?;
        Ok(())
    }

    /// Asks the workload to end: its stop signal, then SIGKILL after `grace`.
    /// Does not wait.
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
    Error::Refused(format!("the VM's process answered {answer:?}"))
}
