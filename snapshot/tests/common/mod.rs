//! Snapshots that tests take.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;

use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::manifest::Layer;
use sm_snapshot::state_file::Section;
use sm_snapshot::store::SnapshotStore;
use sm_vmm_core::memory::MachineMemory;

/// The description of a machine without devices.
pub(crate) fn description(layer: Layer) -> Description {
    Description {
        layer,
        sm_version: "test".into(),
        machine_version: 1,
        vcpus: 1,
        kernel: "k".into(),
        agent: "a".into(),
        cpu: sm_snapshot::cpu::CpuFeatures::default(),
        protocol: 1,
        devices: Vec::new(),
        labels: BTreeMap::new(),
    }
}

/// The state of a machine: one section.
pub(crate) fn sections(payload: impl Into<Vec<u8>>) -> Vec<Section> {
    vec![Section {
        name: "machine".into(),
        version: 1,
        payload: payload.into(),
    }]
}

/// Takes a snapshot of memory.
pub(crate) fn capture(
    store: &SnapshotStore,
    name: &str,
    memory: &MachineMemory,
    ancestry: Ancestry<'_>,
    layer: Layer,
) {
    Capture::begin(store, memory, ancestry)
        .unwrap()
        .finish(store, name, description(layer), sections(name))
        .unwrap();
}
