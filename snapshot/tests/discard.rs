//! Pages that a guest has returned to the host: in machines that were restored in every way,
//! and in the snapshots of these.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use sm_snapshot::capture::Ancestry;
use sm_snapshot::chain::Chain;
use sm_snapshot::extents::ExtentKind;
use sm_snapshot::manifest::Layer;
use sm_snapshot::pagemap::Pagemap;
use sm_snapshot::restore::map_memory;
use sm_snapshot::runs::Run;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::userfault::{ChainPages, Pager, page_in};
use sm_snapshot::verify::verify;
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use vm_memory::{Bytes as _, GuestAddress};

const PAGE: u64 = 4096;
/// Pages of the first snapshot that are not zero; page `n` contains the number `n`.
const STORED: u64 = 1024;
/// Pages that the machines write to before they return them: whole blocks of the pager.
const WRITTEN: std::ops::Range<u64> = 16..528;

#[derive(Clone, Copy, Debug)]
enum Way {
    /// Pages are mapped when they are accessed.
    Mapped,
    /// All pages are mapped at first.
    Eager,
    /// Pages of an earlier machine's working set are copied at first.
    Copied,
    /// Pages are filled by userfaultfd.
    Filled,
}

const WAYS: [Way; 4] = [Way::Mapped, Way::Eager, Way::Copied, Way::Filled];

struct Restored {
    memory: MachineMemory,
    copied: Vec<Run>,
    pager: Option<Pager>,
}

/// Returns `None` if this process may not use userfaultfd.
fn restore(chain: &Chain, way: Way) -> Option<Restored> {
    let mut restored = Restored {
        memory: map_memory(chain).unwrap(),
        copied: Vec::new(),
        pager: None,
    };
    match way {
        Way::Mapped => {}
        Way::Eager => assert!(WorkingSet::all(chain).prefetch(&restored.memory) > 0),
        Way::Copied => {
            let set = WorkingSet {
                runs: vec![(0, STORED)],
                written: vec![(5, 60)],
            };
            assert_eq!(set.prefetch(&restored.memory), STORED);
            restored.copied = set.written;
        }
        Way::Filled => {
            let never = |error: std::io::Error| panic!("{error}");
            let source = ChainPages::new(chain).unwrap();
            match page_in(MIN_MEMORY, source, Box::new(never)) {
                Ok((memory, pager)) => {
                    restored.memory = memory;
                    restored.pager = Some(pager);
                }
                Err(error) => {
                    eprintln!("skipped: {error}: {:?}", std::error::Error::source(&error));
                    return None;
                }
            }
        }
    }
    Some(restored)
}

impl Restored {
    fn ancestry<'a>(&'a self, chain: &'a Chain) -> Ancestry<'a> {
        Ancestry::of(chain, self.pager.is_some(), &self.copied)
    }

    fn discard(&self, first: u64, pages: u64) -> u64 {
        let pagemap = Pagemap::open().unwrap();
        let returned = self.memory.discard(&pagemap, first * PAGE, pages * PAGE);
        returned.unwrap() / PAGE
    }

    fn write(&self, page: u64, value: u64) {
        let at = GuestAddress(page * PAGE + 64);
        self.memory.guest.write_obj(value, at).unwrap();
    }

    fn read(&self, page: u64) -> u64 {
        let at = GuestAddress(page * PAGE + 64);
        self.memory.guest.read_obj(at).unwrap()
    }
}

fn store() -> (tempfile::TempDir, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(&dir.path().join("s")).unwrap();
    (dir, store)
}

fn capture(store: &SnapshotStore, name: &str, memory: &MachineMemory, ancestry: Ancestry<'_>) {
    common::capture(store, name, memory, ancestry, Layer::Base);
}

/// A snapshot of a booted machine.
fn base(store: &SnapshotStore) -> Chain {
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    for page in 1..STORED {
        let at = GuestAddress(page * PAGE + 64);
        memory.guest.write_obj(page, at).unwrap();
    }
    capture(store, "base", &memory, Ancestry::Booted);
    Chain::open(store, "base").unwrap()
}

/// A machine that has written to pages and returned them.
fn used(chain: &Chain, way: Way) -> Option<Restored> {
    let machine = restore(chain, way)?;
    for page in WRITTEN {
        machine.write(page, 1 << 32);
    }
    machine.write(STORED + 7, 1 << 32);
    assert_eq!(machine.discard(16, 512), 512, "{way:?}");
    // The pager has filled its neighbours.
    assert!(machine.discard(STORED, 32) >= 1, "{way:?}");
    Some(machine)
}

