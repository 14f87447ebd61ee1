//! Chains of diffs, from real private mappings, without a VM.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;
use sm_snapshot::Error;
use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::chain::{Chain, MAX_DEPTH};
use sm_snapshot::contents::{self, Difference};
use sm_snapshot::extents::Content;
use sm_snapshot::manifest::Layer;
use sm_snapshot::restore::map_memory;
use sm_snapshot::state_file::Section;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::verify::verify;
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use vm_memory::{Bytes as _, GuestAddress};

const PAGE: u64 = 4096;

fn description() -> Description {
    Description {
        layer: Layer::Base,
        sm_version: "test".into(),
        machine_version: 1,
        vcpus: 1,
        kernel: "k".into(),
        agent: "a".into(),
        protocol: 1,
        devices: Vec::new(),
        labels: BTreeMap::new(),
    }
}

fn sections(text: &str) -> Vec<Section> {
    vec![Section {
        name: "machine".into(),
        version: 1,
        payload: text.as_bytes().to_vec(),
    }]
}

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(&dir.path().join("s")).unwrap();
    (dir, store)
}

fn capture(store: &SnapshotStore, name: &str, memory: &MachineMemory, ancestry: Ancestry<'_>) {
    Capture::begin(store, &memory.guest, ancestry)
        .unwrap()
        .finish(store, name, description(), sections(name))
        .unwrap();
}

fn write(memory: &MachineMemory, page: u64, value: u64) {
    memory
        .guest
        .write_obj(value, GuestAddress(page * PAGE + 64))
        .unwrap();
}

fn read(memory: &MachineMemory, page: u64) -> u64 {
    memory
        .guest
        .read_obj(GuestAddress(page * PAGE + 64))
        .unwrap()
}

fn booted() -> MachineMemory {
    MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap()
}

#[test]
fn a_chain_of_five_diffs_equals_a_full_snapshot() {
    let (_dir, store) = store();
    let mut memory = booted();
    for page in 0..200 {
        write(&memory, page * 7, page + 1);
    }
    capture(&store, "s0", &memory, Ancestry::Booted);
    for depth in 1..=5u64 {
        let chain = Chain::open(&store, &format!("s{}", depth - 1)).unwrap();
        memory = map_memory(&chain, false).unwrap();
        for page in 0..50 {
            write(&memory, page * 7 * depth, 1000 * depth + page);
        }
        write(&memory, 7 * 180 + 7 * depth, 0); // a page that becomes zero
        capture(
            &store,
            &format!("s{depth}"),
            &memory,
            Ancestry::Diff(&chain),
        );
    }
    capture(&store, "full", &memory, Ancestry::Full);
    let (diff, full) = (
        Chain::open(&store, "s5").unwrap(),
        Chain::open(&store, "full").unwrap(),
    );
    assert_eq!(diff.members().len(), 6);
    let pages = MIN_MEMORY / PAGE;
    let equal = Difference {
        pages,
        different: 0,
    };
    assert_eq!(contents::compare(&diff, &full).unwrap(), equal);
    assert_eq!(contents::compare(&full, &diff).unwrap(), equal);
    assert!(verify(&diff).unwrap().snapshots == 6);
    assert!(
        diff.tip().index.count(Content::Data) <= 51,
        "only changes are stored"
    );
    assert_eq!(diff.tip().index.count(Content::Zero), 1);

    contents::flatten_to(&store, &diff, "flat").unwrap();
    let flat = Chain::open(&store, "flat").unwrap();
    assert_eq!(flat.members().len(), 1);
    assert_eq!(contents::compare(&flat, &full).unwrap(), equal);
    assert_eq!(
        flat.tip().state.sections.last(),
        diff.tip().state.sections.last(),
        "the machine's state comes along"
    );
}

#[test]
fn clones_do_not_see_each_other_nor_change_the_snapshot() {
    let (_dir, store) = store();
    let memory = booted();
    write(&memory, 3, 33);
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let (a, b) = (
        map_memory(&chain, false).unwrap(),
        map_memory(&chain, false).unwrap(),
    );
    write(&a, 3, 1);
    write(&a, 4, 2);
    assert_eq!((read(&b, 3), read(&b, 4)), (33, 0));
    verify(&chain).unwrap();
}

