//! Saved state of a transport.

use serde::{Deserialize, Serialize};

use super::interrupt::{INTERRUPT_CONFIG, INTERRUPT_USED};
use super::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, Registers, VIRTIO_F_VERSION_1};
use crate::device::DevicePayload;
use crate::queue::{Queue, QueueStateV1};

/// State of a transport without its device, version 1. Its fields and their order are
/// those of snapshots and do not change; another state is another type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioTransportStateV1 {
    /// Device type (virtio 1.3 section 5).
    pub device_type: u32,
    /// Device status, without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// The queues by index.
    pub queues: Vec<QueueStateV1>,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// The device asked for a reset.
    pub needs_reset: bool,
}

/// State of a transport and of the device behind it. The two are encoded separately, as
/// each has a version of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportState {
    /// The transport.
    pub transport: MmioTransportStateV1,
    /// The device.
    pub device: DevicePayload,
}

impl Registers {
    /// Replaces these registers by saved ones of a device that offers `features`.
    ///
    /// # Errors
    /// The state is of another device, or is none that a driver can bring about; a clause.
    pub(super) fn restored(
        &self,
        state: &MmioTransportStateV1,
        features: u64,
    ) -> Result<Self, String> {
        let (saved, own) = (state.queues.len(), self.queues.len());
        if saved != own {
            return Err(format!("it has {saved} queues, and the device has {own}"));
        }
        let status = state.status;
        let has = |bit: u32| status & bit != 0;
        let known = status & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) == 0;
        let in_order = (has(ACKNOWLEDGE) || !has(DRIVER))
            && (has(DRIVER) || !has(FEATURES_OK))
            && (has(FEATURES_OK) || !has(DRIVER_OK));
        if !known || !in_order {
            return Err(format!("it has the impossible device status {status:#x}"));
        }
        if has(FEATURES_OK) && state.driver_features & !features != 0 {
            return Err("it uses features that the device does not have".to_owned());
        }
        if has(FEATURES_OK) && state.driver_features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err("it is of a driver older than virtio 1.0".to_owned());
        }
        let causes = state.interrupt_status;
        if causes & !(INTERRUPT_USED | INTERRUPT_CONFIG) != 0 {
            return Err(format!(
                "it has the impossible interrupt status {causes:#x}"
            ));
        }
        let queues = self.queues.iter().zip(&state.queues);
        let queues = queues
            .map(|(own, saved)| Queue::restore(own.max_size, saved))
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        Ok(Self {
            status,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            queues,
        })
    }
}
