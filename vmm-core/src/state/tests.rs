use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sm_hypervisor::state::Blob;
use sm_virtio::queue::QueueStateV1;

use super::machine_v1::MachineStateV1;
use super::*;

fn uart() -> UartStateV1 {
    UartStateV1 {
        divisor_low: 12,
        divisor_high: 1,
        interrupt_enable: 5,
        interrupt_identification: 2,
        line_control: 3,
        line_status: 0x60,
        modem_control: 8,
        modem_status: 0xb0,
        scratch: 0x5a,
        input: b"input".to_vec(),
    }
}

fn description() -> MachineStateV2 {
    MachineStateV2 {
        machine_version: 2,
        memory_bytes: 256 << 20,
        generation_id: 0x9_f000,
        vcpus: 2,
    }
}

fn device(slot: u32, kind: &str, bytes: &[u8]) -> SlotState {
    SlotState {
        slot,
        transport: TransportState {
            transport: MmioTransportStateV1 {
                device_type: slot + 1,
                status: 0xf,
                driver_features: 1 << 32,
                queues: vec![QueueStateV1::default()],
                ..MmioTransportStateV1::default()
            },
            device: DevicePayload {
                kind: kind.to_owned(),
                version: slot + 1,
                bytes: bytes.to_vec(),
            },
        },
    }
}

fn machine() -> MachineState {
    let vcpu = |index| VcpuStateV1 {
        index,
        lapic: vec![7; 16],
        ..VcpuStateV1::default()
    };
    let MachineStateV2 {
        machine_version,
        memory_bytes,
        generation_id,
        ..
    } = description();
    MachineState {
        version: machine_version,
        memory_bytes,
        generation_id,
        vm: VmStateV1 {
            blob: Blob {
                backend: "fake".to_owned(),
                version: 3,
                bytes: vec![1, 2, 3],
            },
        },
        vcpus: vec![vcpu(0), vcpu(1)],
        uart: uart(),
        // The numbers are not in the order of their spelling.
        devices: vec![
            device(0, "vsock", &[3, 0]),
            device(2, "blk", &[]),
            device(10, "blk", &[9]),
        ],
    }
}

fn read(sections: &[StateSection]) -> Result<MachineState, StateError> {
    let parts = sections.iter();
    MachineState::decode(parts.map(|s| (&*s.name, s.version, &*s.payload)))
}

#[test]
fn a_machine_is_one_section_for_each_part() {
    let sections = machine().encode().unwrap();
    let names: Vec<_> = sections.iter().map(|s| (&*s.name, s.version)).collect();
    assert_eq!(
        names,
        [
            ("machine", 2),
            ("interrupts/0", 1),
            ("vcpu-x86_64/0", 1),
            ("vcpu-x86_64/1", 1),
            ("uart/0", 1),
            ("virtio-mmio/0", 1),
            ("vsock/0", 1),
            ("virtio-mmio/2", 1),
            ("blk/2", 3),
            ("virtio-mmio/10", 1),
            ("blk/10", 11),
        ]
    );
    assert_eq!(read(&sections).unwrap(), machine());
    // In any order, and with sections that are not of the machine.
    let mut others: Vec<_> = sections.into_iter().rev().collect();
    others.push(StateSection {
        name: "memory".to_owned(),
        version: 9,
        payload: vec![0xff],
    });
    assert_eq!(read(&others).unwrap(), machine());
}

#[test]
fn every_missing_section_is_named() {
    let sections = machine().encode().unwrap();
    for absent in &sections {
        let rest: Vec<_> = sections.iter().filter(|s| *s != absent).cloned().collect();
        match (read(&rest).unwrap_err(), parse(&absent.name)) {
            (StateError::Missing { section }, _) => assert_eq!(section, absent.name),
            (StateError::NoDevice { slot }, Some((_, instance))) => assert_eq!(slot, instance),
            // A device without its transport.
            (StateError::Unknown { section }, Some(("virtio-mmio", instance))) => {
                assert_eq!(parse(&section).unwrap().1, instance);
            }
            (error, _) => panic!("{}: {error}", absent.name),
        }
    }
}

