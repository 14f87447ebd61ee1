//! Errors of a machine.

use thiserror::Error;

use crate::devices::DeviceError;
use crate::serial::SerialError;
use crate::vcpu_thread::VcpuError;
use crate::vmgenid::GenerationError;
use crate::{acpi, loader};

/// Reason why a machine cannot be created, or why an operation failed.
#[derive(Debug, Error)]
#[non_exhaustive]
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
    #[error("a virtio device failed")]
    Device(#[from] DeviceError),
    /// The hypervisor.
    #[error("cannot {operation}")]
    Hypervisor {
        /// The failed operation.
        operation: &'static str,
        /// The hypervisor's error.
        #[source]
        source: sm_hypervisor::Error,
    },
    /// A vCPU.
    #[error("a vCPU failed")]
    Vcpu(#[from] VcpuError),
    /// The console.
    #[error("the console failed")]
    Serial(#[from] SerialError),
    /// The generation ID.
    #[error("cannot change the VM generation ID")]
    Generation(#[from] GenerationError),
    /// A host resource.
    #[error("cannot {operation}")]
    Io {
        /// The failed operation.
        operation: &'static str,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// Saved state of another kind of machine.
    #[error("saved machine state does not fit: {reason}")]
    State {
        /// The element that does not fit, and the reason.
        reason: String,
    },
    /// More vCPUs than a machine can have.
    #[error("a machine cannot have {vcpus} vCPUs, only 1 to {max}")]
    Vcpus {
        /// The requested number.
        vcpus: u32,
        /// The largest possible number.
        max: u32,
    },
    /// The operation requires a paused machine.
    #[error("cannot {operation} while the machine runs: pause it first")]
    NotPaused {
        /// The operation.
        operation: &'static str,
    },
}

pub(super) fn hypervisor(
    operation: &'static str,
) -> impl FnOnce(sm_hypervisor::Error) -> MachineError {
    move |source| MachineError::Hypervisor { operation, source }
}
