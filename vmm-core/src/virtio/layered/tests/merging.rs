//! Merging of layers: beside requests, cancelled, and at power cuts.

use std::sync::atomic::Ordering;

use super::recorded::{Operation, Recorded};
use super::*;

/// A disk of `count` layers, of which each has its number in some clusters of its own and
/// in some that others have, too.
fn stack(count: u8, memory: &GuestMemory) -> LayeredDisk {
    let mut disk = single(CAPACITY);
    for number in 1..=count {
        if number > 1 {
            disk = disk.freeze(file(), id(number), CAPACITY).unwrap();
        }
        let at = u64::from(number) * 7 * CLUSTER;
        write(&disk, memory, &[number; 10 * 4096], at);
        disk.discard(at + 12 * CLUSTER, 3 * CLUSTER).unwrap();
    }
    disk
}

fn contents(disk: &LayeredDisk, memory: &GuestMemory) -> Vec<u8> {
    let parts = (0..CAPACITY).step_by(64 << 10);
    parts
        .flat_map(|at| read(disk, memory, at, (64 << 10).min((CAPACITY - at) as usize)))
        .collect()
}

static NEVER: AtomicBool = AtomicBool::new(false);

#[test]
fn merged_layers_have_the_same_content() {
    let memory = memory();
    let disk = stack(8, &memory);
    let before = contents(&disk, &memory);
    for from in 0..6 {
        for end in from + 2..=7 {
            let merged = disk.merge(from..end, file(), &NEVER).unwrap();
            let fewer = disk.with_merged(merged).unwrap();
            assert_eq!(fewer.layers(), 8 - (end - from) + 1);
            assert!(contents(&fewer, &memory) == before, "{from}..{end}");
            let ids: Vec<u8> = fewer.ids().iter().map(|id| id[0]).collect();
            let expected = (1..=8u8).filter(|n| !(from + 1..end).contains(&usize::from(*n)));
            assert_eq!(ids, expected.collect::<Vec<_>>());
        }
    }
}

#[test]
fn holes_are_not_copied() {
    let memory = memory();
    let disk = single(100 << 30);
    write(&disk, &memory, &[1; 4096], 99 << 30);
    disk.discard(0, 16 << 20).unwrap();
    let disk = disk.freeze(file(), id(2), 100 << 30).unwrap();
    disk.discard(99 << 30, 16 << 20).unwrap();
    let disk = disk.freeze(file(), id(3), 100 << 30).unwrap();
    let new = file();
    let handle = new.try_clone().unwrap();
    disk.merge(0..2, handle, &NEVER).unwrap();
    assert!(new.metadata().unwrap().blocks() * 512 <= 128 << 10);
    assert!(disk.bytes_of_layers(0..2) <= (16 << 20) + 4096);
}

#[test]
fn other_layers_are_not_merged() {
    let memory = memory();
    let disk = stack(4, &memory);
    for layers in [0..0, 0..1, 2..4, 3..4, 0..4, 5..9] {
        let refused = disk.merge(layers.clone(), file(), &NEVER);
        assert!(matches!(refused, Err(LayerError::Count(_))), "{layers:?}");
    }
    // A disk that has been reset meanwhile.
    let merged = disk.merge(1..3, file(), &NEVER).unwrap();
    let reset = stack(2, &memory).freeze(file(), id(9), CAPACITY).unwrap();
    let refused = reset.with_merged(merged);
    assert!(matches!(refused, Err(LayerError::Order(_))), "{refused:?}");
    let used = file();
    used.set_len(1).unwrap();
    assert!(disk.merge(0..2, used, &NEVER).is_err());
}

#[test]
fn a_merge_can_be_cancelled() {
    let memory = memory();
    let disk = stack(3, &memory);
    let cancelled = AtomicBool::new(true);
    let error = disk.merge(0..2, file(), &cancelled).unwrap_err();
    assert!(matches!(error, LayerError::Cancelled));
    cancelled.store(false, Ordering::Relaxed);
    disk.merge(0..2, file(), &cancelled).unwrap();
}

/// The file takes its place only when the merge is complete, so all of it has to be durable
/// at that time.
#[test]
fn a_merged_layer_is_durable_when_it_is_complete() {
    let memory = memory();
    let disk = stack(6, &memory);
    let before = contents(&disk, &memory);
    let storage = Recorded::default();
    let log = Arc::clone(&storage.operations);
    disk.merge_on(1..5, Box::new(storage), &NEVER).unwrap();
    let log = log.lock().unwrap();
    assert!(matches!(log.last(), Some(Operation::Sync)));
    // Every operation before the last two syncs is that of data, not of the index.
    let syncs = log
        .iter()
        .filter(|operation| matches!(operation, Operation::Sync));
    assert_eq!(syncs.count(), 2, "of the data, and of the index");
    let mut bytes = vec![0; 4 << 20];
    log.iter().for_each(|operation| operation.apply(&mut bytes));
    let merged = DiskLayer::open_on(Box::new(Recorded::holding(bytes))).unwrap();
    let fewer = disk.with_merged(merged).unwrap();
    assert!(contents(&fewer, &memory) == before);
}

/// Requests that were taken before the switch and those after it write to the same clusters,
/// of which the top has none.
#[test]
fn writers_before_and_after_the_switch_lose_nothing() {
    for round in 1..=40u8 {
        let guest = memory();
        let base = single(CAPACITY);
        write(&base, &guest, &vec![0xaa; 64 << 10], 0);
        let middle = base.freeze(file(), id(2), CAPACITY).unwrap();
        write(&middle, &guest, &[0xbb; 4096], 0);
        let old = middle.freeze(file(), id(3), CAPACITY).unwrap();
        let merged = old.merge(0..2, file(), &NEVER).unwrap();
        let new = old.with_merged(merged).unwrap();
        let barrier = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let disk = if writer % 2 == 0 { &old } else { &new };
                let barrier = &barrier;
                scope.spawn(move || {
                    let memory = memory();
                    barrier.wait();
                    for cluster in 0..16 {
                        let at = cluster * CLUSTER + writer * SECTOR;
                        write(disk, &memory, &[round; SECTOR as usize], at);
                    }
                });
            }
        });
        for cluster in 0..16 {
            let found = read(&new, &guest, cluster * CLUSTER, CLUSTER as usize);
            let rest = if cluster == 0 { 0xbb } else { 0xaa };
            assert!(found[..2048].iter().all(|&byte| byte == round), "{cluster}");
            assert!(found[2048..].iter().all(|&byte| byte == rest), "{cluster}");
        }
        new.flush().unwrap();
    }
}
