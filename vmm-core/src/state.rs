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
//! in part does not run on. The version of a device's payload is checked by the device, when
//! it is restored. Version 1 of `machine` is read as well (`state/machine_v1.rs`).
//!
//! The names are checked before any payload is decoded. Each part has a place of its own, so
//! the number of sections that are stored is limited, however many there are.

mod machine_v1;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sm_hypervisor::state::VmStateV1;
use sm_hypervisor::state::x86_64::VcpuStateV1;
use sm_virtio::DevicePayload;
use sm_virtio::mmio::{MmioTransportStateV1, TransportState};
use thiserror::Error;

use crate::acpi::MAX_VCPUS;
use crate::devices::SlotState;
use crate::layout::VIRTIO_SLOTS;
use crate::serial::UartStateV1;

/// Kinds of sections, and the versions of them that are written.
const MACHINE: (&str, u32) = ("machine", 2);
const INTERRUPTS: (&str, u32) = ("interrupts", 1);
const VCPU: (&str, u32) = ("vcpu-x86_64", 1);
const UART: (&str, u32) = ("uart", 1);
const TRANSPORT: (&str, u32) = ("virtio-mmio", 1);

/// Kinds of parts that are not devices, and the largest number of each in a machine.
const FIXED: [(&str, u32); 4] = [
    (INTERRUPTS.0, 1),
    (VCPU.0, MAX_VCPUS),
    (UART.0, 1),
    (TRANSPORT.0, VIRTIO_SLOTS),
];
/// Start of the kinds of vCPUs of all architectures.
const ANY_VCPU: &str = "vcpu-";

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
    /// Two sections of devices are of one slot.
    #[error("sections \"{first}\" and \"{second}\" are both of the device in slot {slot}")]
    TwoDevices {
        /// The slot.
        slot: u32,
        /// Name of the first section.
        first: String,
        /// Name of the second section.
        second: String,
    },
    /// A device has the kind of another part.
    #[error("the device in slot {slot} has the kind \"{kind}\", which is of another part")]
    Kind {
        /// The slot.
        slot: u32,
        /// Kind of the device.
        kind: String,
    },
    /// A device in a slot that no machine has.
    #[error("it has a device in slot {slot}, and a machine has {VIRTIO_SLOTS} slots")]
    Slot {
        /// The slot.
        slot: u32,
    },
    /// More parts of a kind than a machine has.
    #[error("it has {found} {parts}, and a machine has at most {limit}")]
    TooMany {
        /// The parts, in the plural.
        parts: &'static str,
        /// Their number.
        found: u64,
        /// The largest number.
        limit: u32,
    },
    /// Two sections have one name.
    #[error("there are two sections \"{section}\"")]
    Duplicate {
        /// Name of the sections.
        section: String,
    },
    /// A section of a version that is not read.
    #[error(
        "section \"{section}\" has version {found}, and {} read{}",
        versions(supported),
        if found > supported.end() { "; a newer sm may read it" } else { "" }
    )]
    Version {
        /// Name of the section.
        section: String,
        /// Its version.
        found: u32,
        /// The versions that are read.
        supported: RangeInclusive<u32>,
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

fn versions(range: &RangeInclusive<u32>) -> String {
    let (oldest, newest) = (range.start(), range.end());
    if oldest == newest {
        format!("version {newest} is")
    } else {
        format!("versions {oldest} to {newest} are")
    }
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

/// Returns true if a device cannot have this kind, because another part has it.
fn is_reserved(kind: &str) -> bool {
    let is_fixed = FIXED.iter().any(|(fixed, _)| *fixed == kind);
    kind == MACHINE.0 || is_fixed || kind.starts_with(ANY_VCPU)
}

/// Checks that a machine may have a device of `kind` in `slot`.
fn check_device(slot: u32, kind: &str) -> Result<(), StateError> {
    if slot >= VIRTIO_SLOTS {
        return Err(StateError::Slot { slot });
    }
    if is_reserved(kind) {
        return Err(StateError::Kind {
            slot,
            kind: kind.to_owned(),
        });
    }
    Ok(())
}

/// Checks a number of parts, before any of them is decoded.
fn check_number(parts: &'static str, found: u64, limit: u32) -> Result<(), StateError> {
    if found <= u64::from(limit) {
        return Ok(());
    }
    Err(StateError::TooMany {
        parts,
        found,
        limit,
    })
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
    /// [`StateError::Encode`], which no state of a machine causes; [`StateError::Kind`] for
    /// a device whose kind is that of another part; [`StateError::Slot`] or
    /// [`StateError::Duplicate`] for devices that are not in slots of their own.
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
        if let Some(second) = sections.iter().find(|section| !names.insert(&section.name)) {
            return Err(StateError::Duplicate {
                section: second.name.clone(),
            });
        }
        for SlotState { slot, transport } in &self.devices {
            check_device(*slot, &transport.device.kind)?;
        }
        Ok(sections)
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
        let Some(part) = parts.0.remove(&Key::Fixed(MACHINE.0, 0)) else {
            return Err(StateError::Missing { section });
        };
        let state = if part.version == MACHINE.1 {
            parts.machine(&decode(&section, part.payload)?)?
        } else if part.version == machine_v1::VERSION {
            machine_v1::decode(&section, part.payload)?
        } else {
            return Err(StateError::Version {
                section,
                found: part.version,
                supported: machine_v1::VERSION..=MACHINE.1,
            });
        };
        match parts.0.into_values().next() {
            None => Ok(state),
            Some(part) => Err(part.unknown()),
        }
    }
}

/// The place of a part in a machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// A part that is not a device, by kind and instance.
    Fixed(&'static str, u32),
    /// The device in a slot, of any kind.
    Device(u32),
}

/// A section of a machine.
struct Part<'a> {
    name: &'a str,
    version: u32,
    payload: &'a [u8],
}

