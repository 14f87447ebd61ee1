//! A machine's saved state, without its memory.
//!
//! [`MachineState`] is taken apart into sections, each with a name and a version of its
//! own, and put together from them:
//!
//! | section | version | content |
//! |---|---|---|
//! | `machine` | 2 | [`MachineStateV2`] |
//! | `interrupts/0` | 1 | interrupt controllers and clocks: [`VmStateV1`] |
//! | `vcpu-x86_64/INDEX` | 1 | a vCPU: [`VcpuStateV1`] |
//! | `uart/0` | 1 | the console: [`UartStateV1`] |
//! | `virtio-mmio/SLOT` | 1 | a transport and its queues: [`MmioTransportStateV1`] |
//! | `KIND/SLOT` | the device's | the device behind it: its [`DevicePayload`] |
//!
//! The content is encoded by postcard, but for a device's, which is the device's own.
//! Each type is in the module of the component that it is the state of.
//!
//! A name with a slash is a part of the machine. One that is missing, or of no part that
//! this program knows, is an error, as is another version: a guest whose state is restored
//! in part does not run on. Version 1 of `machine` is read as well (`state/machine_v1.rs`).

mod machine_v1;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sm_hypervisor::state::VmStateV1;
use sm_hypervisor::state::x86_64::VcpuStateV1;
use sm_virtio::DevicePayload;
use sm_virtio::mmio::{MmioTransportStateV1, TransportState};
use thiserror::Error;

use crate::devices::SlotState;
use crate::serial::UartStateV1;

/// Kinds of sections, and the versions of them that are written.
const MACHINE: (&str, u32) = ("machine", 2);
const INTERRUPTS: (&str, u32) = ("interrupts", 1);
const VCPU: (&str, u32) = ("vcpu-x86_64", 1);
const UART: (&str, u32) = ("uart", 1);
const TRANSPORT: (&str, u32) = ("virtio-mmio", 1);

/// Versions of the sections that this program writes, in a fixed order. Devices have
/// versions besides.
pub const SECTION_VERSIONS: [u32; 5] = [MACHINE.1, INTERRUPTS.1, VCPU.1, UART.1, TRANSPORT.1];

/// State of a paused machine that is not in its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineState {
    /// Version of the machine's address map and devices.
    pub version: u32,
    /// Size of its memory in bytes.
    pub memory_bytes: u64,
    /// Guest physical address of the VM generation ID.
    pub generation_id: u64,
    /// Interrupt controllers and clocks.
    pub vm: VmStateV1,
    /// vCPUs by index.
    pub vcpus: Vec<VcpuStateV1>,
    /// The console.
    pub uart: UartStateV1,
    /// Virtio devices by ascending slot.
    pub devices: Vec<SlotState>,
}

/// Description of a machine, version 2. The layout does not change. (Version 1 of the
/// section is a whole machine.)
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStateV2 {
    /// Version of the machine's address map and devices.
    pub machine_version: u32,
    /// Size of its memory in bytes.
    pub memory_bytes: u64,
    /// Guest physical address of the VM generation ID.
    pub generation_id: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
}

/// An encoded part of a machine's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSection {
    /// Name, see the [module's documentation](self).
    pub name: String,
    /// Version of the payload's layout.
    pub version: u32,
    /// The payload.
    pub payload: Vec<u8>,
}

