//! The stage that a VM is in, with what exists in that stage only.
//!
//! ```text
//!            workload started          exit, failure, kill
//! Starting ─────────────────▶ Running ────────────────────▶ Ending
//!     │                        │   ▲                          ▲
//!     │                  reset ▼   │ workload started         │
//!     │                      Resetting ───────────────────────┤
//!     └───────────────────────────────────────────────────────┘
//! ```
//!
//! A `match` of the stage, here and in the handlers of messages and deadlines, has no
//! wildcard arm: a new stage does not compile until each of them has an answer for it, and a
//! case such as a stop of a VM that is being reset is an arm that exists in the code. Code
//! that concerns one stage only (`if let`) does nothing in the others.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sm_control::exit::ExitRecord;
use sm_control::launch::{self, RestartProgress};

use crate::guest::SnapshotPlan;

/// See the module's documentation.
#[derive(Debug)]
pub(super) enum SupervisorStage {
    /// The workload does not run yet.
    Starting(Startup),
    /// It runs, or would if the machine were not held.
    Running(RunningStage),
    /// The machine is restored to the snapshot of its workload.
    Resetting(Resetting),
    /// The VM has ended, and its machine is on its way out.
    Ending(Ending),
}

/// The way from a machine to a workload.
#[derive(Debug, Default)]
pub(super) enum Startup {
    /// The agent has not dialled, and has not been called.
    #[default]
    AgentAwaited,
    /// The machine is held while its memory is copied for the cache.
    Copying {
        next: StartupStep,
        /// The time to start that was left when the machine was held. Copying takes as
        /// long as it takes, which is no fault of the guest's.
        remaining: Option<Duration>,
    },
    /// The agent is there, and the guest gets its identity and its root.
    Preparing,
    /// The request for the workload has been sent; input may follow.
    Requested,
}

/// The next step of a startup after the memory of its machine was copied.
#[derive(Debug)]
pub(super) enum StartupStep {
    /// The conversation with the agent, which has dialled: a base snapshot is made.
    Agent(UnixStream),
    /// The workload: an image snapshot is made.
    Workload,
}

/// A workload that runs.
#[derive(Debug, Default)]
pub(super) struct RunningStage {
    pub(super) machine: MachineActivity,
    /// The snapshot that is published beside the running machine.
    pub(super) publishing: Option<SnapshotJob>,
    /// The workload is asked to stop, and may take this long once it can.
    pub(super) stop_grace: Option<Duration>,
}

/// State of the machine of a running workload.
#[derive(Debug, Default)]
pub(super) enum MachineActivity {
    /// The machine runs.
    #[default]
    Free,
    /// Paused by a client.
    Paused,
    /// Paused until the host has space for what the guest writes.
    NoSpace,
    /// The machine runs, and its agent freezes the workload and writes back dirty data.
    Preparing(SnapshotJob),
    /// Paused while its memory is copied.
    Copying(SnapshotJob),
    /// Its memory was copied; paused until the snapshot is published.
    Publishing(SnapshotJob),
}

/// A machine that is restored to its snapshot.
#[derive(Debug)]
pub(super) struct Resetting {
    /// The client that asked for it.
    pub(super) client: u64,
    pub(super) startup: Startup,
}

/// A VM that has ended.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) exit: ExitRecord,
    /// The exit record could not be written, and is tried again.
    pub(super) unwritten: bool,
    pub(super) machine: MachineEnd,
    /// The machine was held when the VM ended, and is until its memory was copied.
    pub(super) copying: Option<Copied>,
    /// The captured snapshot that is still being published.
    pub(super) publishing: Option<SnapshotJob>,
    /// The next run, if there is one.
    pub(super) restart: Option<PendingRestart>,
}

/// The next run of a VM that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingRestart {
    pub(super) progress: RestartProgress,
    /// The wait is over.
    pub(super) due: bool,
    /// Clients of the run before had their time to read its last bytes.
    pub(super) late: bool,
}

/// The purpose of a copy of memory that is complete when its VM has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copied {
    /// The cache of snapshots: it is published.
    ForCache,
    /// A client, which was answered that there is no snapshot.
    Discarded,
}

/// Progress of the end of a machine whose VM has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MachineEnd {
    /// Bytes that the guest has sent to published ports are on their way.
    Delivering,
    /// The guest is asked to power itself off.
    PoweringOff,
    /// The machine is asked to end.
    Stopping,
    /// The guest has powered itself off, and the last bytes of its commands are on their way
    /// to clients.
    Draining,
    /// The machine has ended.
    Ended,
}

/// A snapshot on its way that a client asked for.
#[derive(Debug)]
pub(super) struct SnapshotJob {
    /// Tells answers to it from answers to an earlier one.
    pub(super) id: u64,
    /// The client that asked for it.
    pub(super) client: u64,
    pub(super) plan: SnapshotPlan,
    pub(super) requested_at: Instant,
    pub(super) frozen_us: u64,
    /// A sentence about a part of the VM that clones cannot have.
    pub(super) warning: Option<String>,
}

impl Startup {
    /// Returns whether the machine is held.
    pub(super) fn is_copying(&self) -> bool {
        matches!(self, Self::Copying { .. })
    }

