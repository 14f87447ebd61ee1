//! The interface between a virtio device and its transport.
//!
//! The transport handles negotiation and queue set-up; a device sees a queue only between
//! [`VirtioDevice::activate`] and [`VirtioDevice::reset`]. Devices run on the machine's one
//! event loop thread: queue notifications and their own host file descriptors. Accesses to
//! configuration space and life-cycle calls arrive on vCPU threads. Each device is in one
//! mutex, which both threads lock.

use std::sync::Arc;

use thiserror::Error;

use crate::GuestMemory;
use crate::queue::Queue;
use sm_event_loop::{Readiness, Registry};

/// A device's notifications of its driver. Cheap; any thread may call it.
pub trait Interrupt: Send + Sync {
    /// Signals that buffers were used in some queue (the caller has already applied event
    /// index suppression).
    fn used_buffers(&self);
    /// Signals that the configuration space changed.
    fn config_changed(&self);
    /// Reports an unrecoverable error: sets DEVICE_NEEDS_RESET and notifies the driver
    /// (virtio 1.3 section 2.1.2). Logged once.
    fn needs_reset(&self, reason: &str);
}

/// Resources of a device while it is active: passed when the driver sets DRIVER_OK, and
/// again after a restore.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Features that both sides agreed on.
    pub features: u64,
    /// The queues, in order; a queue that the driver did not enable is not ready.
    pub queues: Vec<Queue>,
    /// The device's interrupt.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Reason why a device cannot be activated or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The driver did not enable a queue that the device requires.
    #[error("queue {index} is required and was not enabled")]
    QueueMissing {
        /// Number of the queue.
        index: usize,
    },
    /// A host resource failed.
    #[error("cannot {operation}")]
    Io {
        /// The failed operation.
        operation: &'static str,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// A saved payload cannot be used.
    #[error("saved state of {kind} does not fit: {reason}")]
    Payload {
        /// The device's kind.
        kind: String,
        /// The element that does not fit, and the reason.
        reason: String,
    },
}

/// Reason why a device refuses to be saved.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("a device of kind {kind} cannot be saved: {reason}")]
pub struct CannotSave {
    /// The device's kind.
    pub kind: &'static str,
    /// State that would be lost.
    pub reason: String,
}

/// A device's saved state beyond its transport and queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePayload {
    /// Kind of device, such as `blk`.
    pub kind: String,
    /// Version of the layout of `bytes`.
    pub version: u32,
    /// The payload, in an encoding of the device's choice.
    pub bytes: Vec<u8>,
}

impl DevicePayload {
    /// Checks that this is a payload of `kind` in layout `version`.
    ///
    /// # Errors
    /// [`ActivateError::Payload`] otherwise.
    pub fn expect(&self, kind: &str, version: u32) -> Result<(), ActivateError> {
        if self.kind == kind && self.version == version {
            return Ok(());
        }
        Err(ActivateError::Payload {
            kind: kind.to_owned(),
            reason: format!(
                "it is \"{}\" version {}, and only \"{kind}\" version {version} is supported",
                self.kind, self.version
            ),
        })
    }

    /// Checks that the payload has no bytes, as that of a device without state.
    ///
    /// # Errors
    /// [`ActivateError::Payload`] otherwise.
    pub fn expect_empty(&self) -> Result<(), ActivateError> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        Err(ActivateError::Payload {
            kind: self.kind.clone(),
            reason: format!(
                "it has {} bytes, and the device has no state",
                self.bytes.len()
            ),
        })
    }
}

/// A virtio device behind any transport.
pub trait VirtioDevice: Send {
    /// Kind of device, such as `blk`: names it in saved state and in errors. Lower-case
    /// letters, digits and hyphens.
    fn kind(&self) -> &'static str;

    /// Device type (virtio 1.3 section 5).
    fn device_type(&self) -> u32;

    /// Features that the device offers, without the transport's own (VERSION_1 is added).
    fn features(&self) -> u64;

    /// Largest size of each queue; the number of entries is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Returns true if the driver's notifications are worth a doorbell of the hypervisor, by
    /// which they reach the event loop without the vCPU's thread. Each doorbell takes some
    /// 0.1 ms of the time in which a machine is created. Called once, before that.
    fn has_doorbells(&self) -> bool {
        true
    }

    /// Reads configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space; writes to read-only fields are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Called once the device is on the event loop: registers descriptors that host code
    /// may use before the driver starts. Most devices have none.
    fn attached(&mut self, _registry: &mut dyn Registry) {}

    /// Called when the driver is ready, on a vCPU thread; work starts with
    /// [`Self::started`] on the event loop.
    ///
    /// # Errors
    /// The device then reports DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Called on the event loop after [`Self::activate`], and again after a pause:
    /// registers host file descriptors and checks every queue and descriptor.
    fn started(&mut self, registry: &mut dyn Registry);

    /// Called when the driver has notified queue `index`.
    fn queue_notified(&mut self, index: usize, registry: &mut dyn Registry);

    /// Called when a registered host file descriptor is ready, or a timer or a further turn
    /// is due; `token` is the one that this device passed to `Registry::add`, `set_timer` or
    /// `again`.
    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry);

    /// Returns to the state before activation: completes or abandons all work in flight
    /// first, and returns no buffer to the driver.
    fn reset(&mut self, registry: Option<&mut dyn Registry>);

    /// Completes work in flight, so that all state is in guest memory, the queues and
    /// [`Self::save`]. vCPUs are paused; called on the event loop.
    fn quiesce(&mut self, registry: &mut dyn Registry);

    /// Returns the queues' current state (for saving; valid after [`Self::quiesce`]). Empty
    /// if the device is not active.
    fn queues(&self) -> &[Queue];

    /// Saves the state that is not in guest memory, transport or queues.
    ///
    /// # Errors
    /// The device is in a state, or of a kind, that cannot be saved.
    fn save(&self) -> Result<DevicePayload, CannotSave>;

    /// Checks a payload for [`Self::restore`], and changes nothing. The device may be active.
    ///
    /// # Errors
    /// A payload of another kind or version, or one that does not fit.
    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError>;

    /// Restores state that [`Self::save`] saved, before activation. The caller has passed the
    /// payload to [`Self::check`].
    ///
    /// # Errors
    /// A payload that [`Self::check`] refuses; the device is unchanged.
    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError>;
}