#[test]
fn only_touched_pages_cost_disk() {
    let (_dir, store) = store();
    let memory = booted();
    for page in 100..120 {
        write(&memory, page, 1);
    }
    capture(&store, "base", &memory, Ancestry::Booted);
    let entry = &store.list().unwrap()[0];
    assert!(
        entry.disk_bytes < 20 * PAGE + (64 << 10),
        "{}",
        entry.disk_bytes
    );
}

#[test]
fn chains_deeper_than_the_limit_are_refused_on_creation() {
    let (_dir, store) = store();
    capture(&store, "d0", &booted(), Ancestry::Booted);
    for depth in 1..MAX_DEPTH {
        let chain = Chain::open(&store, &format!("d{}", depth - 1)).unwrap();
        let memory = map_memory(&chain, false).unwrap();
        write(&memory, depth as u64, 1);
        capture(
            &store,
            &format!("d{depth}"),
            &memory,
            Ancestry::Diff(&chain),
        );
    }
    let chain = Chain::open(&store, &format!("d{}", MAX_DEPTH - 1)).unwrap();
    let memory = map_memory(&chain, false).unwrap();
    let error = Capture::begin(&store, &memory.guest, Ancestry::Diff(&chain)).unwrap_err();
    assert!(matches!(error, Error::TooDeep { .. }), "{error}");
}

#[test]
fn altered_memory_is_found_by_verification_and_other_files_on_opening() {
    let (dir, store) = store();
    let memory = booted();
    write(&memory, 9, 9);
    capture(&store, "base", &memory, Ancestry::Booted);
    let at = dir.path().join("s/base");
    let file = fs::File::options()
        .write(true)
        .open(at.join("memory.bin"))
        .unwrap();
    file.write_all_at(&[1], 9 * PAGE + 5).unwrap();
    let chain = Chain::open(&store, "base").unwrap();
    let error = verify(&chain).unwrap_err().to_string();
    assert!(
        error.contains("memory.bin") && error.contains("pages 9..10"),
        "{error}"
    );
    file.set_len(MIN_MEMORY - 1).unwrap();
    assert!(matches!(
        Chain::open(&store, "base"),
        Err(Error::Damaged { .. })
    ));
    file.set_len(MIN_MEMORY).unwrap();
    for name in ["manifest.json", "state.bin"] {
        let path = at.join(name);
        let whole = fs::read(&path).unwrap();
        for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(Chain::open(&store, "base").is_err(), "{name} cut to {cut}");
        }
        fs::write(&path, &whole).unwrap();
    }
    Chain::open(&store, "base").unwrap();
}

#[test]
fn a_replaced_parent_is_refused() {
    let (_dir, store) = store();
    let memory = booted();
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let clone = map_memory(&chain, false).unwrap();
    write(&clone, 1, 1);
    capture(&store, "child", &clone, Ancestry::Diff(&chain));
    drop(chain);
    let parent = _dir.path().join("s/base");
    let aside = _dir.path().join("s/moved");
    fs::rename(&parent, &aside).unwrap();
    let error = Chain::open(&store, "child").unwrap_err().to_string();
    assert!(
        error.contains("\"base\"") && error.contains("does not exist"),
        "{error}"
    );
    write(&memory, 2, 2);
    capture(&store, "base", &memory, Ancestry::Booted);
    let error = Chain::open(&store, "child").unwrap_err().to_string();
    assert!(error.contains("another one"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_restored_machine_reads_what_was_captured(
        layers in prop::collection::vec(prop::collection::vec((0u64..64, 0u64..3), 0..20), 1..5),
    ) {
        let (_dir, store) = store();
        let mut model = [0u64; 64];
        let mut memory = booted();
        let mut chain = None;
        for (depth, writes) in layers.iter().enumerate() {
            for &(page, value) in writes {
                write(&memory, page, value);
                model[page as usize] = value;
            }
            let ancestry = chain.as_ref().map_or(Ancestry::Booted, Ancestry::Diff);
            let name = format!("p{depth}");
            capture(&store, &name, &memory, ancestry);
            let next = Chain::open(&store, &name).unwrap();
            memory = map_memory(&next, false).unwrap();
            for page in 0..64 {
                prop_assert_eq!(read(&memory, page), model[page as usize]);
            }
            chain = Some(next);
        }
    }
}
