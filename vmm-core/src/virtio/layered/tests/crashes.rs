//! Power cuts under a real file system: ext4 of this host writes to a disk that is frozen and
//! merged meanwhile. At any moment, what is on the files is an ext4 that its journal makes
//! sound, with all that was synced.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::fuse::{FuseFile, LoopMount, run};
use super::recorded::{Operation, Recorded};
use super::*;

const DISK: u64 = 16 << 20;
/// Layers above which some are merged.
const LAYERS: usize = 8;
/// Requests between two freezes.
const FREEZE: u64 = 60;
/// Blocks of the file that is written again and again.
const BLOCKS: u64 = 16;
const STEPS: u64 = 160;

/// A file with a layer, and the operations on it.
struct TracedLayer {
    operations: Arc<Mutex<Vec<Operation>>>,
    times: Arc<Mutex<Vec<usize>>>,
}

/// The layers of the disk from a moment on, the lowest one first, as places in
/// [`History::files`].
#[derive(Clone)]
struct Chain {
    from: usize,
    files: Vec<usize>,
    /// True if this is the result of a merge, whose rename may be lost.
    is_merge: bool,
}

/// All that happened to the files of layers.
#[derive(Default)]
struct History {
    clock: Arc<AtomicUsize>,
    files: Vec<TracedLayer>,
    chains: Vec<Chain>,
}

/// Since when a file of the guest is synced, and the beginning of its removal.
struct Synced {
    from: usize,
    until: usize,
}

/// A value of a block in the file that is written again and again.
struct Value {
    byte: u8,
    from: usize,
    synced: Option<usize>,
}

/// The contents that the guest may expect after a power cut.
#[derive(Default)]
struct Expected {
    files: BTreeMap<u64, Synced>,
    /// By block, the oldest first.
    blocks: BTreeMap<u64, Vec<Value>>,
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// The bytes of a file of the guest.
fn content(seed: u64) -> Vec<u8> {
    let len = 1 + (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 47);
    (0..len)
        .map(|at| (seed.wrapping_mul(31) + at / 7) as u8)
        .collect()
}

impl History {
    fn now(&self) -> usize {
        self.clock.load(Ordering::Relaxed)
    }

    /// A file whose operations are recorded.
    fn file(&mut self) -> Box<Recorded> {
        let mut file = Recorded::default();
        file.clock = Arc::clone(&self.clock);
        self.files.push(TracedLayer {
            operations: Arc::clone(&file.operations),
            times: Arc::clone(&file.times),
        });
        Box::new(file)
    }

    fn last(&self) -> Vec<usize> {
        let last = self.chains.last();
        last.map_or_else(Vec::new, |chain| chain.files.clone())
    }

    /// A disk with an empty ext4 in its lowest layer, and a top.
    fn disk(&mut self, directory: &Path) -> Arc<LayeredDisk> {
        let image = directory.join("template");
        File::create(&image).unwrap().set_len(DISK).unwrap();
        let mut format = Command::new("mkfs.ext4");
        format.args(["-q", "-F", "-b", "4096", "-J", "size=4"]);
        format.args(["-E", "lazy_itable_init=0,lazy_journal_init=0"]);
        run(format.arg(&image));
        let base = DiskLayer::create_on(self.file(), id(1), id(0), DISK).unwrap();
        let mut base = Arc::new(LayeredDisk::new(vec![base]).unwrap());
        let bytes = std::fs::read(&image).unwrap();
        for (at, cluster) in (0..).step_by(CLUSTER as usize).zip(bytes.chunks(4096)) {
            if cluster.iter().any(|byte| *byte != 0) {
                base.store(cluster, at).unwrap();
            }
        }
        base.flush().unwrap();
        self.chains.push(Chain {
            from: 0,
            files: vec![0],
            is_merge: false,
        });
        self.freeze(&mut base);
        base
    }

    /// Adds a layer, between two requests.
    fn freeze(&mut self, disk: &mut Arc<LayeredDisk>) {
        let (from, mut files) = (self.now(), self.last());
        files.push(self.files.len());
        let number = id(2 + self.chains.len() as u8);
        *disk = Arc::new(disk.freeze_on(self.file(), number, DISK).unwrap());
        self.chains.push(Chain {
            from,
            files,
            is_merge: false,
        });
    }

