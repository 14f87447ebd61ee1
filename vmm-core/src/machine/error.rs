//! What can go wrong with a machine.

use thiserror::Error;

use crate::devices::DeviceError;
use crate::serial::SerialError;
use crate::vcpu_thread::VcpuError;
use crate::vmgenid::GenerationError;
use crate::{acpi, loader};

/// Why a machine cannot be made, or cannot do what it was asked to.
#[derive(Debug, Error)]
pub enum MachineError {
    /// Guest memory.
    #[error("cannot set up guest memory")]
    Memory(#[from] crate::memory::MemoryError),
    /// Kernel, initramfs or command line.
    #[error("cannot load the guest kernel")]
    Load(#[from] loader::LoadError),
    /// ACPI tables.
    #[error("cannot describe the machine to the guest")]
    Acpi(#[from] acpi::AcpiError),
    /// Device windows.
    #[error("cannot lay out the devices")]
    Bus(#[from] crate::bus::BusError),
    /// Virtio devices.
    #[error("a virtio device did not do its part")]
    Device(#[from] DeviceError),
    /// The hypervisor.
    #[error("cannot {operation}")]
    Hypervisor {
        /// What was tried.
        operation: &'static str,
        /// What it said.
        #[source]
        source: sm_hypervisor::Error,
    },
    /// A vCPU.
    #[error("a vCPU did not do its part")]
    Vcpu(#[from] VcpuError),
    /// The console.
    #[error("the console did not do its part")]
    Serial(#[from] SerialError),
    /// The generation ID.
    #[error("cannot change the machine's identity")]
    Generation(#[from] GenerationError),
    /// A host resource.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Saved state of another kind of machine.
    #[error("saved machine state does not fit: {reason}")]
    State {
        /// What does not fit.
        reason: String,
    },
    /// More vCPUs than a machine can have.
    #[error("{vcpus} vCPUs are not possible: 1 to {max} are")]
    Vcpus {
        /// What was asked for.
        vcpus: u32,
        /// What is possible.
        max: u32,
    },
    /// Only possible while the machine is paused.
    #[error("cannot {operation} while the machine runs: pause it first")]
    NotPaused {
        /// What was tried.
        operation: &'static str,
    },
}

pub(super) fn hypervisor(
    operation: &'static str,
) -> impl FnOnce(sm_hypervisor::Error) -> MachineError {
    move |source| MachineError::Hypervisor { operation, source }
}
