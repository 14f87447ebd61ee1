//! The configuration in a workload snapshot.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::stored::{PublicationV1, WorkloadV1};
use super::{
    LaunchConfig, VmConfig, default_wait_ms, from_ns, from_wait_ms, to_ms, to_ns, to_wait_ms,
};
use crate::id::VmId;

/// The configuration of the VM that a workload snapshot was taken of. Its version is
/// that of the section which contains it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotConfigV1 {
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
    #[serde(default)]
    pub publish: Vec<PublicationV1>,
    /// Milliseconds that a connection to a published port waits for a listener in the
    /// guest.
    #[serde(default = "default_wait_ms")]
    pub publish_wait_ms: u32,
}

impl From<VmConfig> for SnapshotConfigV1 {
    fn from(config: VmConfig) -> Self {
        let VmConfig {
            id,
            name,
            image,
            image_digest,
            created,
            workload,
            memory_bytes,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout,
            publish,
            publish_wait,
        } = config;
        Self {
            id,
            name,
            image,
            image_digest,
            created_ns: to_ns(created),
            workload: workload.into(),
            memory: memory_bytes,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms: to_ms(stop_timeout),
            publish: publish.into_iter().map(Into::into).collect(),
            publish_wait_ms: to_wait_ms(publish_wait),
        }
    }
}

impl From<SnapshotConfigV1> for VmConfig {
    fn from(config: SnapshotConfigV1) -> Self {
        let SnapshotConfigV1 {
            id,
            name,
            image,
            image_digest,
            created_ns,
            workload,
            memory,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms,
            publish,
            publish_wait_ms,
        } = config;
        Self {
            id,
            name,
            image,
            image_digest,
            created: from_ns(created_ns),
            workload: workload.into(),
            memory_bytes: memory,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout: Duration::from_millis(stop_timeout_ms),
            publish: publish.into_iter().map(Into::into).collect(),
            publish_wait: from_wait_ms(publish_wait_ms),
        }
    }
}

impl From<LaunchConfig> for SnapshotConfigV1 {
    fn from(config: LaunchConfig) -> Self {
        VmConfig::from(config).into()
    }
}
