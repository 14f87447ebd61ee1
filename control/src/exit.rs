//! Exit reason and exit record of a VM.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::timings::{Phase, system_time};

/// The reason why a VM exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExitReason {
    /// The workload ended by itself or by a signal.
    Workload,
    /// The VM failed before its workload was started.
    StartFailed,
    /// The guest failed while the workload ran: panic, triple fault or reset.
    GuestFailed,
    /// The VM was destroyed without waiting for the workload.
    Destroyed,
    /// The VMM process ended without writing a record: it was killed, or the host went
    /// down.
    Lost,
    /// A reason that only a later version knows.
    #[serde(other)]
    Other,
}

/// A cause of a failure with a remedy, which differs between clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureCause {
    /// The machine was restored from an automatic snapshot, which may be the cause and is
    /// kept: a start from the kernel avoids it.
    AutomaticSnapshot,
    /// The guest's kernel does not see a new VM generation ID: it has to be built with
    /// `CONFIG_VMGENID`, or to be booted instead of restored.
    NoGenerationId,
    /// The caller has no privilege for [`Paging::Userfault`](crate::launch::Paging).
    NoUserfault,
    /// The guest ran out of memory.
    OutOfMemory,
    /// A cause that only a later version knows.
    #[serde(other)]
    Other,
}

/// The record of a VM that has exited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Docker's exit status: that of the workload, or 125 when the VM failed.
    pub status: u32,
    /// The reason for the exit.
    pub reason: ExitReason,
    /// Description of the failure; absent when the workload exited by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Cause of the failure, if it is one for which there is a remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<FailureCause>,
    /// The guest's kernel killed processes for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Time of the exit in nanoseconds since the Unix epoch.
    pub finished_ns: u64,
    /// Start time of the workload in nanoseconds since the Unix epoch; 0 if it never
    /// started.
    #[serde(default)]
    pub started_ns: u64,
    /// Peak resident set size of the workload's main process in KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_kib: Option<u64>,
    /// Phases of the start that were completed, with their times.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
    /// A client asked for the end.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stopped: bool,
    /// The VM's process starts another run, as long as it is there.
    #[serde(default, skip_serializing_if = "is_false")]
    pub restarting: bool,
    /// Number of restarts by the restart policy before this run, since a client started
    /// the VM.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restarts: u32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde expects"
)]
fn is_false(value: &bool) -> bool {
    !value
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde expects"
)]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl ExitRecord {
    /// Returns the start time of the workload; `None` if it never started.
    #[must_use]
    pub fn started(&self) -> Option<SystemTime> {
        system_time(self.started_ns)
    }

    /// Returns the time of the exit; `None` if it is unknown, because the VMM was killed
    /// and the record was not cleaned up yet.
    #[must_use]
    pub fn finished(&self) -> Option<SystemTime> {
        system_time(self.finished_ns)
    }

    /// Record of a VM whose VMM was killed or whose host went down.
    #[must_use]
    pub fn lost() -> Self {
        Self {
            status: 137,
            reason: ExitReason::Lost,
            message: Some("the VMM process ended without leaving an exit status".into()),
            cause: None,
            oom_killed: false,
            finished_ns: 0,
            started_ns: 0,
            peak_rss_kib: None,
            phases: Vec::new(),
            stopped: false,
            restarting: false,
            restarts: 0,
        }
    }
}