impl Part<'_> {
    fn unknown(&self) -> StateError {
        StateError::Unknown {
            section: self.name.to_owned(),
        }
    }

    /// Returns its place; `None` if a machine has none for it.
    fn key(&self) -> Option<Key> {
        if self.name == MACHINE.0 {
            return Some(Key::Fixed(MACHINE.0, 0));
        }
        let (kind, instance) = parse(self.name)?;
        match FIXED.into_iter().find(|(fixed, _)| *fixed == kind) {
            Some((fixed, number)) => (instance < number).then_some(Key::Fixed(fixed, instance)),
            None => check_device(instance, kind)
                .is_ok()
                .then_some(Key::Device(instance)),
        }
    }
}

/// The parts of a machine that were not decoded yet.
#[derive(Default)]
struct Parts<'a>(BTreeMap<Key, Part<'a>>);

impl<'a> Parts<'a> {
    fn insert(&mut self, name: &'a str, version: u32, payload: &'a [u8]) -> Result<(), StateError> {
        if name != MACHINE.0 && !name.contains('/') {
            return Ok(());
        }
        let part = Part {
            name,
            version,
            payload,
        };
        let key = part.key().ok_or_else(|| part.unknown())?;
        match (self.0.entry(key), key) {
            (Entry::Vacant(entry), _) => {
                entry.insert(part);
                Ok(())
            }
            (Entry::Occupied(first), Key::Device(slot)) if first.get().name != name => {
                Err(StateError::TwoDevices {
                    slot,
                    first: first.get().name.to_owned(),
                    second: name.to_owned(),
                })
            }
            (Entry::Occupied(_), _) => Err(StateError::Duplicate {
                section: name.to_owned(),
            }),
        }
    }

    /// Takes a part that has one version.
    fn take<T: DeserializeOwned>(
        &mut self,
        kind: (&'static str, u32),
        instance: u32,
    ) -> Result<T, StateError> {
        let section = name(kind, instance);
        match self.0.remove(&Key::Fixed(kind.0, instance)) {
            None => Err(StateError::Missing { section }),
            Some(part) if part.version == kind.1 => decode(&section, part.payload),
            Some(part) => Err(StateError::Version {
                section,
                found: part.version,
                supported: kind.1..=kind.1,
            }),
        }
    }

    fn machine(&mut self, machine: &MachineStateV2) -> Result<MachineState, StateError> {
        check_number("vCPUs", machine.vcpus.into(), MAX_VCPUS)?;
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
        let mut devices = Vec::new();
        for slot in 0..VIRTIO_SLOTS {
            if !self.0.contains_key(&Key::Fixed(TRANSPORT.0, slot)) {
                continue;
            }
            let transport: MmioTransportStateV1 = self.take(TRANSPORT, slot)?;
            let device = self.device(slot)?;
            devices.push(SlotState {
                slot,
                transport: TransportState { transport, device },
            });
        }
        Ok(devices)
    }

    /// Takes the device in a slot.
    fn device(&mut self, slot: u32) -> Result<DevicePayload, StateError> {
        let part = self.0.remove(&Key::Device(slot));
        let part = part.ok_or(StateError::NoDevice { slot })?;
        let (kind, _) = parse(part.name).ok_or_else(|| part.unknown())?;
        Ok(DevicePayload {
            kind: kind.to_owned(),
            version: part.version,
            bytes: part.payload.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests;