#[test]
fn every_unknown_version_is_refused_by_number() {
    let whole = machine().encode().unwrap();
    let of_device = |name: &str| name.starts_with("blk") || name.starts_with("vsock");
    for index in 0..whole.len() {
        let mut sections = whole.clone();
        sections[index].version += 40;
        let (name, version) = (sections[index].name.clone(), sections[index].version);
        if of_device(&name) {
            // The device itself refuses it.
            let devices = read(&sections).unwrap().devices;
            assert!(
                devices
                    .iter()
                    .any(|d| d.transport.device.version == version)
            );
            continue;
        }
        let error = read(&sections).unwrap_err();
        let StateError::Version { section, found, .. } = &error else {
            panic!("{name}: {error}");
        };
        assert_eq!((section, *found), (&name, version));
    }
}

#[test]
fn sections_of_no_part_and_in_excess_are_refused() {
    let whole = machine().encode().unwrap();
    let extra = |name: &str| {
        let mut sections = whole.clone();
        sections.push(StateSection {
            name: name.to_owned(),
            version: 1,
            payload: Vec::new(),
        });
        read(&sections).unwrap_err()
    };
    for name in [
        "net/4",
        "vcpu-x86_64/2",
        "uart/1",
        "blk/02",
        "a/b",
        "/",
        "blk/+2",
    ] {
        let error = extra(name);
        let unknown = matches!(&error, StateError::Unknown { section } if section == name);
        assert!(unknown, "{name}: {error}");
    }
    for section in &whole {
        let error = extra(&section.name);
        let twice = matches!(&error, StateError::Duplicate { section: s } if *s == section.name);
        assert!(twice, "{error}");
    }
    let mut confusing = machine();
    confusing.devices.push(device(0, "uart", &[]));
    let error = confusing.encode().unwrap_err();
    assert!(matches!(error, StateError::Duplicate { .. }), "{error}");
}

/// A machine has few parts, so that hostile sections cost neither memory nor time.
#[test]
fn the_first_section_beyond_a_machine_is_refused() {
    for (kind, number) in [
        ("virtio-mmio", VIRTIO_SLOTS),
        ("rng", VIRTIO_SLOTS),
        ("vcpu-x86_64", MAX_VCPUS),
        ("uart", 1),
        ("interrupts", 1),
    ] {
        let names: Vec<_> = (0..1000).map(|n| format!("{kind}/{n}")).collect();
        let mut seen = 0;
        // No payload is valid: none is decoded.
        let sections = names.iter().map(|name| {
            seen += 1;
            (&**name, 77, &[][..])
        });
        let error = MachineState::decode(sections).unwrap_err();
        let first = &names[usize::try_from(number).unwrap()];
        let named = matches!(&error, StateError::Unknown { section } if section == first);
        assert!(named, "{error}");
        assert_eq!(seen, number + 1, "{kind}");
    }
    let huge = |slot: u32| format!("virtio-mmio/{slot}");
    let error = MachineState::decode([(&*huge(u32::MAX), 1, &[][..])]).unwrap_err();
    assert!(matches!(error, StateError::Unknown { .. }), "{error}");
}

