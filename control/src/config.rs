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
    /// Number of vCPUs.
    pub cpus: u32,
    /// Path of the kernel image that was booted.
    pub kernel: PathBuf,
    /// Remove the VM's record when the VM exits.
    pub auto_remove: bool,
    /// Mount the root file system without a writable layer.
    pub read_only: bool,
    /// Milliseconds between the stop signal and SIGKILL.
    pub stop_timeout_ms: u64,
    /// Guest ports published on the host, as the caller requested them.
    #[serde(default)]
    pub publish: Vec<Publication>,
    /// Milliseconds that a connection to a published port waits for a listener in the
    /// guest.
    #[serde(default = "default_wait_ms")]
    pub publish_wait_ms: u32,
}

/// Default for records written before this field existed.
fn default_wait_ms() -> u32 {
    DEFAULT_WAIT_MS
}
