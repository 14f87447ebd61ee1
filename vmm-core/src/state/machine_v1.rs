//! Version 1 of the section `machine`: a whole machine in one piece, as in snapshots of
//! formats 1 and 2. It is only read.

use serde::Deserialize;
use serde::de::DeserializeOwned;
#[cfg(test)]
use sm_hypervisor::state::{VmStateV1, x86_64::VcpuStateV1};
use sm_virtio::DevicePayload;
use sm_virtio::mmio::{MmioTransportStateV1, TransportState};

use super::{MachineState, StateError, check_device, check_number};
use crate::acpi::MAX_VCPUS;
use crate::devices::SlotState;
use crate::layout::VIRTIO_SLOTS;
#[cfg(test)]
use crate::serial::UartStateV1;

/// Version of the section.
pub(super) const VERSION: u32 = 1;

/// The parts in the order of the encoding, which does not change, and in which [`decode`]
/// takes them.
#[cfg(test)]
#[derive(serde::Serialize)]
pub(super) struct MachineStateV1 {
    version: u32,
    memory_bytes: u64,
    generation_id: u64,
    vm: VmStateV1,
    vcpus: Vec<VcpuStateV1>,
    uart: UartStateV1,
    devices: Vec<SlotStateV1>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
struct SlotStateV1 {
    slot: u32,
    transport: MmioTransportStateV1,
    device: DevicePayloadV1,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
struct DevicePayloadV1 {
    kind: String,
    version: u32,
    bytes: Vec<u8>,
}

impl From<SlotStateV1> for SlotState {
    fn from(old: SlotStateV1) -> Self {
        Self {
            slot: old.slot,
            transport: TransportState {
                transport: old.transport,
                device: DevicePayload {
                    kind: old.device.kind,
                    version: old.device.version,
                    bytes: old.device.bytes,
                },
            },
        }
    }
}

/// A payload, of which elements are decoded one after the other.
struct Elements<'a> {
    section: &'a str,
    rest: &'a [u8],
}

impl Elements<'_> {
    fn malformed(&self, reason: String) -> StateError {
        StateError::Malformed {
            section: self.section.to_owned(),
            reason,
        }
    }

    fn take<T: DeserializeOwned>(&mut self) -> Result<T, StateError> {
        match postcard::take_from_bytes(self.rest) {
            Ok((element, rest)) => {
                self.rest = rest;
                Ok(element)
            }
            Err(error) => Err(self.malformed(error.to_string())),
        }
    }

    /// Takes a list of at most `limit` elements, `parts` by name.
    fn list<T: DeserializeOwned>(
        &mut self,
        parts: &'static str,
        limit: u32,
    ) -> Result<Vec<T>, StateError> {
        let number: u64 = self.take()?;
        check_number(parts, number, limit)?;
        (0..number).map(|_| self.take()).collect()
    }
}

/// Decodes the payload of `section`. The length of each list is checked before the first of
/// its elements is decoded.
pub(super) fn decode(section: &str, payload: &[u8]) -> Result<MachineState, StateError> {
    let mut elements = Elements {
        section,
        rest: payload,
    };
    let (version, memory_bytes, generation_id, vm) = elements.take()?;
    let vcpus = elements.list("vCPUs", MAX_VCPUS)?;
    let uart = elements.take()?;
    let devices: Vec<SlotStateV1> = elements.list("devices", VIRTIO_SLOTS)?;
    if !elements.rest.is_empty() {
        return Err(elements.malformed(format!("{} bytes follow it", elements.rest.len())));
    }
    for device in &devices {
        check_device(device.slot, &device.device.kind)?;
    }
    Ok(MachineState {
        version,
        memory_bytes,
        generation_id,
        vm,
        vcpus,
        uart,
        devices: devices.into_iter().map(SlotState::from).collect(),
    })
}

#[cfg(test)]
impl From<MachineState> for MachineStateV1 {
    fn from(state: MachineState) -> Self {
        let slot = |SlotState { slot, transport }| {
            let TransportState { transport, device } = transport;
            SlotStateV1 {
                slot,
                transport,
                device: DevicePayloadV1 {
                    kind: device.kind,
                    version: device.version,
                    bytes: device.bytes,
                },
            }
        };
        Self {
            version: state.version,
            memory_bytes: state.memory_bytes,
            generation_id: state.generation_id,
            vm: state.vm,
            vcpus: state.vcpus,
            uart: state.uart,
            devices: state.devices.into_iter().map(slot).collect(),
        }
    }
}
