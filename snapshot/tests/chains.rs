//! Tests of chains of diffs with real private mappings, without a VM.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test"
)]

mod common;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use proptest::prelude::*;
use sm_snapshot::Error;
use sm_snapshot::capture::{Ancestry, Capture};
use sm_snapshot::chain::{Chain, MAX_DEPTH, MAX_PIECES};
use sm_snapshot::contents::{self, Difference};
use sm_snapshot::extents::ExtentKind;
use sm_snapshot::flat;
use sm_snapshot::manifest::Layer;
use sm_snapshot::restore::map_memory;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::verify::verify;
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use vm_memory::{Bytes as _, GuestAddress};

use self::common::{description, sections};

const PAGE: u64 = 4096;

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(&dir.path().join("s")).unwrap();
    (dir, store)
}

fn capture(store: &SnapshotStore, name: &str, memory: &MachineMemory, ancestry: Ancestry<'_>) {
    common::capture(store, name, memory, ancestry, Layer::Base);
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
        memory = map_memory(&chain).unwrap();
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
    let chain = Chain::open(&store, "s4").unwrap();
    capture(&store, "full", &memory, Ancestry::Full(&chain));
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
        diff.tip().index.count(ExtentKind::Data) <= 51,
        "only changes are stored"
    );
    assert_eq!(diff.tip().index.count(ExtentKind::Zero), 1);

    flat::flatten_to(&store, &diff, "flat").unwrap();
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
fn a_snapshot_is_flattened_in_place_unless_it_is_used() {
    let (dir, store) = store();
    let memory = booted();
    write(&memory, 3, 33);
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let memory = map_memory(&chain).unwrap();
    write(&memory, 4, 44);
    capture(&store, "tip", &memory, Ancestry::Diff(&chain));
    // Mapped memory counts as a use.
    drop((chain, memory));
    let held = Chain::open(&store, "tip").unwrap();
    let refused = flat::flatten(&store, "tip").unwrap_err();
    assert!(matches!(refused, Error::InUse { .. }), "{refused}");
    let refused = flat::flatten(&store, "base").unwrap_err().to_string();
    assert!(refused.contains("builds on it"), "{refused}");
    drop(held);
    let manifest = flat::flatten(&store, "tip").unwrap();
    assert_eq!(manifest.parent, None);
    store.remove("base").unwrap();
    let flat = Chain::open(&store, "tip").unwrap();
    assert_eq!((flat.members().len(), flat.stored()), (1, vec![(3, 2)]));
    verify(&flat).unwrap();
    let memory = map_memory(&flat).unwrap();
    assert_eq!((read(&memory, 3), read(&memory, 4)), (33, 44));
    let left = fs::read_dir(dir.path().join("s")).unwrap().count();
    assert_eq!(left, 2, "the snapshot, and the lock");
}

#[test]
fn further_files_are_part_of_a_flat_copy() {
    let (dir, store) = store();
    let memory = booted();
    let layer = dir.path().join("layer");
    fs::write(&layer, "layer").unwrap();
    let begun = Capture::begin(&store, &memory, Ancestry::Booted).unwrap();
    begun
        .add_file("disk-3.0", |path| fs::hard_link(&layer, path))
        .unwrap();
    let sections = sections("tip");
    begun
        .finish(&store, "tip", description(Layer::Base), sections)
        .unwrap();
    let chain = Chain::open(&store, "tip").unwrap();
    flat::flatten_to(&store, &chain, "flat").unwrap();
    drop(chain);
    flat::flatten(&store, "tip").unwrap();
    for name in ["tip", "flat"] {
        let path = dir.path().join("s").join(name).join("disk-3.0");
        assert_eq!(fs::read_to_string(path).unwrap(), "layer");
    }
    // Files that are shared are no space of a snapshot.
    fs::write(&layer, vec![1; 1 << 20]).unwrap();
    for entry in store.list().unwrap() {
        assert!(entry.disk_bytes < 1 << 20, "{}", entry.disk_bytes);
    }
}

#[test]
fn clones_do_not_see_each_other_nor_change_the_snapshot() {
    let (_dir, store) = store();
    let memory = booted();
    write(&memory, 3, 33);
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let (a, b) = (map_memory(&chain).unwrap(), map_memory(&chain).unwrap());
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
        let memory = map_memory(&chain).unwrap();
        write(&memory, depth as u64, 1);
        capture(
            &store,
            &format!("d{depth}"),
            &memory,
            Ancestry::Diff(&chain),
        );
    }
    let chain = Chain::open(&store, &format!("d{}", MAX_DEPTH - 1)).unwrap();
    let memory = map_memory(&chain).unwrap();
    let error = Capture::begin(&store, &memory, Ancestry::Diff(&chain)).unwrap_err();
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

