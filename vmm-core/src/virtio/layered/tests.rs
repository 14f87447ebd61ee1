//! Layers against a model, under power cuts and under concurrent writers.

mod crashes;
mod flushing;
mod fuse;
mod merging;
mod power;
mod recorded;

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use sm_virtio::queue::Span;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;

/// Bytes of guest memory, and so of the largest access.
const MEMORY: usize = 1 << 20;
/// Not a multiple of a group.
const CAPACITY: u64 = 400 * CLUSTER;
const SECTOR: u64 = 512;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

fn span(len: usize) -> [Span; 1] {
    [Span {
        address: GuestAddress(0),
        len: u32::try_from(len).unwrap(),
    }]
}

fn write(disk: &LayeredDisk, memory: &GuestMemory, bytes: &[u8], offset: u64) {
    memory.write_slice(bytes, GuestAddress(0)).unwrap();
    let spans = span(bytes.len());
    disk.write(memory, Window::new(&spans, 0, u32::MAX), offset)
        .unwrap();
}

fn read(disk: &LayeredDisk, memory: &GuestMemory, offset: u64, len: usize) -> Vec<u8> {
    // Bytes that are not filled show.
    let mut bytes = vec![0xee; len];
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    let spans = span(len);
    disk.read(memory, Window::new(&spans, 0, u32::MAX), offset)
        .unwrap();
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn id(number: u8) -> LayerId {
    [number; 16]
}

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn single(capacity: u64) -> LayeredDisk {
    LayeredDisk::new(vec![
        DiskLayer::create(file(), id(1), None, capacity).unwrap(),
    ])
    .unwrap()
}

/// One access in units of sectors.
#[derive(Clone, Debug)]
enum Access {
    Write { at: u64, len: u64, value: u8 },
    Read { at: u64, len: u64 },
    Discard { at: u64, len: u64 },
    Zero { at: u64, len: u64, unmap: bool },
    Flush,
    Freeze,
    Merge { from: usize, count: usize },
    Reopen,
}

fn access(sectors: u64) -> impl Strategy<Value = Access> {
    // Often whole clusters, often across the borders of clusters and groups.
    let range = (
        0..sectors,
        prop_oneof![1..20u64, Just(8), 1..2000u64],
        any::<bool>(),
    );
    let range = range.prop_map(move |(at, len, whole)| {
        let at = if whole { at - at % 8 } else { at };
        (at, len.min(sectors - at))
    });
    prop_oneof![
        6 => (range.clone(), 1..=255u8).prop_map(|((at, len), value)| Access::Write { at, len, value }),
        3 => range.clone().prop_map(|(at, len)| Access::Read { at, len }),
        2 => range.clone().prop_map(|(at, len)| Access::Discard { at, len }),
        2 => (range, any::<bool>()).prop_map(|((at, len), unmap)| Access::Zero { at, len, unmap }),
        1 => Just(Access::Flush),
        1 => Just(Access::Freeze),
        1 => (0..6usize, 2..5usize).prop_map(|(from, count)| Access::Merge { from, count }),
        1 => Just(Access::Reopen),
    ]
}

/// A pattern that differs from sector to sector.
fn pattern(at: u64, len: u64, value: u8) -> Vec<u8> {
    let sector = |n: u64| [value.wrapping_add((n % 7) as u8).max(1); SECTOR as usize];
    (at..at + len).flat_map(sector).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_of_layers_is_a_disk(accesses in prop::collection::vec(access(CAPACITY / SECTOR), 1..60)) {
        let memory = memory();
        let mut model = vec![0; CAPACITY as usize];
        let mut files = vec![file()];
        let mut top = 1;
        let layer = DiskLayer::create(files[0].try_clone().unwrap(), id(top), None, CAPACITY).unwrap();
        let mut disk = LayeredDisk::new(vec![layer]).unwrap();
        let bytes = |at: u64, len: u64| (at * SECTOR) as usize..((at + len) * SECTOR) as usize;
        for access in accesses {
            match access {
                Access::Write { at, len, value } => {
                    let data = pattern(at, len, value);
                    write(&disk, &memory, &data, at * SECTOR);
                    model[bytes(at, len)].copy_from_slice(&data);
                }
                Access::Read { at, len } => {
                    let len_bytes = (len * SECTOR) as usize;
                    prop_assert!(read(&disk, &memory, at * SECTOR, len_bytes) == model[bytes(at, len)]);
                }
                Access::Discard { at, len } => {
                    disk.discard(at * SECTOR, len * SECTOR).unwrap();
                    model[bytes(at, len)].fill(0);
                }
                Access::Zero { at, len, unmap } => {
                    disk.write_zeroes(at * SECTOR, len * SECTOR, unmap).unwrap();
                    model[bytes(at, len)].fill(0);
                }
                Access::Flush => disk.flush().unwrap(),
                Access::Freeze if files.len() < 9 => {
                    let new = file();
                    let handle = new.try_clone().unwrap();
                    disk = disk.freeze(handle, id(top + 1), CAPACITY).unwrap();
                    files.push(new);
                    top += 1;
                }
                Access::Freeze => {}
                Access::Merge { from, count } if from + count < files.len() => {
                    let new = file();
                    let handle = new.try_clone().unwrap();
                    let never = AtomicBool::new(false);
                    let merged = disk.merge(from..from + count, handle, &never).unwrap();
                    disk = disk.with_merged(merged).unwrap();
                    files.splice(from..from + count, [new]);
                }
                Access::Merge { .. } => {}
                Access::Reopen => {
                    disk.flush().unwrap();
                    let open = |file: &File| DiskLayer::open(file.try_clone().unwrap()).unwrap();
                    disk = LayeredDisk::new(files.iter().map(open).collect()).unwrap();
                }
            }
        }
        for at in (0..CAPACITY).step_by(MEMORY) {
            let len = MEMORY.min((CAPACITY - at) as usize);
            prop_assert!(read(&disk, &memory, at, len) == model[at as usize..][..len]);
        }
    }
}

/// Threads write the sectors of the same clusters, each its own, on a disk that has none of
/// the clusters and lies upon one that has them.
#[test]
fn writers_of_one_cluster_lose_nothing() {
    const ROUNDS: u8 = 40;
    for round in 1..=ROUNDS {
        let base = single(CAPACITY);
        let guest = memory();
        write(&base, &guest, &vec![0xaa; 64 << 10], 0);
        let disk = base.freeze(file(), id(2), CAPACITY).unwrap();
        let barrier = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let (disk, barrier) = (&disk, &barrier);
                scope.spawn(move || {
                    let memory = memory();
                    let bytes = [round; SECTOR as usize];
                    barrier.wait();
                    for cluster in 0..16 {
                        write(disk, &memory, &bytes, cluster * CLUSTER + writer * SECTOR);
                    }
                });
            }
        });
        for cluster in 0..16 {
            let found = read(&disk, &guest, cluster * CLUSTER, CLUSTER as usize);
            assert!(found[..2048].iter().all(|&byte| byte == round), "{cluster}");
            assert!(found[2048..].iter().all(|&byte| byte == 0xaa), "{cluster}");
        }
    }
}

