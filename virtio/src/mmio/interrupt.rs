//! The interrupt of a device behind a transport (virtio 1.3 sections 4.2.2 and 4.2.3).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::device::Interrupt;

/// Cause: the device has used buffers.
pub(super) const INTERRUPT_USED: u32 = 1;
/// Cause: the device's configuration has changed.
pub(super) const INTERRUPT_CONFIG: u32 = 2;

/// A device's interrupt line, edge-triggered.
pub trait InterruptLine: Send + Sync {
    /// Raises the interrupt once.
    ///
    /// # Errors
    /// The hypervisor refused; the guest has missed an interrupt.
    fn pulse(&self) -> io::Result<()>;
}

/// The interrupt of one device.
pub(super) struct MmioInterrupt {
    pub(super) status: AtomicU32,
    pub(super) generation: AtomicU32,
    pub(super) needs_reset: AtomicBool,
    pub(super) line: Arc<dyn InterruptLine>,
    pub(super) slot: u32,
}

impl MmioInterrupt {
    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        if let Err(error) = self.line.pulse() {
            tracing::error!(slot = self.slot, %error, "an interrupt was lost");
        }
    }
}

impl Interrupt for MmioInterrupt {
    fn used_buffers(&self) {
        self.raise(INTERRUPT_USED);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    fn needs_reset(&self, reason: &str) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            tracing::warn!(
                slot = self.slot,
                reason,
                "a device needs a reset by its driver"
            );
            self.raise(INTERRUPT_CONFIG);
        }
    }
}