/// Sections that are not the state of a machine.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// A section is missing.
    #[error("it has no section \"{section}\"")]
    Missing {
        /// Name of the section.
        section: String,
    },
    /// A slot has the state of a transport and none of a device.
    #[error("it has no section of the device in slot {slot}")]
    NoDevice {
        /// The slot.
        slot: u32,
    },
    /// A section of a part that no machine of this program has.
    #[error("section \"{section}\" is of no part of this machine")]
    Unknown {
        /// Name of the section.
        section: String,
    },
    /// Two sections have one name.
    #[error("there are two sections \"{section}\"")]
    Duplicate {
        /// Name of the sections.
        section: String,
    },
    /// A section of a version that is not read.
    #[error("section \"{section}\" has version {found}, and version {supported} is read")]
    Version {
        /// Name of the section.
        section: String,
        /// Its version.
        found: u32,
        /// The newest version that is read.
        supported: u32,
    },
    /// A section whose payload is not of its version.
    #[error("section \"{section}\" is malformed: {reason}")]
    Malformed {
        /// Name of the section.
        section: String,
        /// The first fault.
        reason: String,
    },
    /// A part cannot be encoded.
    #[error("cannot encode section \"{section}\"")]
    Encode {
        /// Name of the section.
        section: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn name((kind, _): (&str, u32), instance: u32) -> String {
    format!("{kind}/{instance}")
}

/// Returns kind and instance of a name, if it is one of a part of a machine.
fn parse(name: &str) -> Option<(&str, u32)> {
    let (kind, digits) = name.rsplit_once('/')?;
    let instance: u32 = digits.parse().ok()?;
    // A number has one spelling.
    (instance.to_string() == digits).then_some((kind, instance))
}

fn encode<T: Serialize>(name: String, version: u32, part: &T) -> Result<StateSection, StateError> {
    match postcard::to_stdvec(part) {
        Ok(payload) => Ok(StateSection {
            name,
            version,
            payload,
        }),
        Err(error) => Err(StateError::Encode {
            section: name,
            source: Box::new(error),
        }),
    }
}

/// Decodes a payload, which has to be used up.
fn decode<T: DeserializeOwned>(section: &str, payload: &[u8]) -> Result<T, StateError> {
    let malformed = |reason: String| StateError::Malformed {
        section: section.to_owned(),
        reason,
    };
    let (part, rest) =
        postcard::take_from_bytes(payload).map_err(|error| malformed(error.to_string()))?;
    if rest.is_empty() {
        return Ok(part);
    }
    Err(malformed(format!("{} bytes follow it", rest.len())))
}

impl MachineState {
    /// Encodes the state. The sections have different names.
    ///
    /// # Errors
    /// [`StateError::Encode`], which no state of a machine causes, or
    /// [`StateError::Duplicate`] for a device whose kind is that of another part.
    pub fn encode(&self) -> Result<Vec<StateSection>, StateError> {
        let machine = MachineStateV2 {
            machine_version: self.version,
            memory_bytes: self.memory_bytes,
            generation_id: self.generation_id,
            vcpus: u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX),
        };
        let mut sections = vec![
            encode(MACHINE.0.to_owned(), MACHINE.1, &machine)?,
            encode(name(INTERRUPTS, 0), INTERRUPTS.1, &self.vm)?,
        ];
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            sections.push(encode(name(VCPU, index), VCPU.1, vcpu)?);
        }
        sections.push(encode(name(UART, 0), UART.1, &self.uart)?);
        for SlotState { slot, transport } in &self.devices {
            let TransportState { transport, device } = transport;
            sections.push(encode(name(TRANSPORT, *slot), TRANSPORT.1, transport)?);
            sections.push(StateSection {
                name: format!("{}/{slot}", device.kind),
                version: device.version,
                payload: device.bytes.clone(),
            });
        }
        let mut names = BTreeSet::new();
        match sections.iter().find(|section| !names.insert(&section.name)) {
            None => Ok(sections),
            Some(second) => Err(StateError::Duplicate {
                section: second.name.clone(),
            }),
        }
    }

    /// Decodes a state from sections by name, version and payload. Sections that are no
    /// part of a machine, by name, are ignored.
    ///
    /// # Errors
    /// The sections are not those of one machine, or one has a version or payload that this
    /// program cannot read.
    pub fn decode<'a>(
        sections: impl IntoIterator<Item = (&'a str, u32, &'a [u8])>,
    ) -> Result<Self, StateError> {
        let mut parts = Parts::default();
        for (name, version, payload) in sections {
            parts.insert(name, version, payload)?;
        }
        let section = MACHINE.0.to_owned();
        let Some((version, payload)) = parts.0.remove(&*section) else {
            return Err(StateError::Missing { section });
        };
        let state = if version == MACHINE.1 {
            parts.machine(&decode(&section, payload)?)?
        } else if version == machine_v1::VERSION {
            machine_v1::decode(&section, payload)?
        } else {
            return Err(StateError::Version {
                section,
                found: version,
                supported: MACHINE.1,
            });
        };
        match parts.0.into_keys().next() {
            None => Ok(state),
            Some(section) => Err(StateError::Unknown {
                section: section.to_owned(),
            }),
        }
    }
}