    /// The chain that a start after `cut` may find.
    fn chain(&self, cut: usize, random: &mut Random) -> &Chain {
        let known = self.chains.partition_point(|chain| chain.from <= cut);
        let chain = &self.chains[known - 1];
        match chain.is_merge && random.below(2) == 0 {
            true => &self.chains[known - 2],
            false => chain,
        }
    }

    /// The disk after a power cut before the operation `cut`: what was synced is there, of the
    /// rest some sectors.
    fn after(&self, cut: usize, random: &mut Random) -> LayeredDisk {
        let mut layers = Vec::new();
        for &file in &self.chain(cut, random).files {
            let file = &self.files[file];
            let times = file.times.lock().unwrap();
            let operations = file.operations.lock().unwrap();
            let operations = &operations[..times.partition_point(|time| *time < cut)];
            let synced = operations
                .iter()
                .rposition(|operation| matches!(operation, Operation::Sync));
            let (synced, rest) = operations.split_at(synced.unwrap_or(0));
            let mut bytes = vec![0; (DISK + (2 << 20)) as usize];
            for operation in synced {
                operation.apply(&mut bytes);
            }
            for sector in rest.iter().flat_map(Operation::sectors) {
                if random.below(2) == 0 {
                    sector.apply(&mut bytes);
                }
            }
            // A layer without its header was never flushed, nor was one above it.
            if bytes[..SECTOR as usize].iter().all(|byte| *byte == 0) {
                break;
            }
            layers.push(DiskLayer::open_on(Box::new(Recorded::holding(bytes))).unwrap());
        }
        LayeredDisk::new(layers).unwrap()
    }

    /// Moments at which the power is cut: half of them before a sync, when most may be lost.
    fn cuts(&self, begun: usize, count: usize, random: &mut Random) -> Vec<usize> {
        let mut syncs = Vec::new();
        for file in &self.files {
            let operations = file.operations.lock().unwrap();
            let times = file.times.lock().unwrap();
            let of = operations.iter().zip(times.iter());
            let of = of.filter(|(operation, time)| {
                matches!(operation, Operation::Sync) && **time >= begun
            });
            syncs.extend(of.map(|(_, time)| *time));
        }
        let anywhere = (self.now() - begun) as u64;
        let cuts = (0..count).map(|number| match number % 2 {
            0 => begun + random.below(anywhere) as usize,
            _ => syncs[random.below(syncs.len() as u64) as usize],
        });
        cuts.collect()
    }
}

/// Merges the layers above the lowest two, while requests go on.
fn merge(history: &Mutex<History>, shared: &Mutex<Arc<LayeredDisk>>) {
    let before = Arc::clone(&shared.lock().unwrap());
    let file = history.lock().unwrap().file();
    let number = history.lock().unwrap().files.len() - 1;
    let merged = before.merge_on(1..3, file, &AtomicBool::new(false));
    let mut disk = shared.lock().unwrap();
    *disk = Arc::new(disk.with_merged(merged.unwrap()).unwrap());
    let mut history = history.lock().unwrap();
    let (from, mut files) = (history.now(), history.last());
    files.splice(1..3, [number]);
    history.chains.push(Chain {
        from,
        files,
        is_merge: true,
    });
}

impl Expected {
    /// The guest's work on its file system.
    fn work(
        &mut self,
        root: &Path,
        clock: &AtomicUsize,
        random: &mut Random,
        mut after_step: impl FnMut(),
    ) {
        let now = || clock.load(Ordering::Relaxed);
        let directory = File::open(root).unwrap();
        let log = File::create(root.join("log")).unwrap();
        for step in 1..=STEPS {
            let path = root.join(step.to_string());
            let mut file = File::create(&path).unwrap();
            file.write_all(&content(step)).unwrap();
            if random.below(2) == 0 {
                file.sync_all().unwrap();
                directory.sync_all().unwrap();
                let (from, until) = (now(), usize::MAX);
                self.files.insert(step, Synced { from, until });
            }
            let byte = 1 + (step % 255) as u8;
            for _ in 0..3 {
                let block = random.below(BLOCKS);
                let (from, synced) = (now(), None);
                let value = Value { byte, from, synced };
                self.blocks.entry(block).or_default().push(value);
                log.write_all_at(&[byte; 4096], block * CLUSTER).unwrap();
            }
            if random.below(2) == 0 {
                log.sync_data().unwrap();
                for value in self.blocks.values_mut().flatten() {
                    value.synced.get_or_insert_with(now);
                }
            }
            let old = step.saturating_sub(8 + random.below(30));
            let old_path = root.join(old.to_string());
            if random.below(3) > 0 && old_path.exists() {
                if let Some(synced) = self.files.get_mut(&old) {
                    synced.until = now();
                }
                std::fs::remove_file(old_path).unwrap();
            }
            after_step();
        }
    }

