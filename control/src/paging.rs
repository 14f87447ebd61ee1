//! Loading of guest memory.

use serde::{Deserialize, Serialize};

/// Loading of guest memory when a VM is restored from a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Paging {
    /// The memory file is mapped and pages are read on first access. Pages that earlier
    /// VMs used are mapped in advance.
    #[default]
    Map,
    /// The memory file is mapped and read completely before the VM runs, so that no later
    /// access waits for the disk.
    Prefault,
    /// Pages are copied on first access through userfaultfd. Requires the privilege to
    /// handle faults of the kernel.
    Userfault,
}
