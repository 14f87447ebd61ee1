//! A machine's saved state, without its memory.
//!
//! Compatibility: [`MachineState::version`] is the [`MACHINE_VERSION`] of the program that
//! saved it. A state of another version is refused. Backends and devices version their own
//! parts.
//!
//! [`MACHINE_VERSION`]: crate::layout::MACHINE_VERSION

use serde::{Deserialize, Serialize};
use sm_hypervisor::VmState;
use sm_hypervisor::state::x86_64::VcpuState;

use crate::devices::SlotState;
use crate::serial::UartState;

/// State of a paused machine that is not in its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// Version of the machine's layout and of this structure.
    pub version: u32,
    /// Size of its memory in bytes.
    pub memory_bytes: u64,
    /// Guest physical address of the VM generation ID.
    pub generation_id: u64,
    /// Interrupt controllers and clocks.
    pub vm: VmState,
    /// vCPUs by index.
    pub vcpus: Vec<VcpuState>,
    /// The console.
    pub uart: UartState,
    /// Virtio devices by ascending slot.
    pub devices: Vec<SlotState>,
}