#[test]
fn returned_pages_are_zero_and_others_are_intact() {
    let (_dir, store) = store();
    let chain = base(&store);
    for way in WAYS {
        let Some(machine) = used(&chain, way) else {
            continue;
        };
        for page in WRITTEN {
            assert_eq!(machine.read(page), 0, "{way:?} {page}");
        }
        for page in WRITTEN.end..STORED {
            assert_eq!(machine.read(page), page, "{way:?} {page}");
        }
        assert_eq!(machine.read(STORED + 7), 0);
    }
}

#[test]
fn returned_pages_have_no_memory_and_are_not_in_the_next_snapshot() {
    let (_dir, store) = store();
    let chain = base(&store);
    for way in WAYS {
        let Some(machine) = used(&chain, way) else {
            continue;
        };
        let private = sm_snapshot::pagemap::private(&machine.memory.guest).unwrap();
        let left: u64 = private.iter().map(|(_, pages)| *pages).sum();
        assert!(left <= 60, "{way:?}: {private:?}");
        // One is used again, and has what it had in the first snapshot.
        machine.write(29, 29);
        machine.write(30, 77);
        // Reads do not make a difference.
        assert_eq!(machine.read(40), 0);
        let name = format!("diff-{way:?}");
        capture(&store, &name, &machine.memory, machine.ancestry(&chain));
        drop(machine);
        let diff = Chain::open(&store, &name).unwrap();
        let index = &diff.tip().index;
        assert!(
            index.count(ExtentKind::Data) <= 2,
            "{way:?}: {:?}",
            index.extents
        );
        assert_eq!(index.count(ExtentKind::Zero), 510, "{way:?}");
        verify(&diff).unwrap();
        for next in WAYS {
            let Some(clone) = restore(&diff, next) else {
                continue;
            };
            for page in WRITTEN {
                let holds = match page {
                    29 => 29,
                    30 => 77,
                    _ => 0,
                };
                assert_eq!(clone.read(page), holds, "{way:?}, {next:?}: {page}");
            }
            assert_eq!(clone.read(STORED - 1), STORED - 1);
            assert_eq!(clone.read(STORED + 7), 0);
        }
    }
    // The first snapshot is unchanged.
    assert_eq!(restore(&chain, Way::Mapped).unwrap().read(100), 100);
    verify(&chain).unwrap();
}

#[test]
fn a_full_snapshot_does_not_have_them_either() {
    let (_dir, store) = store();
    let chain = base(&store);
    for way in WAYS {
        let Some(machine) = used(&chain, way) else {
            continue;
        };
        let name = format!("full-{way:?}");
        capture(&store, &name, &machine.memory, Ancestry::Full(&chain));
        let full = Chain::open(&store, &name).unwrap();
        assert_eq!(full.members().len(), 1);
        let stored = full.tip().index.count(ExtentKind::Data);
        assert_eq!(stored, STORED - 1 - 512, "{way:?}");
        let clone = restore(&full, Way::Mapped).unwrap();
        assert_eq!((clone.read(100), clone.read(600)), (0, 600));
    }
}

#[test]
fn a_reset_brings_back_the_snapshot() {
    let (_dir, store) = store();
    let chain = base(&store);
    for way in WAYS {
        let Some(machine) = used(&chain, way) else {
            continue;
        };
        machine.write(3, 5);
        for round in 0..3 {
            // As `sm reset` does, with the pages that have memory.
            let written = sm_snapshot::pagemap::private(&machine.memory.guest).unwrap();
            machine.memory.revert_pages(&written).unwrap();
            for page in 1..STORED {
                assert_eq!(machine.read(page), page, "{way:?} {round}");
            }
            machine.write(8, 99);
            machine.discard(8, 1);
            assert_eq!(machine.read(8), 0, "{way:?} {round}");
        }
    }
}

/// Pages are returned while the pager fills them and others use their neighbours.
#[test]
fn pages_that_are_returned_while_they_are_filled_stay_zero() {
    let (_dir, store) = store();
    let chain = base(&store);
    let Some(machine) = restore(&chain, Way::Filled) else {
        return;
    };
    for round in 0..20 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for page in (16..STORED).filter(|page| page % 2 == 1) {
                    assert_eq!(machine.read(page), page);
                }
            });
            for page in (16..STORED).filter(|page| page % 2 == 0) {
                machine.write(page, 1 << 40);
                assert_eq!(machine.discard(page, 1), 1);
            }
        });
        for page in (16..STORED).filter(|page| page % 2 == 0) {
            assert_eq!(machine.read(page), 0, "{round}");
        }
        machine.memory.revert().unwrap();
    }
}
