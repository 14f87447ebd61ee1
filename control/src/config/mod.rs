//! The configuration of a virtual machine, in four forms that change independently.
//!
//! | form | purpose | may change |
//! |---|---|---|
//! | [`VmConfig`] | the API | as Rust interfaces do |
//! | [`LaunchConfig`] | in a launch request, between two processes of one version | freely |
//! | [`StoredConfigV1`] | in the section `vm` of a workload snapshot and, with a version, in a VM's `config.json` ([`RecordConfigV1`]) | by additions with defaults |
//! | [`ConfigView`] | JSON output for people and scripts | by additions |
//!
//! Every other form converts from and to [`VmConfig`]. The conversions name all fields,
//! so a new field does not compile until each form has an answer for it. Golden files in
//! `tests/forms.rs` hold the JSON of the last two.

mod host_options;
mod launch;
mod life;
mod network;
mod record;
mod start;
pub mod stored;
mod view;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use self::host_options::{HostChown, HostOptionError, HostOptionsV1, HostOwner};
pub use self::launch::LaunchConfig;
pub use self::life::{RestartPolicy, UnknownPolicy};
pub use self::network::{HOST_GATEWAY, NetworkConfigV1, NetworkMode};
pub use self::record::{RecordConfigV1, RecordFormError};
pub use self::start::{MountSourceV1, MountV1, SettingsSourceV1, StartSettingsV1};
pub use self::stored::StoredConfigV1;
pub use self::view::ConfigView;
pub use crate::health::HealthCheck;
use crate::id::VmId;
use crate::publish::{DEFAULT_WAIT_MS, Publication};
use crate::workload::Workload;

/// The configuration that a VM was started with.
///
/// ```
/// use sm_control::config::VmConfig;
/// use sm_control::id::VmId;
///
/// let mut config = VmConfig::new(VmId::generate(), "web");
/// config.memory_bytes = 256 << 20;
/// assert_eq!((config.name.as_str(), config.cpus), ("web", 1));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmConfig {
    /// Identifier.
    pub id: VmId,
    /// Name, unique among this user's VMs.
    pub name: String,
    /// The image reference that the caller gave.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Creation time.
    pub created: SystemTime,
    /// The command that runs in the VM.
    pub workload: Workload,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// The part of it that the guest may use, in bytes; the rest is in the balloon.
    pub memory_limit: Option<u64>,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Path of the kernel image that was booted.
    pub kernel: PathBuf,
    /// Remove the VM's record when the VM exits.
    pub auto_remove: bool,
    /// Mount the root file system without a writable layer.
    pub read_only: bool,
    /// Time between the stop signal and SIGKILL.
    pub stop_timeout: Duration,
    /// Guest ports published on the host, as the caller requested them.
    pub publish: Vec<Publication>,
    /// Time that a connection to a published port waits for a listener in the guest.
    pub publish_wait: Duration,
    /// Names and values by which callers find and describe their VMs.
    pub labels: BTreeMap<String, String>,
    /// Condition under which it is started again after its end.
    pub restart: RestartPolicy,
    /// Check of the workload's health.
    pub health: Option<HealthCheck>,
    /// Time that each run may take, after which the VM is stopped.
    pub expire: Option<Duration>,
    /// Its network.
    pub network: NetworkConfigV1,
}

impl VmConfig {
    /// Returns a configuration without image, workload and kernel, with one vCPU, 512 MiB
    /// of memory, and the current time as creation time.
    #[must_use]
    pub fn new(id: VmId, name: impl Into<String>) -> Self {
        Self {
            id,
            name: name.into(),
            image: String::new(),
            image_digest: String::new(),
            created: SystemTime::now(),
            workload: Workload::default(),
            memory_bytes: 512 << 20,
            memory_limit: None,
            cpus: 1,
            kernel: PathBuf::new(),
            auto_remove: false,
            read_only: false,
            stop_timeout: Duration::from_secs(10),
            publish: Vec::new(),
            publish_wait: Duration::from_millis(u64::from(DEFAULT_WAIT_MS)),
            labels: BTreeMap::new(),
            restart: RestartPolicy::No,
            health: None,
            expire: None,
            network: NetworkConfigV1::default(),
        }
    }
}

/// Default of forms written before `publish_wait_ms` existed.
fn default_wait_ms() -> u32 {
    DEFAULT_WAIT_MS
}

/// Nanoseconds since the Unix epoch; 0 for an earlier time.
fn to_ns(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn from_ns(ns: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(ns)
}

fn to_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds of a wait, as far as the type reaches.
fn to_wait_ms(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

fn from_wait_ms(ms: u32) -> Duration {
    Duration::from_millis(u64::from(ms))
}