#[test]
fn more_parts_than_a_machine_has_are_refused_by_number() {
    let too_many = |sections: &[StateSection], parts: &str, number: u64| {
        let error = read(sections).unwrap_err();
        let refused = matches!(
            error, StateError::TooMany { parts: p, found, .. } if (p, found) == (parts, number)
        );
        assert!(refused, "{error}");
    };
    for number in [MAX_VCPUS + 1, u32::MAX] {
        let mut sections = machine().encode().unwrap();
        let vcpus = MachineStateV2 {
            vcpus: number,
            ..description()
        };
        sections[0].payload = postcard::to_stdvec(&vcpus).unwrap();
        too_many(&sections, "vCPUs", number.into());
    }
    // In version 1 the number is before the elements, none of which is there.
    let old = |state: MachineState| {
        let payload = postcard::to_stdvec(&MachineStateV1::from(state)).unwrap();
        StateSection {
            name: "machine".to_owned(),
            version: 1,
            payload,
        }
    };
    let mut none = machine();
    none.vcpus.clear();
    none.devices.clear();
    let mut section = old(none.clone());
    let vcpus_at = section.payload.len() - postcard::to_stdvec(&uart()).unwrap().len() - 2;
    section.payload.truncate(vcpus_at);
    section.payload.extend([0xff, 0x01]);
    too_many(&[section], "vCPUs", 255);
    let mut section = old(none.clone());
    section.payload.pop();
    section.payload.push(15);
    too_many(&[section], "devices", 15);
    for (slot, kind) in [(VIRTIO_SLOTS, "blk"), (u32::MAX, "blk"), (3, "uart")] {
        let mut state = none.clone();
        state.devices.push(device(3, kind, &[]));
        state.devices[0].slot = slot;
        let error = read(&[old(state.clone())]).unwrap_err();
        let refused = matches!(
            error, StateError::Slot { slot: s } | StateError::Kind { slot: s, .. } if s == slot
        );
        assert!(refused, "{error}");
        assert_eq!(state.encode().unwrap_err().to_string(), error.to_string());
    }
}

#[test]
fn two_devices_in_a_slot_are_both_named() {
    let whole = machine().encode().unwrap();
    for first in [false, true] {
        let mut sections = whole.clone();
        let at = if first { 0 } else { sections.len() };
        let other = StateSection {
            name: "net/2".to_owned(),
            version: 1,
            payload: Vec::new(),
        };
        sections.insert(at, other);
        let error = read(&sections).unwrap_err();
        assert!(
            matches!(error, StateError::TwoDevices { slot: 2, .. }),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains("\"net/2\"") && text.contains("\"blk/2\""),
            "{text}"
        );
    }
}

#[test]
fn no_device_has_the_kind_of_another_part() {
    for kind in [
        "interrupts",
        "uart",
        "machine",
        "virtio-mmio",
        "vcpu-x86_64",
        "vcpu-aarch64",
    ] {
        let mut state = machine();
        state.devices.push(device(5, kind, &[]));
        let error = state.encode().unwrap_err();
        let refused = match kind {
            // The name of the device's own transport.
            "virtio-mmio" => matches!(error, StateError::Duplicate { .. }),
            _ => matches!(error, StateError::Kind { slot: 5, .. }),
        };
        assert!(refused, "{error}");
        assert!(error.to_string().contains(kind), "{error}");

        // Read beside a transport without a device.
        let mut sections = machine().encode().unwrap();
        sections.retain(|section| section.name != "blk/2");
        let name = format!("{kind}/2");
        sections.retain(|section| section.name != name);
        sections.push(StateSection {
            name: name.clone(),
            version: 1,
            payload: Vec::new(),
        });
        let error = read(&sections).unwrap_err();
        let part = match kind {
            // The parts themselves.
            "virtio-mmio" => matches!(error, StateError::Malformed { .. }),
            "vcpu-x86_64" => matches!(error, StateError::NoDevice { slot: 2 }),
            _ => matches!(&error, StateError::Unknown { section } if *section == name),
        };
        assert!(part, "{kind}: {error}");
    }
}

#[test]
fn the_versions_that_are_read_are_named() {
    let error = |name: &str, version| {
        let mut sections = machine().encode().unwrap();
        let section = sections.iter_mut().find(|section| section.name == name);
        section.unwrap().version = version;
        read(&sections).unwrap_err().to_string()
    };
    assert_eq!(
        error("machine", 3),
        "section \"machine\" has version 3, and versions 1 to 2 are read; a newer sm may read it"
    );
    assert_eq!(
        error("machine", 0),
        "section \"machine\" has version 0, and versions 1 to 2 are read"
    );
    assert_eq!(
        error("uart/0", 2),
        "section \"uart/0\" has version 2, and version 1 is read; a newer sm may read it"
    );
}

