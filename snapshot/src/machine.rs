//! The sections of `state.bin` with CPUs and devices: those of [`sm_vmm_core::state`].

use sm_vmm_core::state::{MachineState, StateError};

use crate::Error;
use crate::chain::Chain;
use crate::manifest::{DEVICES_FORMAT, DeviceEntry, Manifest};
use crate::state_file::Section;

/// Encodes the state of a machine.
///
/// # Errors
/// See [`MachineState::encode`].
pub fn encode(state: &MachineState) -> Result<Vec<Section>, StateError> {
    let parts = state.encode()?.into_iter();
    let section = parts.map(|part| Section {
        name: part.name,
        version: part.version,
        payload: part.payload,
    });
    Ok(section.collect())
}

/// Returns the devices of a machine as the manifest of its snapshot lists them.
#[must_use]
pub fn devices(state: &MachineState) -> Vec<DeviceEntry> {
    let devices = state.devices.iter().map(|device| DeviceEntry {
        slot: device.slot,
        kind: device.transport.device.kind.clone(),
    });
    devices.collect()
}

/// Decodes the state of the machine at the tip of a chain. Its memory size, vCPUs
/// and devices are those of the manifest.
///
/// # Errors
/// [`Error::Incompatible`] for a part or a version that this program does not have,
/// [`Error::Damaged`] for sections that are not those of a machine, or of another machine
/// than the manifest's.
pub fn decode(chain: &Chain) -> Result<MachineState, Error> {
    let tip = chain.tip();
    let sections = tip.state.sections.iter();
    let parts = sections.map(|section| (&*section.name, section.version, &*section.payload));
    let damaged = |reason| Error::damaged(&tip.lease.dir().join("state.bin"), reason);
    let state = MachineState::decode(parts).map_err(|error| match error {
        StateError::Unknown { .. } | StateError::TwoDevices { .. } | StateError::Version { .. } => {
            Error::Incompatible {
                name: tip.lease.name().to_owned(),
                reason: error.to_string(),
            }
        }
        _ => damaged(error.to_string()),
    })?;
    check(&state, tip.lease.manifest()).map_err(damaged)?;
    Ok(state)
}

/// Checks that a state is of the machine that `manifest` describes. Launchers reserve memory
/// and vCPUs by the manifest alone.
fn check(state: &MachineState, manifest: &Manifest) -> Result<(), String> {
    let (found, described) = (state.memory_bytes, manifest.memory_bytes);
    if found != described {
        return Err(format!(
            "its machine has {found} bytes of memory, and the manifest says {described}"
        ));
    }
    let (found, described) = (state.vcpus.len(), manifest.vcpus);
    if u32::try_from(found) != Ok(described) {
        return Err(format!(
            "its machine has {found} vCPUs, and the manifest says {described}"
        ));
    }
    if manifest.format < DEVICES_FORMAT {
        return Ok(());
    }
    let (found, described) = (devices(state), &manifest.devices);
    if found != *described {
        return Err(format!(
            "its machine has the devices {}, and the manifest says {}",
            list(&found),
            list(described)
        ));
    }
    Ok(())
}

fn list(devices: &[DeviceEntry]) -> String {
    let names = devices.iter().map(|d| format!("{}/{}", d.kind, d.slot));
    format!("[{}]", names.collect::<Vec<_>>().join(", "))
}