/// Version and payload of the parts of a machine that were not decoded yet, by name.
#[derive(Default)]
struct Parts<'a>(BTreeMap<&'a str, (u32, &'a [u8])>);

impl<'a> Parts<'a> {
    fn insert(&mut self, name: &'a str, version: u32, payload: &'a [u8]) -> Result<(), StateError> {
        if name != MACHINE.0 && !name.contains('/') {
            return Ok(());
        }
        match self.0.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert((version, payload));
                Ok(())
            }
            Entry::Occupied(_) => Err(StateError::Duplicate {
                section: name.to_owned(),
            }),
        }
    }

    /// Takes a part that has one version.
    fn take<T: DeserializeOwned>(
        &mut self,
        kind: (&str, u32),
        instance: u32,
    ) -> Result<T, StateError> {
        let section = name(kind, instance);
        match self.0.remove(&*section) {
            None => Err(StateError::Missing { section }),
            Some((version, payload)) if version == kind.1 => decode(&section, payload),
            Some((found, _)) => Err(StateError::Version {
                section,
                found,
                supported: kind.1,
            }),
        }
    }

    fn machine(&mut self, machine: &MachineStateV2) -> Result<MachineState, StateError> {
        let vcpus = (0..machine.vcpus).map(|index| self.vcpu(index));
        Ok(MachineState {
            version: machine.machine_version,
            memory_bytes: machine.memory_bytes,
            generation_id: machine.generation_id,
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: self.take(INTERRUPTS, 0)?,
            uart: self.take(UART, 0)?,
            devices: self.devices()?,
        })
    }

    fn vcpu(&mut self, index: u32) -> Result<VcpuStateV1, StateError> {
        let vcpu: VcpuStateV1 = self.take(VCPU, index)?;
        if vcpu.index == index {
            return Ok(vcpu);
        }
        Err(StateError::Malformed {
            section: name(VCPU, index),
            reason: format!("it is of vCPU {}", vcpu.index),
        })
    }

    /// Takes the transports, and the device of each.
    fn devices(&mut self) -> Result<Vec<SlotState>, StateError> {
        let names = self.0.keys().filter_map(|name| parse(name));
        let transports = names.filter(|(kind, _)| *kind == TRANSPORT.0);
        let mut slots: Vec<u32> = transports.map(|(_, slot)| slot).collect();
        slots.sort_unstable();
        let take = |slot| {
            let transport: MmioTransportStateV1 = self.take(TRANSPORT, slot)?;
            let device = self.device(slot)?;
            Ok(SlotState {
                slot,
                transport: TransportState { transport, device },
            })
        };
        slots.into_iter().map(take).collect()
    }

    /// Takes what is in a slot besides its transport, which was taken before.
    fn device(&mut self, slot: u32) -> Result<DevicePayload, StateError> {
        let of_slot = |(&name, &part): (&&'a str, &(u32, &'a [u8]))| {
            let (kind, number) = parse(name)?;
            (number == slot).then_some((name, kind, part))
        };
        let Some((name, kind, (version, bytes))) = self.0.iter().find_map(of_slot) else {
            return Err(StateError::NoDevice { slot });
        };
        self.0.remove(name);
        Ok(DevicePayload {
            kind: kind.to_owned(),
            version,
            bytes: bytes.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests;
