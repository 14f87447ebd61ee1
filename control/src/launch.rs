//! Messages between the launcher, the VMM and its clients.
//!
//! All messages travel in the frames of [`sm_guest_proto::frame`] over unix sockets
//! between processes of one user. Launcher and VMM are one version of this crate: the
//! launcher starts its own executable, or another one that refuses any other version. A
//! client of another version gets an error reply for a request that the VMM cannot parse.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sm_guest_proto::control::{GuestStats, IdentityReport};
use thiserror::Error;

use crate::VERSION;
use crate::config::{HostOptionsV1, LaunchConfig};
use crate::exit::ExitRecord;
pub use crate::paging::Paging;
use crate::publish::PublishedPort;
use crate::timings::Phase;

/// A segment of the root disk: a range of bytes of one file. Segments are in disk order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSegment {
    /// Path of the file, which the VMM opens read-only.
    pub path: PathBuf,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A mount in the file system of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRequest {
    /// The mounted file system.
    pub source: MountSource,
    /// Absolute path in the workload's root. Links in it are resolved there, and missing
    /// directories are created.
    pub target: String,
    /// The workload cannot write to it.
    pub read_only: bool,
    /// It is left out if there is no directory at the target, and none can be created.
    #[serde(default)]
    pub optional: bool,
}

/// The file system of a [`MountRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// A volume.
    Volume {
        /// Its name, for messages; empty without a directory.
        name: String,
        /// Its directory, which contains its lock and its disk; absent for a disk in the
        /// record of the VM.
        directory: Option<PathBuf>,
        /// The files that the image has at the target are copied to an empty volume.
        copy: bool,
    },
    /// A directory of the host, or one file of it.
    Host {
        /// Absolute path of the directory, in which no component is a link.
        directory: PathBuf,
        /// Name of the file.
        file: Option<String>,
        /// Options.
        options: HostOptionsV1,
        /// It is a volume, whose files have the owners that guests gave them.
        #[serde(default)]
        volume: Option<VolumeShare>,
    },
    /// Guest memory.
    Tmpfs {
        /// Limit in bytes; absent for half of guest memory.
        size: Option<u64>,
        /// Permissions of its root directory; absent for 1777.
        mode: Option<u32>,
    },
}

/// A volume that is a directory of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeShare {
    /// Its name, for messages.
    pub name: String,
    /// The files that the image has at the target are copied to an empty volume.
    pub copy: bool,
}

/// The purpose of a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaunchPurpose {
    /// The workload runs.
    #[default]
    Workload,
    /// The files of an idle VM are accessed. Its root is mounted, no workload runs, and its
    /// record does not change. The machine ends when its launcher disconnects.
    Files,
}

/// The source that a VM starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartSource {
    /// An image.
    Image(ImageSource),
    /// The snapshot with this name of a running workload, which continues.
    Snapshot(String),
    /// The snapshot with this name. The VM sends its identity report and exits.
    IdentityReport(String),
}

/// An image as a start source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// Segments of the root disk.
    pub root: Vec<DiskSegment>,
    /// Directory of the kernel's modules, if the kernel has any.
    pub modules: Option<PathBuf>,
    /// The VM boots the kernel, and no snapshot is used or created; otherwise it starts
    /// from the best matching automatic snapshot, or boots if there is none.
    pub cold: bool,
}

/// The launcher's first message, a REQUEST frame. The descriptor of the record's lock is
/// passed with it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaunchRequest {
    /// Version of the sender's crate. The VMM refuses any version other than its own.
    pub version: String,
    /// The caller's directory for data that survives a reboot: records and images.
    pub data: PathBuf,
    /// The caller's directory for sockets.
    pub run: PathBuf,
    /// The caller's directory for data that may be deleted at any time.
    pub cache: PathBuf,
    /// Configuration of the VM.
    pub config: LaunchConfig,
    /// The purpose.
    pub purpose: LaunchPurpose,
    /// Parameters appended to the kernel's command line.
    pub cmdline: String,
    /// The start source.
    pub source: StartSource,
    /// Loading of the snapshot's memory.
    pub paging: Paging,
    /// Capacity in bytes of the disk for changes to the root; absent if they are in guest
    /// memory.
    pub root_disk: Option<u64>,
    /// Size limit of changes in guest memory in bytes; absent for half of it.
    pub upper_size: Option<u64>,
    /// Size of `/dev/shm` in bytes; absent for the guest's default.
    pub shm_size: Option<u64>,
    /// Mounts in the workload's file system, parents before children.
    #[serde(default)]
    pub mounts: Vec<MountRequest>,
    /// The launcher stays attached to the workload.
    pub attach: bool,
    /// Terminal width in columns, if the workload has a terminal.
    pub columns: u16,
    /// Terminal height in rows, if the workload has a terminal.
    pub rows: u16,
    /// Milliseconds that guest and agent have until the workload runs.
    pub start_timeout_ms: u64,
    /// Phases completed before the VMM was started.
    pub phases: Vec<Phase>,
    /// The record existed before this start: it stays if the start fails.
    pub existing: bool,
    /// Restarts by the restart policy that led to this start.
    pub restarts: RestartProgress,
}

