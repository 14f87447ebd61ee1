//! The settings of a VM's starts, which its record keeps beside the configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::HostOptionsV1;
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
    /// Capacity in bytes of the disk for changes to the root; absent if they are in guest
    /// memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_disk: Option<u64>,
    /// Size limit of changes in guest memory in bytes; absent for half of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper_size: Option<u64>,
    /// Size of `/dev/shm` in bytes; absent for the guest's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm_size: Option<u64>,
    /// Mounts in the workload's file system.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountV1>,
    /// Directories that the image declares as volumes and that are in the root instead:
    /// there are more than a VM has disks, or the guest's own file systems are there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes_in_root: Vec<String>,
    /// Milliseconds that guest and agent have until the workload runs.
    pub start_timeout_ms: u64,
}

/// A mount of [`StartSettingsV1`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountV1 {
    /// The mounted file system.
    pub source: MountSourceV1,
    /// Absolute path in the workload's root.
    pub target: String,
    /// The workload cannot write to it.
    #[serde(default)]
    pub read_only: bool,
    /// It is left out if the image has no directory at the target, and none can be created.
    #[serde(default, skip_serializing_if = "is_false")]
    pub optional: bool,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature that serde expects"
)]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// The file system of a [`MountV1`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSourceV1 {
    /// A volume.
    Volume {
        /// Its name; absent for a disk in the VM's record.
        name: Option<String>,
        /// The image's files at the target are copied to an empty volume.
        copy: bool,
        /// It was created for this VM, under a generated name.
        #[serde(default, skip_serializing_if = "is_false")]
        anonymous: bool,
    },
    /// A directory or a regular file of the host.
    Host {
        /// Its absolute path, which is resolved at each start.
        path: PathBuf,
        /// Options.
        #[serde(default, flatten)]
        options: HostOptionsV1,
    },
    /// Guest memory.
    Tmpfs {
        /// Limit in bytes; absent for half of guest memory.
        size: Option<u64>,
        /// Permissions of its root directory; absent for 1777.
        mode: Option<u32>,
    },
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