#[test]
fn malformed_payloads_are_named() {
    let whole = machine().encode().unwrap();
    for index in 0..whole.len() {
        if whole[index].name.starts_with("blk") || whole[index].name.starts_with("vsock") {
            continue;
        }
        for longer in [false, true] {
            let mut sections = whole.clone();
            let payload = &mut sections[index].payload;
            if longer {
                payload.push(0);
            } else {
                payload.pop();
            }
            let error = read(&sections).unwrap_err();
            let named = matches!(
                &error, StateError::Malformed { section, .. } if *section == whole[index].name
            );
            assert!(named, "{error}");
        }
    }
    let mut swapped = machine();
    swapped.vcpus.swap(0, 1);
    let error = read(&swapped.encode().unwrap()).unwrap_err();
    assert!(error.to_string().contains("vcpu-x86_64/0"), "{error}");
}

#[test]
fn a_machine_in_one_section_is_read() {
    let old = StateSection {
        name: "machine".to_owned(),
        version: 1,
        payload: postcard::to_stdvec(&MachineStateV1::from(machine())).unwrap(),
    };
    assert_eq!(read(std::slice::from_ref(&old)).unwrap(), machine());
    let mut mixed = machine().encode().unwrap();
    mixed[0] = old;
    let error = read(&mixed).unwrap_err();
    assert!(matches!(error, StateError::Unknown { .. }), "{error}");
}

fn golden(file: &str) -> PathBuf {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    all.join(file)
}

/// Snapshots have these bytes: the files do not change. A new version of a section is a
/// new type with a file of its own, which [`write_golden`] is extended to write. (The
/// sections of vCPUs, interrupts and transports are fixed where their types are.)
#[test]
fn the_encoding_of_sections_is_fixed() {
    let bytes = fs::read(golden("machine-2.bin")).unwrap();
    assert_eq!(postcard::to_stdvec(&description()).unwrap(), bytes);
    assert_eq!(decode::<MachineStateV2>("", &bytes).unwrap(), description());
    let bytes = fs::read(golden("uart-1.bin")).unwrap();
    assert_eq!(postcard::to_stdvec(&uart()).unwrap(), bytes);
    assert_eq!(decode::<UartStateV1>("", &bytes).unwrap(), uart());
}

#[test]
#[ignore = "writes files of the source tree"]
fn write_golden() {
    let machine = postcard::to_stdvec(&description()).unwrap();
    fs::write(golden("machine-2.bin"), machine).unwrap();
    let uart = postcard::to_stdvec(&uart()).unwrap();
    fs::write(golden("uart-1.bin"), uart).unwrap();
}

proptest! {
    /// With arbitrary bytes as any one section, the state is refused, or one that is
    /// encoded as these sections again.
    #[test]
    fn any_bytes_of_a_section_decode_or_fail(
        at in any::<prop::sample::Index>(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut sections = machine().encode().unwrap();
        let index = at.index(sections.len());
        sections[index].payload = payload;
        if let Ok(state) = read(&sections) {
            prop_assert_eq!(read(&state.encode().unwrap()).unwrap(), state);
        }
    }

    #[test]
    fn any_change_of_a_section_is_survived(
        at in any::<prop::sample::Index>(),
        byte in any::<prop::sample::Index>(),
        value: u8,
    ) {
        let mut sections = machine().encode().unwrap();
        let index = at.index(sections.len());
        if let [_, ..] = *sections[index].payload {
            let byte = byte.index(sections[index].payload.len());
            sections[index].payload[byte] = value;
        }
        if let Ok(state) = read(&sections) {
            prop_assert_eq!(read(&state.encode().unwrap()).unwrap(), state);
        }
    }

    #[test]
    fn any_bytes_of_a_whole_machine_decode_or_fail(
        cut in any::<prop::sample::Index>(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let _ = MachineState::decode([("machine", 1, &*payload)]);
        let whole = postcard::to_stdvec(&MachineStateV1::from(machine())).unwrap();
        let cut = &whole[..cut.index(whole.len())];
        prop_assert!(MachineState::decode([("machine", 1, cut)]).is_err());
    }
}
