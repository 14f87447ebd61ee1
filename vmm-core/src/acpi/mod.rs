//! ACPI tables: hardware-reduced, with exactly the objects that Linux needs to find
//! processors, interrupt controllers, virtio-mmio devices, console, power control and the
//! VM generation ID (ACPI 6.5; section numbers in the submodules).

mod dsdt;
mod tables;

use std::ops::Range;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use sm_virtio::GuestMemory;

/// Guest physical addresses of all tables: the address range of a BIOS's tables, so that a
/// kernel without the RSDP's address in its boot data still finds it at the start.
pub const TABLES: Range<u64> = 0xe_0000..0x10_0000;

/// Guest physical address of the VM generation ID, alone in the last page of
/// [`TABLES`].
pub const GENERATION_ID: u64 = TABLES.end - 0x1000;

/// Maximum number of vCPUs that the tables can describe: one local APIC with an 8-bit ID
/// each. ID 255 is the broadcast ID, and 254 is not used.
pub const MAX_VCPUS: u32 = 254;

const OEM_ID: [u8; 6] = *b"SMVM  ";
const OEM_TABLE_ID: [u8; 8] = *b"SMVM    ";
const OEM_REVISION: u32 = 1;

/// Configuration of the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`]; APIC IDs count from 0.
    pub vcpus: u32,
    /// Slots with a virtio-mmio transport, see [`crate::layout`].
    pub slots: Vec<u32>,
}

/// Reason why tables cannot be built.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AcpiError {
    /// A number of vCPUs that the tables cannot describe.
    #[error("a machine cannot have {vcpus} vCPUs, only 1 to 254")]
    Vcpus {
        /// The requested number.
        vcpus: u32,
    },
    /// A slot that the layout does not have.
    #[error("there is no virtio slot {slot}")]
    Slot {
        /// The requested slot.
        slot: u32,
    },
    /// The tables do not fit into their range.
    #[error("ACPI tables of {bytes} bytes do not fit")]
    TooLarge {
        /// Length of the tables.
        bytes: usize,
    },
    /// Writing to guest memory failed.
    #[error("cannot write ACPI tables to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Writes all tables to guest memory. Returns the address of the RSDP.
///
/// # Errors
/// A configuration that cannot be described, or memory without [`TABLES`].
pub fn write_tables(guest: &GuestMemory, config: &AcpiConfig) -> Result<u64, AcpiError> {
    let image = tables::build(config)?;
    let capacity = usize::try_from(GENERATION_ID - TABLES.start).unwrap_or(0);
    if image.len() > capacity {
        return Err(AcpiError::TooLarge { bytes: image.len() });
    }
    guest.write_slice(&image, GuestAddress(TABLES.start))?;
    Ok(TABLES.start)
}