#[test]
fn a_new_disk_takes_no_space_and_no_memory() {
    let file = file();
    let layer = DiskLayer::create(file.try_clone().unwrap(), id(1), None, 100 << 30).unwrap();
    assert_eq!(layer.index.leaves(), 0);
    assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    let disk = LayeredDisk::new(vec![layer]).unwrap();
    let memory = memory();
    write(&disk, &memory, &[1; 4096], 99 << 30);
    disk.flush().unwrap();
    let layer = DiskLayer::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(layer.index.leaves(), 1);
    assert!(file.metadata().unwrap().blocks() * 512 <= 128 << 10);
}

#[test]
fn discarded_space_is_returned() {
    let file = file();
    let layer = DiskLayer::create(file.try_clone().unwrap(), id(1), None, CAPACITY).unwrap();
    let disk = LayeredDisk::new(vec![layer]).unwrap();
    let before = file.metadata().unwrap().blocks();
    write(&disk, &memory(), &vec![1; MEMORY], 0);
    disk.flush().unwrap();
    assert!((file.metadata().unwrap().blocks() - before) * 512 >= MEMORY as u64);
    disk.discard(0, MEMORY as u64).unwrap();
    disk.flush().unwrap();
    // The index, and blocks of the file system itself.
    assert!((file.metadata().unwrap().blocks() - before) * 512 <= 64 << 10);
}

