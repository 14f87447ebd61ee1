//! What launcher, VMM and attached clients say to each other.
//!
//! All of it travels in the frames of [`sm_guest_proto::frame`] over unix
//! sockets between processes of one user and one version of this crate: the
//! launcher starts its own executable, and a client that meets another version
//! gets an error reply, because unknown requests do not parse.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sm_guest_proto::control::{Evidence, GuestStats};

use crate::config::VmConfig;
use crate::exit::ExitRecord;
use crate::publish::PublishedPort;
use crate::timings::Phase;

/// The way in which the memory of a snapshot gets into a VM that is restored from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Paging {
    /// Mapped, and read when it is touched; what earlier VMs used is mapped ahead.
    #[default]
    Map,
    /// Mapped, and read before the VM runs: no page of it is waited for later.
    Prefault,
    /// Copied page by page when it is touched, by userfaultfd. Needs the right to
    /// handle faults of the kernel.
    Userfault,
}

/// A piece of the root disk: bytes of one file, in disk order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSegment {
    /// The file; opened read-only by the VMM.
    pub path: PathBuf,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// What a machine starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Its kernel, and the best snapshot of it that there is.
    Image,
    /// Its kernel, and no snapshot; nor is one made.
    Cold,
    /// A snapshot of a workload, which goes on.
    Snapshot(String),
    /// A snapshot; the machine tells what makes it distinct, and ends.
    Evidence(String),
}

/// The launcher's first message (a REQUEST frame), accompanied by the record's
/// lock as a file descriptor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaunchRequest {
    /// Version of the sender's crate; refused when it differs.
    pub version: String,
    /// The caller's directory of data that outlives a reboot: records and images.
    pub data: PathBuf,
    /// The caller's directory of sockets.
    pub run: PathBuf,
    /// The caller's directory of what may be deleted at any time.
    pub cache: PathBuf,
    /// The VM.
    pub config: VmConfig,
    /// Directory of the kernel's modules, if it comes with any.
    pub modules: Option<PathBuf>,
    /// Words added to the kernel's command line.
    pub cmdline: String,
    /// What the machine starts from.
    pub origin: Origin,
    /// How the memory of a snapshot gets into it.
    pub paging: Paging,
    /// The root disk.
    pub root: Vec<DiskSegment>,
    /// Size limit of the writable layer in bytes; 0 for half of guest memory.
    pub upper_size: u64,
    /// Size of `/dev/shm` in bytes; 0 for the default.
    pub shm_size: u64,
    /// Lines for `/etc/hosts`.
    pub extra_hosts: Vec<(String, String)>,
    /// Name servers.
    pub nameservers: Vec<String>,
    /// The launcher stays attached to the workload.
    pub attach: bool,
    /// Terminal size, when on a terminal.
    pub columns: u16,
    /// Likewise.
    pub rows: u16,
    /// How long guest and agent may take until the workload runs.
    pub start_timeout_ms: u64,
    /// Phases reached before the VMM was started.
    pub phases: Vec<Phase>,
}

/// What the VMM reports on the launch stream (CONTROL frames), and to
/// attached clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The program that was started is a VMM. The first message.
    Hello,
    /// A phase is complete.
    Phase(Phase),
    /// Something that did not go as it should, and stopped nothing; a sentence.
    Warning(String),
    /// The workload runs.
    Started {
        /// Its process identifier in the guest.
        pid: u32,
    },
    /// What makes this machine distinct.
    Evidence(Testimony),
    /// The VM has ended; the record, if kept, is on disk. The last message.
    Ended(ExitRecord),
}

/// A request on the control socket (REQUEST frame); each is answered by one
/// [`ControlAnswer`] (CONTROL frame).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlCall {
    /// What the VM is doing.
    Status,
    /// Become a client of the workload: after the answer, the connection
    /// carries exec frames both ways and ends with [`Report::Ended`].
    Attach {
        /// Send STDIN frames.
        stdin: bool,
    },
    /// Signal the workload's main process.
    Signal {
        /// Signal number.
        signal: u8,
    },
    /// End the workload: its stop signal, then SIGKILL. Answered at once.
    Stop {
        /// Milliseconds in between; the VM's own setting if absent.
        grace_ms: Option<u64>,
    },
    /// End the VM at once.
    Destroy,
    /// Hold all vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Usage figures of the guest.
    Stats,
    /// Begin to measure where the time goes, or end it and say.
    Profile {
        /// Begin.
        on: bool,
    },
    /// Make a snapshot of the workload as it runs. Answered when it is
    /// published.
    Snapshot {
        /// Its name.
        name: String,
        /// End the VM afterwards.
        stop: bool,
        /// The last VM that uses it removes it.
        ephemeral: bool,
    },
    /// Put the VM back to the snapshot of a workload that it was started from.
    /// Answered when the workload goes on from there.
    Reset,
    /// Answered when the VM has ended.
    Wait,
    /// Hear of output: answered at once, and again whenever something was logged
    /// since the last answer was taken. The connection ends with the VM.
    Follow,
}

/// The answer to a [`ControlCall`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlAnswer {
    /// Done, or begun.
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
    /// It failed; a sentence.
    Error(String),
}

/// What a stage on the way of a connection's bytes took; see
/// `Stage` of `sm-devices-vsock`. Times are in nanoseconds, and right within an eighth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimes {
    /// Name of the stage.
    pub stage: String,
    /// How often.
    pub count: u64,
    /// All together.
    pub total_ns: u64,
    /// Not exceeded by half of them.
    pub p50_ns: u64,
    /// Not exceeded by nine in ten.
    pub p90_ns: u64,
    /// Not exceeded by 99 in a hundred.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// What a machine told of itself before any workload code ran in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Testimony {
    /// What makes it distinct.
    #[serde(flatten)]
    pub evidence: Evidence,
    /// By how much its clock was outside the time during which it was asked, in
    /// nanoseconds; 0 is best.
    pub clock_error_ns: u64,
}

/// A snapshot that was made of a running VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its name.
    pub name: String,
    /// Pages of guest memory stored.
    pub pages: u64,
    /// The snapshot it builds on.
    pub parent: Option<String>,
    /// How long the workload was frozen, in microseconds.
    pub frozen_us: u64,
    /// How long the vCPUs were held, in microseconds.
    pub paused_us: u64,
}

/// What a live VM is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is in its life.
    pub stage: Stage,
    /// All vCPUs are held.
    pub paused: bool,
    /// Process identifier of its VMM.
    pub vmm_pid: u32,
    /// A UUID, new at every start and reset, which the guest finds in
    /// `/run/sm-epoch`; empty before it was sent.
    pub epoch: String,
    /// When the workload was started, in nanoseconds since the Unix epoch; 0
    /// before.
    pub started_ns: u64,
    /// Number of attached clients.
    pub clients: usize,
    /// Ports that are published, with their addresses on the host.
    pub published: Vec<PublishedPort>,
}

/// Where a live VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// On its way to the workload.
    Starting,
    /// The workload runs.
    Running,
    /// The workload has ended, the VM is about to.
    Ending,
}
