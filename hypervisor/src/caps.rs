//! What a backend can do, as data.

use serde::{Deserialize, Serialize};

/// Who emulates the interrupt controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IrqModel {
    /// The hypervisor: local APICs and IOAPIC, or a GIC.
    InHypervisor,
    /// Local APICs in the hypervisor, IOAPIC in the VMM.
    SplitIoapic,
}

/// How changed guest pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DirtyModel {
    /// A bitmap for each memory slot, on request.
    Bitmap,
    /// Not available: compare or protect pages instead.
    None,
}

/// Whether an unmodified Linux guest can run, and how fast.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinuxSupport {
    /// Guest code runs natively.
    Native,
    /// It cannot: the sentence says what was found.
    Unusable {
        /// What the probe saw, for a person to read.
        reason: String,
    },
}

/// Properties of an opened backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Short name of the backend: `kvm`, `hvf`, `whp`, `fake`.
    pub backend: &'static str,
    /// Who emulates the interrupt controllers.
    pub irq_model: IrqModel,
    /// How changed guest pages are found.
    pub dirty_model: DirtyModel,
    /// Granule for guest memory mappings, in bytes.
    pub page_granule: u64,
    /// Whether a process can have a single VM only.
    pub one_vm_per_process: bool,
    /// Whether a vCPU must be created on the thread that runs it.
    pub thread_affine_vcpus: bool,
    /// Largest number of vCPUs in a VM.
    pub max_vcpus: u32,
    /// Whether and how Linux guests run.
    pub linux: LinuxSupport,
}