/// Verification covers everything that can be mapped. A root is mapped as a whole, so the
/// pages that it does not store are verified as well.
#[test]
fn data_in_a_hole_is_found() {
    let (dir, store) = store();
    let memory = booted();
    for page in [0, 9, 10, 4000] {
        write(&memory, page, 9);
    }
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    verify(&chain).unwrap();
    let path = dir.path().join("s/base/memory.bin");
    let file = fs::File::options().write(true).open(path).unwrap();
    for page in [1, 8, 11, 300, 3999, 4001, MIN_MEMORY / PAGE - 1] {
        file.write_all_at(&[1], page * PAGE + 77).unwrap();
        let error = verify(&chain).unwrap_err().to_string();
        assert!(error.contains(&format!("page {page},")), "{error}");
        file.write_all_at(&[0], page * PAGE + 77).unwrap();
        verify(&chain).unwrap();
    }
}

#[test]
fn a_whole_snapshot_of_a_restored_machine_reads_only_what_the_chain_stores() {
    let (_dir, store) = store();
    let memory = booted();
    write(&memory, 5, 5);
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let memory = map_memory(&chain).unwrap();
    write(&memory, 7000, 7);
    capture(&store, "full", &memory, Ancestry::Full(&chain));
    let full = Chain::open(&store, "full").unwrap();
    assert_eq!(full.members().len(), 1);
    assert_eq!(full.stored(), [(5, 1), (7000, 1)]);
    // Reading a page maps it, so the mapped pages are those that were read.
    let mapped = WorkingSet::record(&memory).unwrap();
    assert!(mapped.pages() < 200, "{} pages were read", mapped.pages());
}

/// A snapshot in which each of the first hundred pages contains its number plus one.
fn hundred_pages(store: &SnapshotStore) -> Chain {
    let memory = booted();
    for page in 0..100 {
        write(&memory, page, page + 1);
    }
    capture(store, "base", &memory, Ancestry::Booted);
    Chain::open(store, "base").unwrap()
}

#[test]
fn only_changed_pages_of_filled_memory_are_stored() {
    let (_dir, store) = store();
    let chain = hundred_pages(&store);
    // Like a pager, this copies all pages, which are then private to this process.
    let filled = booted();
    for page in 0..100 {
        write(&filled, page, page + 1);
    }
    write(&filled, 3, 33);
    write(&filled, 50, 0);
    write(&filled, 1000, 1);
    capture(&store, "diff", &filled, Ancestry::Filled(&chain));
    let diff = Chain::open(&store, "diff").unwrap();
    assert_eq!(diff.tip().index.count(ExtentKind::Data), 2);
    assert_eq!(diff.tip().index.count(ExtentKind::Zero), 1);
    let memory = map_memory(&diff).unwrap();
    for (page, value) in [(2, 3), (3, 33), (50, 0), (99, 100), (1000, 1)] {
        assert_eq!(read(&memory, page), value, "page {page}");
    }
}

#[test]
fn pages_that_were_copied_ahead_are_stored_only_if_they_changed() {
    let (_dir, store) = store();
    let chain = hundred_pages(&store);
    let memory = map_memory(&chain).unwrap();
    let set = WorkingSet {
        runs: vec![(0, 60)],
        written: vec![(10, 30), (90, 20)],
    };
    assert_eq!(set.prefetch(&memory), 60);
    let private = sm_snapshot::pagemap::private(&memory.guest).unwrap();
    assert_eq!(private, set.written, "they are copies");
    write(&memory, 12, 777);
    write(&memory, 20, 0);
    write(&memory, 50, 51);
    let ancestry = Ancestry::of(&chain, false, &set.written);
    capture(&store, "diff", &memory, ancestry);
    let diff = Chain::open(&store, "diff").unwrap();
    // Page 50 was overwritten with the value that it had.
    assert_eq!(diff.tip().index.count(ExtentKind::Data), 2);
    assert_eq!(diff.tip().index.count(ExtentKind::Zero), 1);
    let memory = map_memory(&diff).unwrap();
    for (page, value) in [(10, 11), (12, 777), (20, 0), (50, 51), (99, 100), (105, 0)] {
        assert_eq!(read(&memory, page), value, "page {page}");
    }
}

