//! Tests of discarding, on memory of each kind of initial contents.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::*;
use crate::layout::{HOLE_END, HOLE_START};
use crate::memory::{MIN_MEMORY, MemoryConfig};

const PAGES: u64 = 32;

fn numbered() -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    for page in 1..=PAGES {
        file.write_all(&[u8::try_from(page).unwrap(); 4096])
            .unwrap();
    }
    Arc::new(file)
}

/// Memory whose pages 8 to 39 are from a file with the numbers 1 to 32.
fn mapped() -> MachineMemory {
    let extent = FileExtent {
        offset: 8 * PAGE_SIZE,
        len: PAGES * PAGE_SIZE,
        file: numbered(),
        file_offset: 0,
    };
    MachineMemory::from_files(&MemoryConfig::new(MIN_MEMORY), &[extent]).unwrap()
}

fn write(memory: &MachineMemory, page: u64, value: u8) {
    let at = GuestAddress(page * PAGE_SIZE + 7);
    memory.guest.write_obj(value, at).unwrap();
}

fn read(memory: &MachineMemory, page: u64) -> u8 {
    let at = GuestAddress(page * PAGE_SIZE + 7);
    memory.guest.read_obj(at).unwrap()
}

fn discard(memory: &MachineMemory, first: u64, pages: u64) -> u64 {
    let pagemap = Pagemap::open().unwrap();
    let returned = memory.discard(&pagemap, first * PAGE_SIZE, pages * PAGE_SIZE);
    returned.unwrap() / PAGE_SIZE
}

fn private(memory: &MachineMemory) -> Vec<u64> {
    let host = memory.guest.get_host_address(GuestAddress(0)).unwrap();
    let mut private = Vec::new();
    Pagemap::open()
        .unwrap()
        .private_runs(host as u64, 64, |(first, count)| {
            private.extend(first..first + count);
        })
        .unwrap();
    private
}

#[test]
fn anonymous_pages_lose_their_memory_and_read_as_zero() {
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    for page in [1, 2, 5] {
        write(&memory, page, 9);
    }
    assert_eq!(discard(&memory, 2, 4), 2);
    assert_eq!(private(&memory), [1]);
    assert_eq!(
        (read(&memory, 1), read(&memory, 2), read(&memory, 5)),
        (9, 0, 0)
    );
    assert!(
        memory.discarded().runs().is_empty(),
        "they were zero at first"
    );
}

/// The trap: dropping a page of a private mapping brings back that of the file.
#[test]
fn pages_of_a_file_read_as_zero_and_not_as_the_file() {
    let memory = mapped();
    for page in [4, 10, 12] {
        write(&memory, page, 99);
    }
    assert_eq!(discard(&memory, 0, 32), 3);
    assert!(private(&memory).is_empty());
    assert_eq!(
        (read(&memory, 4), read(&memory, 10), read(&memory, 12)),
        (0, 0, 0)
    );
    assert_eq!(read(&memory, 9), 2, "the machine has not changed it");
    assert_eq!(read(&memory, 13), 6);
    // One mapping for all between the first and the last changed page of the file.
    assert_eq!(memory.discarded().runs(), [(10, 3)]);
    assert_eq!(read(&memory, 11), 0);

    // They are pages like others again.
    write(&memory, 10, 7);
    assert_eq!((read(&memory, 10), private(&memory)), (7, vec![10]));
    assert_eq!(discard(&memory, 10, 1), 1);
    assert_eq!(read(&memory, 10), 0);
    assert_eq!(memory.discarded().inserted, 1, "no further mapping");
}

#[test]
fn unchanged_pages_are_left_alone() {
    let memory = mapped();
    assert_eq!(discard(&memory, 0, 64), 0);
    assert_eq!(read(&memory, 20), 13);
    assert!(memory.discarded().runs().is_empty());
}

