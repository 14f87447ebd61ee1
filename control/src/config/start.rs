//! The settings of a VM's starts, which its record keeps beside the configuration.

use serde::{Deserialize, Serialize};

use crate::paging::Paging;

/// The settings with which a VM is started, each time: the part of a launch request that
/// is neither configuration nor specific to one start. JSON in a VM's `config.json`;
/// members may be added with a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSettingsV1 {
    /// The start source.
    pub source: SettingsSourceV1,
    /// Parameters appended to the kernel's command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Loading of a snapshot's memory.
    #[serde(default)]
    pub paging: Paging,
    /// Size limit of the writable layer in bytes; absent for half of guest memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper_size: Option<u64>,
    /// Size of `/dev/shm` in bytes; absent for the guest's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm_size: Option<u64>,
    /// Additional entries of `/etc/hosts`: address and name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_hosts: Vec<(String, String)>,
    /// Name servers for `/etc/resolv.conf`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Milliseconds that guest and agent have until the workload runs.
    pub start_timeout_ms: u64,
}

/// The source of [`StartSettingsV1`]. The image and the kernel are those of the
/// configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SettingsSourceV1 {
    /// The configuration's image.
    Image {
        /// The kernel is booted, and no snapshot is used or created.
        cold: bool,
    },
    /// The snapshot with this name of a running workload, which continues.
    Snapshot(String),
}