    /// Checks the mounted file system of after `cut`; returns the number of files that have to
    /// be there.
    fn check(&self, root: &Path, cut: usize) -> usize {
        let mut found = 0;
        for (seed, synced) in &self.files {
            if synced.from <= cut && cut < synced.until {
                let bytes = std::fs::read(root.join(seed.to_string()));
                assert!(bytes.unwrap() == content(*seed), "file {seed}, cut {cut}");
                found += 1;
            }
        }
        let log = std::fs::read(root.join("log")).unwrap_or_default();
        for (block, values) in &self.blocks {
            let is_synced = |value: &Value| value.synced.is_some_and(|synced| synced <= cut);
            let Some(oldest) = values.iter().rposition(is_synced) else {
                continue;
            };
            let possible = values[oldest..].iter().filter(|value| value.from <= cut);
            let possible: Vec<_> = possible.map(|value| value.byte).collect();
            let bytes = &log[(block * CLUSTER) as usize..][..CLUSTER as usize];
            for sector in bytes.chunks(SECTOR as usize) {
                let byte = sector[0];
                assert!(
                    possible.contains(&byte) && sector.iter().all(|other| *other == byte),
                    "block {block}, cut {cut}: {byte}, not of {possible:?}"
                );
            }
        }
        found
    }
}

/// Writes the content of `disk` to a file of its own.
fn flatten(disk: &LayeredDisk, image: &Path) {
    let raw = File::create(image).unwrap();
    raw.set_len(DISK).unwrap();
    let memory = memory();
    for at in (0..DISK).step_by(MEMORY) {
        let bytes = read(disk, &memory, at, MEMORY);
        if bytes.iter().any(|byte| *byte != 0) {
            raw.write_all_at(&bytes, at).unwrap();
        }
    }
}

#[test]
fn a_file_system_survives_power_cuts_at_any_moment() {
    if !sm_test_needs::root() || !sm_test_needs::programs(&["mkfs.ext4", "e2fsck", "mount"]) {
        return;
    }
    let missing = ["/dev/fuse", "/dev/loop-control"];
    let missing = missing.iter().find(|device| !Path::new(device).exists());
    let missing = missing.map(|device| format!("it needs {device}"));
    if !sm_test_needs::met("loop", missing.as_deref()) {
        return;
    }
    let cuts = match std::env::var_os("SM_TEST_FULL") {
        Some(_) => 200,
        None => 24,
    };
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut history = History::default();
    let disk = Arc::new(Mutex::new(history.disk(directory)));
    let (clock, begun) = (Arc::clone(&history.clock), history.now());
    let history = Arc::new(Mutex::new(history));
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut expected = Expected::default();
    {
        let mut requests = 0;
        let of_freezes = Arc::clone(&history);
        let freeze = move |disk: &mut Arc<LayeredDisk>| {
            requests += 1;
            if requests % FREEZE == 0 {
                of_freezes.lock().unwrap().freeze(disk);
            }
        };
        let path = directory.join("disk");
        let _file = FuseFile::mount(Arc::clone(&disk), &path, freeze);
        let mounted = LoopMount::new(&path, &directory.join("root"), "discard");
        expected.work(&mounted.path, &clock, &mut random, || {
            if disk.lock().unwrap().layers() > LAYERS {
                merge(&history, &disk);
            }
        });
    }
    let history = history.lock().unwrap();
    let merges = history.chains.iter().filter(|chain| chain.is_merge);
    assert!(merges.count() >= 2);
    let (mut deep, mut found) = (0, 0);
    for cut in history.cuts(begun, cuts, &mut random) {
        let disk = history.after(cut, &mut random);
        deep += usize::from(disk.layers() >= LAYERS);
        let image = directory.join("image");
        flatten(&disk, &image);
        // The kernel replays the journal.
        let replayed = LoopMount::new(&image, &directory.join("replayed"), "noatime");
        found += expected.check(&replayed.path, cut);
        drop(replayed);
        run(Command::new("e2fsck").arg("-fn").arg(&image));
    }
    assert!(deep >= cuts / 4 && found >= cuts, "{deep}, {found}");
}
