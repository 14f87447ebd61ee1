//! The end of a VM: its reason and its record.

use serde::{Deserialize, Serialize};

use crate::timings::Phase;

/// The reason why a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The workload ended by itself or by a signal.
    Workload,
    /// The VM never came to run its workload.
    StartFailed,
    /// The guest ended under the workload: panic, triple fault, reset.
    GuestFailed,
    /// The VM was ended from outside without waiting for the workload.
    Destroyed,
    /// The VMM ended without leaving word (killed, or the host went down).
    Lost,
    /// A reason that only a later version knows.
    #[serde(other)]
    Other,
}

/// The record of an ended VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Docker's exit status: the workload's own, or 125 when it is not its doing.
    pub status: u32,
    /// The reason for the end.
    pub reason: ExitReason,
    /// A sentence, unless the workload ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The guest's kernel killed processes for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// When, in nanoseconds since the Unix epoch.
    pub finished_ns: u64,
    /// When the workload was started, likewise; 0 if never.
    #[serde(default)]
    pub started_ns: u64,
    /// Peak resident set size of the workload's main process in KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_kib: Option<u64>,
    /// When each phase was reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
}

impl ExitRecord {
    /// The end of a VM whose VMM was killed, or whose host went down.
    #[must_use]
    pub fn lost() -> Self {
        Self {
            status: 137,
            reason: ExitReason::Lost,
            message: Some("the VMM process ended without leaving an exit status".into()),
            oom_killed: false,
            finished_ns: 0,
            started_ns: 0,
            peak_rss_kib: None,
            phases: Vec::new(),
        }
    }
}
