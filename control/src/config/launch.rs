//! The configuration in a launch request.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    HealthCheck, NetworkConfigV1, RestartPolicy, VmConfig, from_ns, from_wait_ms, to_ms, to_ns,
    to_wait_ms,
};
use crate::id::VmId;
use crate::publish::Publication;
use crate::workload::Workload;

/// The configuration in a launch request. Both processes are of one version, which the
/// VMM checks by [`LaunchRequest::version`](crate::launch::LaunchRequest::version).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchConfig {
    /// Identifier.
    pub id: VmId,
    /// Name.
    pub name: String,
    /// The image reference that the caller gave.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Creation time in nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// The command that runs in the VM.
    pub workload: Workload,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The part of it that the guest may use, in bytes.
    pub memory_limit: Option<u64>,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Path of the kernel image that was booted.
    pub kernel: PathBuf,
    /// The VM's record is removed when the VM exits.
    pub auto_remove: bool,
    /// The root file system has no writable layer.
    pub read_only: bool,
    /// Milliseconds between the stop signal and SIGKILL.
    pub stop_timeout_ms: u64,
    /// Guest ports published on the host, as the caller requested them.
    pub publish: Vec<Publication>,
    /// Milliseconds that a connection to a published port waits for a listener in the
    /// guest.
    pub publish_wait_ms: u32,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Condition under which it is started again.
    pub restart: RestartPolicy,
    /// Check of the workload's health.
    pub health: Option<HealthCheck>,
    /// Milliseconds that each run may take.
    pub expire_ms: Option<u64>,
    /// Its network.
    pub network: NetworkConfigV1,
}

impl From<VmConfig> for LaunchConfig {
    fn from(config: VmConfig) -> Self {
        let VmConfig {
            id,
            name,
            image,
            image_digest,
            created,
            workload,
            memory_bytes,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout,
            publish,
            publish_wait,
            labels,
            restart,
            health,
            expire,
            network,
        } = config;
        Self {
            id,
            name,
            image,
            image_digest,
            created_ns: to_ns(created),
            workload,
            memory: memory_bytes,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms: to_ms(stop_timeout),
            publish,
            publish_wait_ms: to_wait_ms(publish_wait),
            labels,
            restart,
            health,
            expire_ms: expire.map(to_ms),
            network,
        }
    }
}

impl From<LaunchConfig> for VmConfig {
    fn from(config: LaunchConfig) -> Self {
        let LaunchConfig {
            id,
            name,
            image,
            image_digest,
            created_ns,
            workload,
            memory,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms,
            publish,
            publish_wait_ms,
            labels,
            restart,
            health,
            expire_ms,
            network,
        } = config;
        Self {
            id,
            name,
            image,
            image_digest,
            created: from_ns(created_ns),
            workload,
            memory_bytes: memory,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout: Duration::from_millis(stop_timeout_ms),
            publish,
            publish_wait: from_wait_ms(publish_wait_ms),
            labels,
            restart,
            health,
            expire: expire_ms.map(Duration::from_millis),
            network,
        }
    }
}
