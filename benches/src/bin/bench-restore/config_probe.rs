//! A device that records the guest's first access, on the vCPU's thread.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use sm_event_loop::{Readiness, Registry};
use sm_virtio::queue::Queue;
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, VirtioDevice};

const KIND: &str = "witness";
/// An unused device type.
const TYPE: u32 = 63;
const QUEUE_SIZES: [u16; 1] = [1];

/// A device without a driver.
#[derive(Debug, Default)]
pub(crate) struct ConfigReadProbe {
    first_read: Arc<OnceLock<Instant>>,
}

impl ConfigReadProbe {
    /// Returns the time at which the guest first read the device's configuration.
    pub(crate) fn first_read(&self) -> Arc<OnceLock<Instant>> {
        self.first_read.clone()
    }
}

impl VirtioDevice for ConfigReadProbe {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_type(&self) -> u32 {
        TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        let _ = self.first_read.set(Instant::now());
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _activation: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn started(&mut self, _registry: &mut dyn Registry) {}

    fn queue_notified(&mut self, _index: usize, _registry: &mut dyn Registry) {}

    fn host_ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut dyn Registry) {}

    fn reset(&mut self, _registry: Option<&mut dyn Registry>) {}

    fn quiesce(&mut self, _registry: &mut dyn Registry) {}

    fn queues(&self) -> &[Queue] {
        &[]
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        Ok(DevicePayload {
            kind: KIND.to_owned(),
            version: 1,
            bytes: Vec::new(),
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect(KIND, 1)
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        self.check(payload)
    }
}
