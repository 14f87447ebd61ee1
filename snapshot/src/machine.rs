//! The sections of `state.bin` with CPUs and devices: those of [`sm_vmm_core::state`].

use sm_vmm_core::state::{MachineState, StateError};

use crate::Error;
use crate::chain::Chain;
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

/// Decodes the state of the machine at the tip of a chain.
///
/// # Errors
/// [`Error::Incompatible`] for a part or a version that this program does not have,
/// [`Error::Damaged`] for sections that are not those of a machine.
pub fn decode(chain: &Chain) -> Result<MachineState, Error> {
    let tip = chain.tip();
    let sections = tip.state.sections.iter();
    let parts = sections.map(|section| (&*section.name, section.version, &*section.payload));
    MachineState::decode(parts).map_err(|error| match error {
        StateError::Unknown { .. } | StateError::Version { .. } => Error::Incompatible {
            name: tip.lease.name().to_owned(),
            reason: error.to_string(),
        },
        _ => Error::damaged(&tip.lease.dir().join("state.bin"), error.to_string()),
    })
}