    /// Returns the purpose of a copy that is not complete when the VM ends.
    pub(super) fn copying(&self) -> Option<Copied> {
        self.is_copying().then_some(Copied::ForCache)
    }
}

impl MachineActivity {
    /// Returns whether the machine is paused, and nothing else happens with it.
    pub(super) fn is_paused(&self) -> bool {
        match self {
            Self::Paused | Self::NoSpace => true,
            Self::Free | Self::Preparing(_) | Self::Copying(_) | Self::Publishing(_) => false,
        }
    }
}

impl RunningStage {
    /// The snapshot that a client waits for.
    fn job(&self) -> Option<&SnapshotJob> {
        match &self.machine {
            MachineActivity::Preparing(job)
            | MachineActivity::Copying(job)
            | MachineActivity::Publishing(job) => Some(job),
            MachineActivity::Free | MachineActivity::Paused | MachineActivity::NoSpace => {
                self.publishing.as_ref()
            }
        }
    }
}

impl SupervisorStage {
    /// The stage as clients know it.
    pub(super) fn public(&self) -> launch::Stage {
        match self {
            Self::Starting(_) => launch::Stage::Starting,
            Self::Running(_) | Self::Resetting(_) => launch::Stage::Running,
            Self::Ending(_) => launch::Stage::Ending,
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        match self {
            Self::Running(running) => running.machine.is_paused(),
            Self::Starting(_) | Self::Resetting(_) | Self::Ending(_) => false,
        }
    }

    /// Returns whether the machine is paused until the host has space.
    pub(super) fn lacks_space(&self) -> bool {
        match self {
            Self::Running(running) => matches!(running.machine, MachineActivity::NoSpace),
            Self::Starting(_) | Self::Resetting(_) | Self::Ending(_) => false,
        }
    }

    /// Returns whether the machine is held while its memory is copied.
    pub(super) fn is_copying(&self) -> bool {
        match self {
            Self::Starting(startup) | Self::Resetting(Resetting { startup, .. }) => {
                startup.is_copying()
            }
            Self::Running(running) => matches!(running.machine, MachineActivity::Copying(_)),
            Self::Ending(ending) => ending.copying.is_some(),
        }
    }

    /// Returns whether the guest cannot answer, as its vCPUs are paused.
    pub(super) fn is_halted(&self) -> bool {
        match self {
            Self::Running(running) => match running.machine {
                MachineActivity::Paused
                | MachineActivity::NoSpace
                | MachineActivity::Copying(_)
                | MachineActivity::Publishing(_) => true,
                MachineActivity::Free | MachineActivity::Preparing(_) => false,
            },
            Self::Starting(_) | Self::Resetting(_) | Self::Ending(_) => self.is_copying(),
        }
    }

    /// The way to the workload, while it does not run.
    pub(super) fn startup(&mut self) -> Option<&mut Startup> {
        match self {
            Self::Starting(startup) | Self::Resetting(Resetting { startup, .. }) => Some(startup),
            Self::Running(_) | Self::Ending(_) => None,
        }
    }

    /// The exit record of a VM that has ended.
    pub(super) fn exit(&self) -> Option<&ExitRecord> {
        match self {
            Self::Ending(ending) => Some(&ending.exit),
            Self::Starting(_) | Self::Running(_) | Self::Resetting(_) => None,
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.exit().is_some()
    }

    /// Returns whether the VM has ended and its exit record could not be written.
    pub(super) fn is_unwritten(&self) -> bool {
        match self {
            Self::Ending(ending) => ending.unwritten,
            Self::Starting(_) | Self::Running(_) | Self::Resetting(_) => false,
        }
    }

    /// Returns true if the VM has ended, and this process starts another run.
    pub(super) fn is_restarting(&self) -> bool {
        self.restart().is_some()
    }

    /// Returns true if the next run can start, as far as its time has come.
    pub(super) fn is_restart_due(&self) -> bool {
        self.restart().is_some_and(|restart| restart.due)
    }

    fn restart(&self) -> Option<&PendingRestart> {
        match self {
            Self::Ending(ending) => ending.restart.as_ref(),
            Self::Starting(_) | Self::Running(_) | Self::Resetting(_) => None,
        }
    }

    /// Progress of the end of the machine.
    pub(super) fn machine_end(&self) -> Option<MachineEnd> {
        match self {
            Self::Ending(ending) => Some(ending.machine),
            Self::Starting(_) | Self::Running(_) | Self::Resetting(_) => None,
        }
    }

    /// The snapshot that a client waits for.
    pub(super) fn job(&self) -> Option<&SnapshotJob> {
        match self {
            Self::Running(running) => running.job(),
            Self::Ending(ending) => ending.publishing.as_ref(),
            Self::Starting(_) | Self::Resetting(_) => None,
        }
    }

    /// The client that is answered when what it asked for is complete.
    pub(super) fn awaited_by(&self) -> Option<u64> {
        match self {
            Self::Resetting(resetting) => Some(resetting.client),
            Self::Running(_) | Self::Ending(_) => self.job().map(|job| job.client),
            Self::Starting(_) => None,
        }
    }
}
