//! The state of a VM, for people and programs to read.

use std::fmt;
use std::time::SystemTime;

use serde::{Serialize, Serializer};
use sm_control::config::ConfigView;
use sm_control::launch::{BalloonReport, HealthReport};
use sm_control::publish::PublishedPort;

use super::StorageView;
use crate::record::{ExitRecord, VmConfig};

/// The result of [`crate::Vm::inspect`].
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Inspection {
    /// The configuration of the VM.
    #[serde(flatten, serialize_with = "as_view")]
    pub config: VmConfig,
    /// The current state.
    pub state: StateView,
    /// Its mounts.
    #[serde(flatten)]
    pub storage: StorageView,
}

fn as_view<S: Serializer>(config: &VmConfig, serializer: S) -> Result<S::Ok, S::Error> {
    ConfigView::from(config.clone()).serialize(serializer)
}

/// The state of a VM, for people and programs to read.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct StateView {
    /// The status.
    pub status: VmStatus,
    /// The cause of [`VmStatus::Unresponsive`], [`VmStatus::Damaged`] or
    /// [`VmStatus::Unsupported`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Process ID of the VMM, while it runs.
    pub pid: Option<u32>,
    /// Start time of the workload, once it has started. Serialized as `started_ns`, in
    /// nanoseconds since the Unix epoch; 0 before the start.
    #[serde(rename = "started_ns", serialize_with = "nanoseconds")]
    pub started: Option<SystemTime>,
    /// Identifies the guest since its last start or reset; the guest reads it from
    /// `/run/sm-epoch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<String>,
    /// Published ports on which the host listens now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<PublishedPort>,
    /// Exit status, once the VM has exited.
    pub exit_code: Option<u32>,
    /// The complete record of the exit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitRecord>,
    /// While the VM runs or is about to be restarted, the record of its previous exit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<ExitRecord>,
    /// Health of the workload, while it runs and is checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthReport>,
    /// Memory that the guest has returned to the host, while the VM runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonReport>,
    /// Number of restarts by the restart policy since a caller started the VM.
    #[serde(rename = "restart_count")]
    pub restarts: u32,
}

/// The status of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VmStatus {
    /// It has never been started.
    Created,
    /// Its workload does not run yet.
    Starting,
    /// Its workload runs.
    Running,
    /// Its vCPUs are paused.
    Paused,
    /// Its workload has ended, and its process is about to.
    Ending,
    /// It has exited, and its process is about to start it again.
    Restarting,
    /// It has exited.
    Exited,
    /// Its process does not answer.
    Unresponsive,
    /// Its record cannot be read.
    Damaged,
    /// Its record is of a later version of this program.
    Unsupported,
}

impl VmStatus {
    /// Returns its name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ending => "ending",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
            Self::Unresponsive => "unresponsive",
            Self::Damaged => "damaged",
            Self::Unsupported => "unsupported",
        }
    }
}

impl fmt::Display for VmStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Serializes a time as nanoseconds since the Unix epoch, 0 if it is absent.
#[expect(clippy::ref_option, reason = "the signature that serde expects")]
fn nanoseconds<S: Serializer>(time: &Option<SystemTime>, to: S) -> Result<S::Ok, S::Error> {
    let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    let nanoseconds = since.and_then(|since| u64::try_from(since.as_nanos()).ok());
    to.serialize_u64(nanoseconds.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn absent_values_are_as_before_in_json() {
        let mut state = StateView {
            status: VmStatus::Starting,
            problem: None,
            pid: None,
            started: None,
            epoch: None,
            published: Vec::new(),
            exit_code: None,
            exit: None,
            last_exit: None,
            health: None,
            balloon: None,
            restarts: 0,
        };
        let json = serde_json::json!({
            "status": "starting", "pid": null, "started_ns": 0, "exit_code": null,
            "restart_count": 0,
        });
        assert_eq!(serde_json::to_value(&state).unwrap(), json);
        state.status = VmStatus::Running;
        state.started = Some(SystemTime::UNIX_EPOCH + Duration::from_nanos(17));
        state.epoch = Some("e".to_owned());
        let json = serde_json::json!({
            "status": "running", "pid": null, "started_ns": 17, "epoch": "e", "exit_code": null,
            "restart_count": 0,
        });
        assert_eq!(serde_json::to_value(&state).unwrap(), json);
        for status in [
            VmStatus::Unresponsive,
            VmStatus::Damaged,
            VmStatus::Unsupported,
            VmStatus::Paused,
        ] {
            let json = serde_json::to_value(status).unwrap();
            assert_eq!(json, status.as_str());
        }
    }
}
