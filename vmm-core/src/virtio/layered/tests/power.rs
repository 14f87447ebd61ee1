//! Power cuts at every operation on the file of the top layer.

use std::collections::HashMap;

use super::recorded::{Operation, Recorded};
use super::*;

/// The disk's sectors: each is known by its first byte, as all its bytes are equal.
type Sectors = Vec<u8>;

fn sectors(disk: &LayeredDisk, memory: &GuestMemory) -> Sectors {
    let bytes = read(disk, memory, 0, SMALL as usize);
    let sectors = bytes.chunks(SECTOR as usize);
    sectors
        .map(|sector| {
            let equal = sector.iter().all(|byte| byte == &sector[0]);
            assert!(equal, "a sector is torn");
            sector[0]
        })
        .collect()
}

const SMALL: u64 = 24 * CLUSTER;

/// The lowest layer, with some clusters, in the bytes of its file.
fn base(memory: &GuestMemory) -> Vec<u8> {
    let file = file();
    let layer = DiskLayer::create(file.try_clone().unwrap(), id(1), None, SMALL).unwrap();
    let disk = LayeredDisk::new(vec![layer]).unwrap();
    write(&disk, memory, &vec![1; 12 * CLUSTER as usize], 4 * CLUSTER);
    disk.flush().unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn open(bytes: Vec<u8>) -> DiskLayer {
    DiskLayer::open_on(Box::new(Recorded::holding(bytes))).unwrap()
}

/// A random number generator, so that a case is its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// The guest's view after a number of recorded operations: the values that each sector had
/// since the last flush that was complete then.
struct Moment {
    operations: usize,
    /// By sector: that at the flush first, then those of later writes.
    possible: Vec<Vec<u8>>,
}

/// Runs random accesses on `disk`; returns the moments after each of them.
fn run(
    disk: &LayeredDisk,
    memory: &GuestMemory,
    log: &Mutex<Vec<Operation>>,
    random: &mut Random,
) -> Vec<Moment> {
    let mut possible: Vec<Vec<u8>> = sectors(disk, memory).into_iter().map(|v| vec![v]).collect();
    let mut moments = Vec::new();
    for value in 2..60 {
        let at = random.below(SMALL / SECTOR);
        let len = (1 + random.below(30)).min(SMALL / SECTOR - at);
        let (offset, bytes) = (at * SECTOR, len * SECTOR);
        // From the first operation of an access on, its values are possible.
        let before = log.lock().unwrap().len();
        let mut set = |value: u8| {
            for sector in &mut possible[at as usize..(at + len) as usize] {
                sector.push(value);
            }
            moments.push(Moment {
                operations: before,
                possible: possible.clone(),
            });
        };
        match random.below(8) {
            0..=4 => {
                set(value);
                write(disk, memory, &vec![value; bytes as usize], offset);
            }
            5 => {
                set(0);
                disk.discard(offset, bytes).unwrap();
            }
            6 => {
                set(0);
                disk.write_zeroes(offset, bytes, false).unwrap();
            }
            _ => {
                disk.flush().unwrap();
                for values in &mut possible {
                    let last = values[values.len() - 1];
                    *values = vec![last];
                }
                moments.push(Moment {
                    operations: log.lock().unwrap().len(),
                    possible: possible.clone(),
                });
            }
        }
    }
    moments
}

#[test]
fn a_power_cut_loses_only_what_was_not_flushed() {
    let memory = memory();
    let base = base(&memory);
    let mut seen = HashMap::new();
    for seed in 1..=60u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let recorded = Recorded::default();
        let log = Arc::clone(&recorded.operations);
        let top = DiskLayer::create_on(Box::new(recorded), id(2), id(1), SMALL).unwrap();
        let len = top.storage.len().unwrap() as usize;
        let disk = LayeredDisk::new(vec![open(base.clone()), top]).unwrap();
        disk.flush().unwrap();
        let moments = run(&disk, &memory, &log, &mut random);
        let operations = log.lock().unwrap().clone();
        let first = operations
            .iter()
            .position(|op| matches!(op, Operation::Sync));
        for cut in first.unwrap() + 1..=operations.len() {
            // Durable up to the last sync; of the rest, some sectors.
            let mut synced = operations[..cut].iter();
            let synced = synced
                .rposition(|op| matches!(op, Operation::Sync))
                .unwrap();
            let mut bytes = vec![0; len];
            for operation in &operations[..synced] {
                operation.apply(&mut bytes);
            }
            for operation in &operations[synced..cut] {
                for sector in operation.sectors() {
                    if random.below(2) == 0 {
                        sector.apply(&mut bytes);
                    }
                }
            }
            let disk = LayeredDisk::new(vec![open(base.clone()), open(bytes)]).unwrap();
            let moment = moments.iter().take_while(|moment| moment.operations < cut);
            let Some(moment) = moment.last() else {
                continue;
            };
            let found = sectors(&disk, &memory);
            for (number, value) in (0..).zip(found.iter().copied()) {
                let possible: &Vec<u8> = &moment.possible[number];
                assert!(
                    possible.contains(&value),
                    "seed {seed}, cut {cut}: sector {number} is {value}, not of {possible:?}"
                );
                let kind = (value == possible[0], possible.len() > 1);
                *seen.entry(kind).or_insert(0u64) += 1;
            }
            // A write to a part of a cluster does not bring back what was lost.
            let written = random.below(8);
            for cluster in 0..SMALL / CLUSTER {
                let offset = cluster * CLUSTER + written * SECTOR;
                write(&disk, &memory, &[0xfd; SECTOR as usize], offset);
            }
            for (number, value) in (0..).zip(sectors(&disk, &memory)) {
                let expected = match number as u64 % 8 {
                    within if within == written => 0xfd,
                    _ => found[number],
                };
                assert_eq!(value, expected, "seed {seed}, cut {cut}: sector {number}");
            }
        }
    }
    // Some writes were lost and some were kept.
    assert!(
        seen[&(true, true)] > 1000 && seen[&(false, true)] > 1000,
        "{seen:?}"
    );
}
