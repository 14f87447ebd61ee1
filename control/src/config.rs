//! The configuration that a VM was started with.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::id::VmId;
use crate::publish::{DEFAULT_WAIT_MS, Publication};
use crate::workload::Workload;

/// The configuration that a VM was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Identifier.
    pub id: VmId,
    /// Name, unique among this user's VMs.
    pub name: String,
    /// The image as the caller named it.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// The command that runs in it.
    pub workload: Workload,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The kernel booted.
    pub kernel: PathBuf,
    /// Remove the record when the VM ends.
    pub auto_remove: bool,
    /// Root file system without an upper layer.
    pub read_only: bool,
    /// Milliseconds between the stop signal and SIGKILL.
    pub stop_timeout_ms: u64,
    /// Ports of the guest that are published on the host, as asked for.
    #[serde(default)]
    pub publish: Vec<Publication>,
    /// Milliseconds that a connection to one of them waits for somebody in the guest
    /// to listen.
    #[serde(default = "default_wait_ms")]
    pub publish_wait_ms: u32,
}

/// The value of records that were written before it could be chosen.
fn default_wait_ms() -> u32 {
    DEFAULT_WAIT_MS
}
