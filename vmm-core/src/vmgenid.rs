//! The VM generation ID: a number in guest memory that identifies a clone. Linux reseeds
//! its random number generator when it changes.

use std::sync::Arc;

use sm_hypervisor::IrqLine;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::acpi::GENERATION_ID;
use sm_virtio::GuestMemory;

/// Reason why the generation ID could not be changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// Its memory cannot be written.
    #[error("cannot write the VM generation ID")]
    Memory(#[from] GuestMemoryError),
    /// The guest could not be notified.
    #[error("cannot notify the guest of its new generation ID")]
    Notify(#[from] sm_hypervisor::Error),
}

/// The generation ID of a machine.
#[derive(Clone, Debug)]
pub(crate) struct GenerationId {
    guest: GuestMemory,
    event: Arc<dyn IrqLine>,
}

impl GenerationId {
    /// Creates the ID of a machine; `event` is the interrupt of the generic event device.
    pub(crate) fn new(guest: GuestMemory, event: Arc<dyn IrqLine>) -> Self {
        Self { guest, event }
    }

    /// Writes the ID of a machine that has not run yet, without a notification.
    pub(crate) fn initialise(&self, id: [u8; 16]) -> Result<(), GenerationError> {
        Ok(self.guest.write_slice(&id, GuestAddress(GENERATION_ID))?)
    }

    /// Changes the ID and notifies the guest.
    pub(crate) fn change(&self, id: [u8; 16]) -> Result<(), GenerationError> {
        self.initialise(id)?;
        Ok(self.event.pulse()?)
    }
}