/// Progress of the restarts of a VM since a client started it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartProgress {
    /// Number of restarts.
    pub count: u32,
    /// Milliseconds that the VM's process waited before the last one.
    pub delay_ms: u64,
}

/// Failure to read a [`LaunchRequest`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LaunchRequestError {
    /// It is not the JSON of a request.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// Its sender is of another version.
    #[error("the launcher is of version {0}, and this program of version {VERSION}")]
    OtherVersion(String),
}

impl LaunchRequest {
    /// Reads a request of this version.
    ///
    /// # Errors
    /// See [`LaunchRequestError`].
    pub fn from_json(json: &[u8]) -> Result<Self, LaunchRequestError> {
        /// The member that decides whether the others are known.
        #[derive(Deserialize)]
        struct Version {
            version: String,
        }
        match serde_json::from_slice::<Version>(json)?.version {
            version if version == VERSION => Ok(serde_json::from_slice(json)?),
            other => Err(LaunchRequestError::OtherVersion(other)),
        }
    }
}

/// Reports of the VMM on the launch stream and to attached clients (CONTROL frames).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmReport {
    /// The process that was started is a VMM. Always the first message.
    Hello,
    /// A phase is complete.
    Phase(Phase),
    /// A failure that the start survived, in a sentence.
    Warning(String),
    /// The workload runs, or files can be accessed.
    Started {
        /// Process identifier of the workload in the guest; 0 without a workload.
        pid: u32,
    },
    /// The identity report of this VM.
    #[serde(rename = "evidence")]
    IdentityReport(VmIdentityReport),
    /// The VM has exited. Its record, unless it is removed, is on disk. Always the last
    /// message.
    Ended(ExitRecord),
}

/// A request on the control socket (REQUEST frame). Each is answered by one
/// [`ControlAnswer`] (CONTROL frame).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlCall {
    /// Report the status of the VM.
    Status,
    /// Become a client of the workload: after the answer, the connection
    /// carries exec frames both ways and ends with [`VmmReport::Ended`].
    Attach {
        /// The client will send STDIN frames.
        stdin: bool,
    },
    /// Send a signal to the workload's main process. Answered when the guest has delivered
    /// it or failed to, or has not answered in time. While the VM is paused or copied for a
    /// snapshot, answered immediately, as the signal is pending until the VM continues.
    /// SIGKILL resumes a paused VM and cancels a snapshot.
    Signal {
        /// Signal number.
        signal: u8,
    },
    /// Send the workload its stop signal, then SIGKILL. Answered immediately.
    Stop {
        /// Milliseconds between the two; absent for the VM's own setting.
        grace_ms: Option<u64>,
    },
    /// Terminate the VM immediately.
    Destroy,
    /// Pause all vCPUs.
    Pause,
    /// Resume all vCPUs.
    Resume,
    /// Limit the memory that the guest may use. Answered immediately; the guest follows.
    LimitMemory {
        /// The limit in bytes; absent for all of the VM's memory.
        bytes: Option<u64>,
    },
    /// Replace the rules of the network. Answered once they hold for each new connection;
    /// those that they refuse end soon after.
    NetworkRules {
        /// See [`NetworkConfigV1::allow`](crate::config::NetworkConfigV1::allow).
        allow: Vec<String>,
        /// See [`NetworkConfigV1::deny`](crate::config::NetworkConfigV1::deny).
        deny: Vec<String>,
    },
    /// Usage figures of the guest.
    Stats,
    /// Start or stop profiling of the vsock device. Stopping returns the measurements.
    Profile {
        /// Start profiling if true, stop it if false.
        on: bool,
    },
    /// Create a snapshot of the running workload. Answered once the snapshot is
    /// published.
    Snapshot {
        /// Name of the snapshot.
        name: String,
        /// Terminate the VM afterwards.
        stop: bool,
        /// The last VM that uses the snapshot removes it.
        ephemeral: bool,
    },
    /// Reset the VM to the workload snapshot that it was started from. Answered once the
    /// workload runs again.
    Reset,
    /// Wait for the VM to exit. Answered when it has.
    Wait,
    /// Subscribe to output notifications. Answered immediately, and again whenever output
    /// was logged since the client read the last answer. The connection closes when the
    /// VM exits.
    Follow,
}

