//! The configuration as JSON for people and scripts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::stored::{PublicationV1, WorkloadV1};
use super::{HealthCheck, NetworkConfigV1, RestartPolicy, VmConfig, to_ms, to_ns, to_wait_ms};
use crate::id::VmId;

/// The configuration as it is printed. Members are added, but not renamed or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConfigView {
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
    pub workload: WorkloadV1,
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
    pub publish: Vec<PublicationV1>,
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

impl From<VmConfig> for ConfigView {
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
            workload: workload.into(),
            memory: memory_bytes,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms: to_ms(stop_timeout),
            publish: publish.into_iter().map(Into::into).collect(),
            publish_wait_ms: to_wait_ms(publish_wait),
            labels,
            restart,
            health,
            expire_ms: expire.map(to_ms),
            network,
        }
    }
}
