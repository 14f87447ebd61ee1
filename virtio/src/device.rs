//! What a virtio device is to the machine.
//!
//! The transport owns negotiation and queue set-up; a device sees a queue only
//! between [`VirtioDevice::activate`] and [`VirtioDevice::reset`]. Devices run
//! on the machine's one event loop thread: queue notifications, their own host
//! file descriptors, and nothing else. Configuration space and life-cycle calls
//! arrive on vCPU threads. Each device sits in one mutex, which both take.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::GuestMemory;
use crate::queue::Queue;
use sm_event_loop::{Readiness, Registry};

/// How a device tells the driver something. Cheap, callable from any thread.
pub trait Interrupt: Send + Sync {
    /// Buffers were used in some queue (the caller has already applied event
    /// index suppression).
    fn used_buffers(&self);
    /// The configuration space changed.
    fn config_changed(&self);
    /// The device met something it cannot recover from: sets
    /// DEVICE_NEEDS_RESET and notifies (virtio 1.3 section 2.1.2). Logged once.
    fn needs_reset(&self, reason: &str);
}

/// What a device gets when the driver sets DRIVER_OK, and again after a restore.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Features both sides agreed on.
    pub features: u64,
    /// The queues, in order; one the driver did not enable is not ready.
    pub queues: Vec<Queue>,
    /// The device's interrupt.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device cannot be activated or restored.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver enabled queues that do not make sense for the device.
    #[error("queue {index} is required and was not enabled")]
    QueueMissing {
        /// Number of the queue.
        index: usize,
    },
    /// A host resource failed.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A saved payload cannot be used.
    #[error("saved state of {kind} does not fit: {reason}")]
    Payload {
        /// The device's kind.
        kind: String,
        /// What does not fit.
        reason: String,
    },
}

/// A device's saved state beyond its transport and queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePayload {
    /// Kind of device, such as `blk`.
    pub kind: String,
    /// Version of the layout of `bytes`.
    pub version: u32,
    /// The payload (postcard).
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
                "it is \"{}\" version {}, and version {version} is read",
                self.kind, self.version
            ),
        })
    }
}

/// A virtio device behind any transport.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.3 section 5).
    fn device_type(&self) -> u32;

    /// Features offered, without the transport's own (VERSION_1 is added).
    fn features(&self) -> u64;

    /// Largest size of each queue; the number of entries is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The device got its place on the event loop: registers descriptors that host
    /// code may use before there is a driver. Nothing for most devices.
    fn attached(&mut self, _registry: &mut dyn Registry) {}

    /// The driver is ready. Called on a vCPU thread; work starts with
    /// [`Self::started`] on the event loop.
    ///
    /// # Errors
    /// The device then reports DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Runs on the event loop after [`Self::activate`], and again after a pause:
    /// registers host file descriptors and looks at every queue and descriptor.
    fn started(&mut self, registry: &mut dyn Registry);

    /// The driver notified queue `index`.
    fn queue_notified(&mut self, index: usize, registry: &mut dyn Registry);

    /// A registered host file descriptor is ready; `token` is the one given to
    /// `Registry::add` by this device.
    fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry);

    /// Back to the state before activation; hands nothing back to the driver
    /// and completes or abandons all work in flight first.
    fn reset(&mut self, registry: Option<&mut dyn Registry>);

    /// Brings work in flight to an end, so that all state is in guest memory,
    /// the queues and [`Self::save`]. vCPUs are paused; called on the event loop.
    fn quiesce(&mut self, registry: &mut dyn Registry);

    /// The queues' current state (for saving; valid after [`Self::quiesce`]).
    /// Empty when not activated.
    fn queues(&self) -> &[Queue];

    /// Saves what is not in guest memory, transport or queues.
    fn save(&self) -> DevicePayload;

    /// Restores what [`Self::save`] saved, before activation.
    ///
    /// # Errors
    /// A payload of another kind or version, or one that does not fit.
    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError>;
}