/// The answer to a [`ControlCall`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlAnswer {
    /// The request was carried out, or was started where it is answered immediately.
    Done,
    /// Answer to [`ControlCall::Status`].
    Status(Status),
    /// Answer to [`ControlCall::Stats`].
    Stats(GuestStats),
    /// Answer to [`ControlCall::Profile`].
    Profile(Vec<StageTimes>),
    /// Answer to [`ControlCall::Snapshot`].
    Snapshot(SnapshotReport),
    /// Answer to [`ControlCall::Wait`].
    Ended(ExitRecord),
    /// The request failed, for this reason.
    Error(String),
}

/// Latency statistics of one stage in the path of a connection's bytes; see `Stage` of
/// `sm-devices-vsock`. Times are in nanoseconds with an error of at most one eighth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimes {
    /// Name of the stage.
    pub stage: String,
    /// Number of measurements.
    pub count: u64,
    /// Sum of all measurements.
    pub total_ns: u64,
    /// 50th percentile.
    pub p50_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// Maximum.
    pub max_ns: u64,
}

/// Identity report of a VM, taken before any workload code ran in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIdentityReport {
    /// The identity that the guest's processes see.
    #[serde(flatten)]
    pub identity_report: IdentityReport,
    /// Distance of the guest's clock from the interval in which the report was requested
    /// and answered, in nanoseconds; 0 if the clock was within it.
    pub clock_error_ns: u64,
}

/// Description of a snapshot created from a running VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Name of the snapshot.
    pub name: String,
    /// Number of guest memory pages stored.
    pub pages: u64,
    /// Name of the parent snapshot, if the snapshot is incremental.
    pub parent: Option<String>,
    /// Time for which the workload was frozen, in microseconds.
    pub frozen_us: u64,
    /// Time for which the vCPUs were paused, in microseconds.
    pub paused_us: u64,
    /// Sentences about parts of the VM that clones cannot have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Status of a running VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Stage of the VM's life cycle.
    pub stage: Stage,
    /// All vCPUs are paused.
    pub paused: bool,
    /// They are paused until the host has disk space for what the guest writes.
    #[serde(default)]
    pub lacks_space: bool,
    /// Process identifier of its VMM.
    pub vmm_pid: u32,
    /// A UUID that is new after every start and reset and that the guest reads from
    /// `/run/sm-epoch`. Empty until it was sent to the guest.
    pub epoch: String,
    /// Start time of the workload in nanoseconds since the Unix epoch; 0 before it
    /// starts.
    pub started_ns: u64,
    /// Number of attached clients.
    pub clients: usize,
    /// Published ports with their addresses on the host.
    pub published: Vec<PublishedPort>,
    /// The VM has ended, and its process waits before it starts it again.
    #[serde(default)]
    pub restarting: bool,
    /// Number of restarts by the restart policy since a client started the VM.
    #[serde(default)]
    pub restarts: u32,
    /// Health of the workload, if it is checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthReport>,
    /// Memory that the guest has returned to the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonReport>,
}

/// Memory that a guest has returned to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonReport {
    /// The size in bytes that the balloon has to have.
    pub target: u64,
    /// Its size in bytes, according to the guest.
    pub size: u64,
    /// All memory in bytes that was returned since the VM's process was started, by the
    /// balloon and by reports of free memory. The guest may use some of it again.
    pub returned: u64,
}

/// The health of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthReport {
    /// The status.
    pub status: HealthStatus,
    /// Number of consecutive failures.
    pub failing_streak: u32,
    /// The last results, oldest first, at most five.
    #[serde(rename = "log")]
    pub results: Vec<HealthResult>,
}

/// The status of a [`HealthReport`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HealthStatus {
    /// No check has succeeded yet, and not enough have failed.
    #[default]
    Starting,
    /// The last check that counted has succeeded, or not enough have failed since.
    Healthy,
    /// As many checks as permitted have failed, one after another.
    Unhealthy,
    /// A status that only a later version knows.
    #[serde(other)]
    Other,
}

impl HealthStatus {
    /// Returns its name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Other => "other",
        }
    }
}

/// The result of a health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthResult {
    /// Start time in nanoseconds since the Unix epoch.
    pub start_ns: u64,
    /// End time in nanoseconds since the Unix epoch.
    pub end_ns: u64,
    /// Exit status of the command; 124 if it did not end in time, 125 if it could not be
    /// run.
    pub exit_code: u32,
    /// The beginning of its output, at most 1000 bytes, without control characters.
    pub output: String,
}

/// Stages in the life cycle of a running VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The workload has not been started yet.
    Starting,
    /// The workload runs.
    Running,
    /// The workload has exited and the VM is shutting down.
    Ending,
}