/// Each piece is a mapping, of which a process can have about 65,000. A guest that writes
/// to scattered pages must not cause a snapshot that cannot be restored.
#[test]
fn scattered_changes_are_joined() {
    let (_dir, store) = store();
    capture(&store, "base", &booted(), Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let memory = map_memory(&chain).unwrap();
    let pages = MIN_MEMORY / PAGE;
    for page in (0..pages).step_by(2) {
        // A third of the written values are zero.
        write(&memory, page, page % 3);
    }
    capture(&store, "diff", &memory, Ancestry::Diff(&chain));
    let diff = Chain::open(&store, "diff").unwrap();
    assert_eq!(diff.members().len(), 2);
    assert!(diff.pieces().len() < 3000, "{}", diff.pieces().len());
    verify(&diff).unwrap();
    let restored = map_memory(&diff).unwrap();
    for page in 0..pages {
        let value = if page % 2 == 0 { page % 3 } else { 0 };
        assert_eq!(read(&restored, page), value, "page {page}");
    }
}

#[test]
fn changes_too_scattered_to_join_are_stored_whole() {
    let (_dir, store) = store();
    let gib = 1 << 30;
    let memory = MachineMemory::anonymous(&MemoryConfig::new(3 * gib)).unwrap();
    write(&memory, 1, 11);
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let memory = map_memory(&chain).unwrap();
    let scattered = || (0..3 * gib / PAGE).step_by(70).skip(1);
    for page in scattered() {
        write(&memory, page, page);
    }
    assert!(scattered().count() * 2 > MAX_PIECES);
    capture(&store, "next", &memory, Ancestry::Diff(&chain));
    let next = Chain::open(&store, "next").unwrap();
    assert!(next.pieces().len() <= MAX_PIECES);
    assert!(next.tip().lease.manifest().parent.is_none());
    verify(&next).unwrap();
    let restored = map_memory(&next).unwrap();
    assert_eq!(read(&restored, 1), 11);
    for page in scattered() {
        assert_eq!(read(&restored, page), page);
    }
}

/// The files of a snapshot and of the snapshot that it builds on.
fn files() -> (tempfile::TempDir, SnapshotStore, Vec<PathBuf>) {
    let (dir, store) = store();
    let memory = booted();
    write(&memory, 9, 9);
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let memory = map_memory(&chain).unwrap();
    write(&memory, 10, 10);
    capture(&store, "tip", &memory, Ancestry::Diff(&chain));
    let files = ["base", "tip"].iter().flat_map(|name| {
        let at = dir.path().join("s").join(name);
        ["manifest.json", "state.bin", "memory.bin"].map(|file| at.join(file))
    });
    let files = files.collect();
    (dir, store, files)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_file_cut_anywhere_is_refused(which in 0usize..6, at in any::<prop::sample::Index>()) {
        // Files are restored after each case, so that all cases share one store.
        thread_local! {
            static FILES: (tempfile::TempDir, SnapshotStore, Vec<PathBuf>) = files();
        }
        FILES.with(|(_, store, files)| {
            let path = &files[which];
            let file = fs::File::options().read(true).write(true).open(path).unwrap();
            let whole = file.metadata().unwrap().len();
            let mut before = vec![0; (16 * PAGE).min(whole) as usize];
            file.read_exact_at(&mut before, 0).unwrap();
            let cut = at.index(whole as usize) as u64;

            file.set_len(cut).unwrap();
            let opened = Chain::open(store, "tip");
            prop_assert!(opened.is_err(), "{} cut to {cut}", path.display());

            // The file has its former length, but the cut part is zero.
            file.set_len(whole).unwrap();
            let mut after = vec![0; before.len()];
            file.read_exact_at(&mut after, 0).unwrap();
            let verified = Chain::open(store, "tip").and_then(|chain| verify(&chain));
            prop_assert_eq!(verified.is_ok(), after == before, "{} from {}", path.display(), cut);

            file.write_all_at(&before, 0).unwrap();
            prop_assert!(Chain::open(store, "tip").and_then(|chain| verify(&chain)).is_ok());
            Ok(())
        })?;
    }
}

#[test]
fn a_replaced_parent_is_refused() {
    let (_dir, store) = store();
    let memory = booted();
    capture(&store, "base", &memory, Ancestry::Booted);
    let chain = Chain::open(&store, "base").unwrap();
    let clone = map_memory(&chain).unwrap();
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
    assert!(error.contains("is not the snapshot"), "{error}");
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
            memory = map_memory(&next).unwrap();
            for page in 0..64 {
                prop_assert_eq!(read(&memory, page), model[page as usize]);
            }
            chain = Some(next);
        }
    }
}