#[test]
fn a_revert_brings_back_the_initial_contents() {
    let memory = mapped();
    for page in [9, 20, 39, 41] {
        write(&memory, page, 99);
        assert_eq!(discard(&memory, page, 1), 1);
    }
    write(&memory, 20, 5);
    write(&memory, 30, 5);
    memory.revert_pages(&[(30, 1)]).unwrap();
    for page in 8..40 {
        assert_eq!(u64::from(read(&memory, page)), page - 7);
    }
    assert_eq!(read(&memory, 41), 0);
    assert_eq!(*memory.discarded(), DiscardedPages::default());
    assert!(private(&memory).is_empty());

    write(&memory, 9, 99);
    discard(&memory, 9, 1);
    memory.revert().unwrap();
    assert_eq!(read(&memory, 9), 2);
}

#[test]
fn later_extents_win_after_a_revert_too() {
    let file = numbered();
    let extent = |offset, len, file_offset| FileExtent {
        offset: offset * PAGE_SIZE,
        len: len * PAGE_SIZE,
        file: Arc::clone(&file),
        file_offset: file_offset * PAGE_SIZE,
    };
    let extents = [extent(0, 16, 0), extent(4, 4, 20), extent(16, 4, 28)];
    let memory = MachineMemory::from_files(&MemoryConfig::new(MIN_MEMORY), &extents).unwrap();
    let before: Vec<u8> = (0..20).map(|page| read(&memory, page)).collect();
    for page in 0..20 {
        write(&memory, page, 0xff);
    }
    assert_eq!(discard(&memory, 2, 16), 16);
    memory.revert_pages(&[(0, 20)]).unwrap();
    let after: Vec<u8> = (0..20).map(|page| read(&memory, page)).collect();
    assert_eq!(after, before);
}

#[test]
fn a_guest_cannot_use_up_the_mappings_of_the_process() {
    let mut memory = mapped();
    Arc::get_mut(&mut memory.discards).unwrap().limit = 3;
    // Pages that are not adjacent, and then those between them.
    for page in [8, 10, 12, 14, 9, 11, 13] {
        write(&memory, page, 99);
        discard(&memory, page, 1);
    }
    assert_eq!(memory.discarded().runs(), [(8, 1), (10, 1), (12, 1)]);
    assert_eq!((read(&memory, 12), read(&memory, 14)), (0, 99), "kept");
    // Pages that were discarded before need no further mapping.
    write(&memory, 8, 99);
    assert_eq!(discard(&memory, 8, 1), 1);
    assert_eq!(read(&memory, 8), 0);
    memory.revert().unwrap();
    write(&memory, 14, 99);
    assert_eq!(discard(&memory, 14, 1), 1, "a reset starts anew");
}

#[test]
fn ranges_outside_memory_and_parts_of_pages_are_left_alone() {
    let memory = mapped();
    let pagemap = Pagemap::open().unwrap();
    write(&memory, 0, 9);
    write(&memory, 1, 9);
    let last = MIN_MEMORY / PAGE_SIZE - 1;
    write(&memory, last, 9);
    for (address, len) in [
        (0, 0),
        (0, 4095),
        (1, 4095),
        (1, 8190),
        (MIN_MEMORY, u64::MAX),
        (u64::MAX, u64::MAX),
        (u64::MAX - 4095, 4096),
        (MIN_MEMORY - 1, 4096),
    ] {
        assert_eq!(
            memory.discard(&pagemap, address, len).unwrap(),
            0,
            "{address} {len}"
        );
    }
    assert_eq!((read(&memory, 0), read(&memory, 1)), (9, 9));
    assert_eq!(
        memory.discard(&pagemap, 4096, u64::MAX).unwrap(),
        2 * PAGE_SIZE
    );
    assert_eq!(
        (read(&memory, 0), read(&memory, 1), read(&memory, last)),
        (9, 0, 0)
    );
}