#[test]
fn a_frozen_layer_does_not_change() {
    let below = file();
    let layer = DiskLayer::create(below.try_clone().unwrap(), id(1), None, CAPACITY).unwrap();
    let disk = LayeredDisk::new(vec![layer]).unwrap();
    let memory = memory();
    write(&disk, &memory, &[1; 8192], 0);
    let disk = disk.freeze(file(), id(2), CAPACITY + CLUSTER).unwrap();
    let contents = || {
        let mut bytes = vec![0; below.metadata().unwrap().len() as usize];
        below.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let unflushed = contents();
    disk.flush().unwrap();
    let before = contents();
    assert!(
        unflushed != before,
        "the index of the frozen layer is not durable"
    );
    write(&disk, &memory, &[2; 4096], 2048);
    disk.discard(0, CLUSTER).unwrap();
    disk.write_zeroes(100 * CLUSTER, 100 * CLUSTER, false)
        .unwrap();
    // The lower layer ends before.
    assert_eq!(read(&disk, &memory, CAPACITY, 4096), [0; 4096]);
    write(&disk, &memory, &[3; 512], CAPACITY);
    disk.flush().unwrap();
    assert!(contents() == before);
    assert_eq!(disk.capacity(), CAPACITY + CLUSTER);
}

#[test]
fn accesses_past_the_end_are_refused() {
    let disk = single(CAPACITY);
    let memory = memory();
    let spans = span(1024);
    let window = Window::new(&spans, 0, u32::MAX);
    for offset in [CAPACITY - 512, CAPACITY, u64::MAX - 100, u64::MAX] {
        assert!(disk.read(&memory, window, offset).is_err());
        assert!(disk.read_cached(&memory, window, offset).is_err());
        assert!(disk.write(&memory, window, offset).is_err());
        assert!(disk.discard(offset, 1024).is_err());
        assert!(disk.write_zeroes(offset, 1024, true).is_err());
    }
    assert_eq!(disk.top.index.leaves(), 0);
}

#[test]
fn unsuitable_files_are_refused() {
    for capacity in [0, 1, CLUSTER + 512, MAX_CAPACITY + CLUSTER, u64::MAX] {
        let refused = DiskLayer::create(file(), id(1), None, capacity);
        assert!(
            matches!(refused, Err(LayerError::Capacity(_))),
            "{capacity}"
        );
    }
    let used = file();
    used.write_all_at(b"x", 0).unwrap();
    let refused = DiskLayer::create(used.try_clone().unwrap(), id(1), None, CAPACITY);
    assert!(matches!(refused, Err(LayerError::NotEmpty(1))));
    assert!(matches!(DiskLayer::open(used), Err(LayerError::Format(_))));
    assert!(DiskLayer::create(file(), id(0), None, CAPACITY).is_err());

    let damaged = |at: u64, bytes: &[u8]| {
        let file = file();
        DiskLayer::create(file.try_clone().unwrap(), id(1), None, CAPACITY).unwrap();
        file.write_all_at(bytes, at).unwrap();
        DiskLayer::open(file)
    };
    assert!(damaged(100, b"").is_ok());
    assert!(matches!(damaged(0, b"X"), Err(LayerError::Format(_))));
    assert!(matches!(damaged(8, &[3]), Err(LayerError::Version(3))));
    assert!(matches!(damaged(12, &[1]), Err(LayerError::Format(_))));
    assert!(matches!(damaged(16, &[1]), Err(LayerError::Capacity(_))));
    assert!(matches!(
        damaged(16, &[0xff; 8]),
        Err(LayerError::Capacity(_))
    ));
    assert!(
        matches!(damaged(21, &[1]), Err(LayerError::Format(_))),
        "larger"
    );
    assert!(matches!(damaged(24, &[0; 16]), Err(LayerError::Format(_))));
    let short = file();
    DiskLayer::create(short.try_clone().unwrap(), id(1), None, CAPACITY).unwrap();
    short.set_len(CAPACITY).unwrap();
    assert!(matches!(DiskLayer::open(short), Err(LayerError::Format(_))));
}

/// In which the clusters follow the index at once.
#[test]
fn a_layer_of_version_1_is_read_and_written() {
    let memory = memory();
    let disk = single(CAPACITY);
    write(&disk, &memory, &[7; 4096], 5 * CLUSTER);
    disk.flush().unwrap();
    // A header, a leaf, and the clusters.
    let old = file();
    old.set_len(2 * CLUSTER + CAPACITY).unwrap();
    let mut head = [0; 2 * CLUSTER as usize];
    disk.top.storage.load(&mut head, 0).unwrap();
    head[8] = 1;
    old.write_all_at(&head, 0).unwrap();
    old.write_all_at(&[7; 4096], 7 * CLUSTER).unwrap();
    for value in [7, 9] {
        let layer = DiskLayer::open(old.try_clone().unwrap()).unwrap();
        let disk = LayeredDisk::new(vec![layer]).unwrap();
        assert_eq!(read(&disk, &memory, 5 * CLUSTER, 4096), [value; 4096]);
        write(&disk, &memory, &[9; 4096], 5 * CLUSTER);
    }
    old.set_len(2 * CLUSTER + CAPACITY - 1).unwrap();
    assert!(matches!(DiskLayer::open(old), Err(LayerError::Format(_))));
}

#[test]
fn a_layer_is_verified() {
    let memory = memory();
    let disk = single(CAPACITY);
    write(&disk, &memory, &[7; 8192], 5 * CLUSTER);
    write(&disk, &memory, &[7; 4096], CAPACITY - CLUSTER);
    disk.discard(6 * CLUSTER, CLUSTER).unwrap();
    assert_eq!(disk.top.verify().unwrap(), 2 * CLUSTER);
    disk.flush().unwrap();
    let recorded = |bytes: Vec<u8>| {
        let layer = DiskLayer::open_on(Box::new(recorded::Recorded::holding(bytes)));
        layer.unwrap().verify()
    };
    let mut bytes = vec![0; disk.top.storage.len().unwrap() as usize];
    disk.top.storage.load(&mut bytes, 0).unwrap();
    assert!(recorded(bytes.clone()).is_ok());
    // The bit of the first cluster past the end, in the first leaf.
    let (byte, bit) = ((CAPACITY / CLUSTER / 8) as usize, CAPACITY / CLUSTER % 8);
    bytes[CLUSTER as usize + byte] |= 1 << bit;
    assert!(matches!(recorded(bytes), Err(LayerError::Format(_))));
}

#[test]
fn layers_of_other_disks_are_refused() {
    let layer = |own: u8, below: Option<u8>, capacity| {
        DiskLayer::create(file(), id(own), below.map(id), capacity).unwrap()
    };
    let refused = |layers| LayeredDisk::new(layers).unwrap_err();
    assert!(matches!(refused(vec![]), LayerError::Count(0)));
    assert!(matches!(
        refused(vec![layer(2, Some(1), CAPACITY)]),
        LayerError::Order(1)
    ));
    assert!(matches!(
        refused(vec![layer(1, None, CAPACITY), layer(3, Some(2), CAPACITY)]),
        LayerError::Order(2)
    ));
    assert!(matches!(
        refused(vec![layer(1, None, CAPACITY), layer(2, Some(1), CLUSTER)]),
        LayerError::Order(2)
    ));
    let many = (1..=65).map(|n| layer(n, (n > 1).then(|| n - 1), CAPACITY));
    assert!(matches!(refused(many.collect()), LayerError::Count(65)));
    let disk = single(CAPACITY);
    assert!(disk.freeze(file(), id(9), CAPACITY - CLUSTER).is_err());
    assert_eq!(disk.layers(), 1);
}

#[test]
fn threads_that_lock_several_groups_do_not_wait_for_each_other() {
    let disk = single(100 << 20);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..200 {
                    // Ranges that wrap around the list of locks in different ways.
                    let start = (thread * 17 + round * 5) % 60;
                    disk.discard(start << 20, (1 + round % 40) << 20).unwrap();
                }
            });
        }
    });
}
