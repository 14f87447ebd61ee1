//! Version 1 of the section `machine`: a whole machine in one piece, as in snapshots of
//! formats 1 and 2. It is only read.

use serde::Deserialize;
use sm_hypervisor::state::VmStateV1;
use sm_hypervisor::state::x86_64::VcpuStateV1;
use sm_virtio::DevicePayload;
use sm_virtio::mmio::{MmioTransportStateV1, TransportState};

use super::{MachineState, StateError};
use crate::devices::SlotState;
use crate::serial::UartStateV1;

/// Version of the section.
pub(super) const VERSION: u32 = 1;

/// The parts in the order of the encoding, which does not change.
#[derive(Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
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

/// Decodes the payload of `section`.
pub(super) fn decode(section: &str, payload: &[u8]) -> Result<MachineState, StateError> {
    let old: MachineStateV1 = super::decode(section, payload)?;
    Ok(MachineState {
        version: old.version,
        memory_bytes: old.memory_bytes,
        generation_id: old.generation_id,
        vm: old.vm,
        vcpus: old.vcpus,
        uart: old.uart,
        devices: old.devices.into_iter().map(SlotState::from).collect(),
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
