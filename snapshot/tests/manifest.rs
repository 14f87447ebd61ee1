//! Snapshots whose manifest and state are of different machines, each with valid digests.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;

use sm_hypervisor::state::VmSavedState;
use sm_hypervisor::state::x86_64::VcpuState;
use sm_snapshot::Error;
use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::chain::Chain;
use sm_snapshot::machine;
use sm_snapshot::manifest::{DeviceEntry, Layer, Manifest, StateEntry};
use sm_snapshot::state_file::{Section, StateFile};
use sm_snapshot::store::{SnapshotStore, read_manifest};
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use sm_vmm_core::state::MachineState;

fn section(name: &str, payload: Vec<u8>) -> Section {
    Section {
        name: name.to_owned(),
        version: 1,
        payload,
    }
}

fn state(memory_bytes: u64, vcpus: u32) -> MachineState {
    let vcpu = |index| VcpuState {
        index,
        ..VcpuState::default()
    };
    MachineState {
        version: 2,
        memory_bytes,
        generation_id: 0,
        vm: VmSavedState::default(),
        vcpus: (0..vcpus).map(vcpu).collect(),
        uart: sm_vmm_core::serial::UartStateV1::default(),
        devices: Vec::new(),
    }
}

/// Returns the sections of a machine with a device of `kind` in slot 1.
fn sections(state: &MachineState, kind: &str) -> Vec<Section> {
    let mut sections = machine::encode(state).unwrap();
    // A transport in its reset state has ten fields of one byte.
    sections.push(section("virtio-mmio/1", vec![0; 10]));
    sections.push(section(&format!("{kind}/1"), Vec::new()));
    sections
}

struct Fixture {
    _dir: tempfile::TempDir,
    store: SnapshotStore,
    at: PathBuf,
    manifest: Manifest,
}

/// Returns a snapshot with one vCPU and an entropy device.
fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(&dir.path().join("s")).unwrap();
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    let description = Description {
        layer: Layer::Base,
        sm_version: "test".into(),
        machine_version: 2,
        vcpus: 1,
        kernel: "k".into(),
        agent: "a".into(),
        cpu: sm_snapshot::cpu::CpuFeatures::default(),
        protocol: 1,
        devices: vec![DeviceEntry {
            slot: 1,
            kind: "rng".into(),
        }],
        labels: BTreeMap::new(),
    };
    let sections = sections(&state(MIN_MEMORY, 1), "rng");
    let capture = Capture::begin(&store, &memory, Ancestry::Booted).unwrap();
    capture.finish(&store, "s", description, sections).unwrap();
    let at = dir.path().join("s/s");
    let manifest = read_manifest(&at).unwrap();
    Fixture {
        _dir: dir,
        store,
        at,
        manifest,
    }
}

impl Fixture {
    fn describe(&self, change: impl FnOnce(&mut Manifest)) {
        let mut manifest = self.manifest.clone();
        change(&mut manifest);
        let bytes = manifest.encode().unwrap();
        fs::write(self.at.join("manifest.json"), bytes).unwrap();
    }

    fn store(&self, change: impl FnOnce(&mut Vec<Section>)) {
        let chain = Chain::open(&self.store, "s").unwrap();
        let mut sections = chain.tip().state.sections.clone();
        drop(chain);
        change(&mut sections);
        let (bytes, digest) = StateFile { sections }.encode();
        let len = bytes.len() as u64;
        fs::write(self.at.join("state.bin"), bytes).unwrap();
        self.describe(|manifest| manifest.state = StateEntry { len, digest });
    }

    fn open(&self) -> Result<MachineState, Error> {
        machine::decode(&Chain::open(&self.store, "s")?)
    }

    fn assert_damaged(&self, reason: &str) {
        let error = self.open().unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn the_memory_of_a_manifest_is_that_of_its_file() {
    let f = fixture();
    f.open().unwrap();
    f.describe(|manifest| manifest.memory_bytes *= 2);
    let opened = Chain::open(&f.store, "s");
    assert!(matches!(opened, Err(Error::Damaged { .. })));
    f.assert_damaged("bytes of memory, and a file with");
    for other in [MIN_MEMORY * 2, MIN_MEMORY + 1] {
        f.describe(|manifest| {
            manifest.memory_bytes = other;
            manifest.memory.len = other;
        });
        let memory = File::options().write(true).open(f.at.join("memory.bin"));
        memory.unwrap().set_len(other).unwrap();
        f.assert_damaged("page index does not fit");
    }
}

#[test]
fn the_state_is_of_the_machine_of_its_manifest() {
    let f = fixture();
    f.describe(|manifest| manifest.vcpus = 2);
    f.assert_damaged("its machine has 1 vCPUs, and the manifest says 2");
    f.describe(|_| {});
    f.store(|all| {
        all.retain(|section| section.name == "memory");
        all.extend(sections(&state(2 * MIN_MEMORY, 1), "rng"));
    });
    f.assert_damaged("bytes of memory, and the manifest says");
}

#[test]
fn the_devices_are_those_of_a_manifest_of_format_3() {
    let f = fixture();
    f.describe(|manifest| manifest.devices.clear());
    f.assert_damaged("the devices [rng/1], and the manifest says []");
    f.describe(|manifest| "blk".clone_into(&mut manifest.devices[0].kind));
    f.assert_damaged("the manifest says [blk/1]");
    for format in [1, 2] {
        f.describe(|manifest| {
            manifest.format = format;
            manifest.page_bytes = None;
            manifest.devices.clear();
        });
        f.open().unwrap();
    }
}

#[test]
fn bytes_after_the_page_index_are_refused() {
    let f = fixture();
    f.store(|sections| sections[0].payload.push(0));
    f.assert_damaged("1 bytes follow its page index");
}

#[test]
fn two_devices_in_a_slot_are_both_named() {
    let f = fixture();
    f.store(|sections| sections.push(section("net/1", Vec::new())));
    let error = f.open().unwrap_err();
    assert!(matches!(error, Error::Incompatible { .. }), "{error:?}");
    let error = error.to_string();
    assert!(
        error.contains("rng/1") && error.contains("net/1"),
        "{error}"
    );
}