#[test]
fn a_range_around_the_hole_is_discarded_on_both_sides() {
    let extent = FileExtent {
        offset: HOLE_START - PAGE_SIZE,
        len: 2 * PAGE_SIZE,
        file: numbered(),
        file_offset: 0,
    };
    let memory = MachineMemory::from_files(&MemoryConfig::new(4 << 30), &[extent]).unwrap();
    let pagemap = Pagemap::open().unwrap();
    let ends = [HOLE_START - 1, HOLE_END].map(GuestAddress);
    for end in ends {
        memory.guest.write_obj(99u8, end).unwrap();
    }
    let len = HOLE_END - HOLE_START + 2 * PAGE_SIZE;
    let returned = memory.discard(&pagemap, HOLE_START - PAGE_SIZE, len);
    assert_eq!(returned.unwrap(), 2 * PAGE_SIZE);
    assert_eq!(memory.discarded().runs(), [(HOLE_START / PAGE_SIZE - 1, 2)]);
    for end in ends {
        assert_eq!(memory.guest.read_obj::<u8>(end).unwrap(), 0);
    }
    memory.revert().unwrap();
    let [low, high] = ends.map(|end| memory.guest.read_obj::<u8>(end).unwrap());
    assert_eq!((low, high), (1, 2));
}

proptest! {
    #[test]
    fn runs_are_a_set_of_pages(
        ranges in prop::collection::vec((0u64..40, 1u64..8), 0..20),
        from in 0u64..48,
        most in 1u64..48,
    ) {
        let mut pages = DiscardedPages::default();
        let mut set = [false; 64];
        for (first, count) in ranges {
            pages.insert(first..first + count);
            for page in first..first + count {
                set[usize::try_from(page).unwrap()] = true;
            }
        }
        let is_in = |page: u64| set.get(usize::try_from(page).unwrap()).copied().unwrap_or(false);
        let runs = pages.runs();
        prop_assert!(runs.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0));
        let listed: Vec<u64> = runs.iter().flat_map(|(first, n)| *first..first + n).collect();
        prop_assert_eq!(&listed, &(0..64).filter(|page| is_in(*page)).collect::<Vec<_>>());
        let (discarded, count) = pages.run(from, most);
        prop_assert!((1..=most).contains(&count));
        prop_assert!((from..from + count).all(|page| is_in(page) == discarded));
        prop_assert!(count == most || is_in(from + count) != discarded);
        let missing: Vec<u64> = pages.missing(from..from + most).into_iter().flatten().collect();
        let expected: Vec<u64> = (from..from + most).filter(|page| !is_in(*page)).collect();
        prop_assert_eq!(missing, expected);
    }

    /// Any order of writing, discarding and reverting: contents are those of a model.
    #[test]
    fn contents_are_those_of_a_model(
        steps in prop::collection::vec((0u8..8, 0u64..48, 1u64..12), 1..60),
    ) {
        let memory = mapped();
        let initial: Vec<u8> = (0..64).map(|page| read(&memory, page)).collect();
        let mut model = initial.clone();
        let mut changed = [false; 64];
        for (step, first, count) in steps {
            match step {
                0 => {
                    memory.revert().unwrap();
                    model.clone_from(&initial);
                    changed.fill(false);
                }
                1..=3 => {
                    for page in first..first + count {
                        write(&memory, page, 0xee);
                        model[usize::try_from(page).unwrap()] = 0xee;
                        changed[usize::try_from(page).unwrap()] = true;
                    }
                }
                _ => {
                    discard(&memory, first, count);
                    for page in first..first + count {
                        // An unchanged page may become zero, or stay as it is.
                        let index = usize::try_from(page).unwrap();
                        let now = read(&memory, page);
                        prop_assert!(now == 0 || !changed[index] && now == model[index]);
                        model[index] = now;
                        changed[index] = false;
                    }
                }
            }
            for page in 0..64 {
                prop_assert_eq!(read(&memory, page), model[usize::try_from(page).unwrap()]);
            }
        }
    }
}
