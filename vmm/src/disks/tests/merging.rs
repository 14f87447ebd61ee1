//! Merged layers in their directory: at each step of a merge, and after many snapshots.

use std::sync::atomic::AtomicBool;

use super::super::merging::{self, MOST};
use super::*;

/// Bytes of the disk that the tests write to.
const LEN: usize = 4 << 20;

/// A disk whose content is known.
struct Known {
    fixture: Fixture,
    directory: DiskDirectory,
    disk: LayeredDisk,
    content: Vec<u8>,
    random: u64,
}

impl Known {
    fn new() -> Self {
        let fixture = Fixture::new();
        let (directory, disk) = fixture.disk("vm");
        let content = read(&disk, 0, LEN);
        Self {
            fixture,
            directory,
            disk,
            content,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        // xorshift64.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % limit as u64).unwrap()
    }

    /// Writes something, and discards something else.
    fn change(&mut self) {
        for _ in 0..3 {
            let (at, len) = (self.below(LEN - 40_000), 1 + self.below(40_000));
            let byte = u8::try_from(self.below(255) + 1).unwrap();
            self.disk.store(&vec![byte; len], at as u64).unwrap();
            self.content[at..at + len].fill(byte);
        }
        let (at, len) = (self.below(LEN - 40_000), 1 + self.below(40_000));
        self.disk.discard(at as u64, len as u64).unwrap();
        self.content[at..at + len].fill(0);
    }

    /// Adds a layer, as a snapshot does; returns the files of the snapshot.
    fn freeze(&mut self) -> Vec<PathBuf> {
        let files = self.directory.layers_of(&self.disk).unwrap();
        self.disk = self.directory.grow(&self.disk).unwrap();
        files
    }

    fn check(&self) {
        assert!(read(&self.disk, 0, LEN) == self.content);
    }

    /// Opens the disk as after the end of the process.
    fn reopen(&mut self) {
        self.disk.flush().unwrap();
        self.disk = self.directory.open().unwrap();
        self.check();
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }
}

static NEVER: AtomicBool = AtomicBool::new(false);

#[test]
fn every_step_of_a_merge_leaves_the_disk_as_it_is() {
    // The number of files that were removed when the process was killed.
    for removed in 0..3 {
        let mut known = Known::new();
        for _ in 0..5 {
            known.change();
            known.freeze();
        }
        known.change();
        assert_eq!(known.names(), ["0", "1", "2", "3", "4", "5", "6"]);
        // While the layer is written.
        let partial = known.directory.path().join("merging");
        fs::write(&partial, [1; 5000]).unwrap();
        known.reopen();
        assert!(!partial.exists());
        // When it is complete.
        let write = |known: &Known| {
            let written = known.directory.write_merged(&known.disk, 2..5, &NEVER);
            written.unwrap()
        };
        write(&known);
        known.reopen();
        assert_eq!(known.disk.layers(), 7);
        // When it has its name.
        let merged = write(&known);
        let fewer = known.directory.adopt_merged(&known.disk, merged).unwrap();
        assert_eq!(known.names(), ["0", "1", "2", "3", "4", "5", "6"]);
        for number in ["2", "3"].iter().take(removed) {
            fs::remove_file(known.directory.path().join(number)).unwrap();
        }
        // Writes of both, as requests are in flight during the switch.
        known.change();
        known.disk = fewer;
        known.change();
        assert_eq!(known.directory.layers().unwrap().len(), 5);
        known.reopen();
        assert_eq!(known.names(), ["0", "1", "4", "5", "6"]);
        assert_eq!(known.disk.layers(), 5);
        known.change();
        known.freeze();
        known.change();
        known.reopen();
        assert_eq!(known.names(), ["0", "1", "4", "5", "6", "7"]);
    }
}

#[test]
fn snapshots_keep_the_layers_that_were_merged() {
    let mut known = Known::new();
    let mut snapshots = Vec::new();
    for number in 0..6 {
        known.change();
        let files = known.freeze();
        known.disk.flush().unwrap();
        let clone = known.fixture.record(&format!("snapshot-{number}"));
        clone.create(&files).unwrap();
        snapshots.push((clone, known.content.clone()));
    }
    let merged = known.directory.write_merged(&known.disk, 1..6, &NEVER);
    let merged = merged.unwrap();
    known.disk = known.directory.adopt_merged(&known.disk, merged).unwrap();
    known.directory.remove_merged(&known.disk).unwrap();
    assert_eq!(known.names(), ["0", "5", "6", "7"]);
    known.reopen();
    for (clone, content) in snapshots {
        assert!(read(&clone.open().unwrap(), 0, LEN) == content);
    }
}

/// Snapshots without end: the chain stays short, and its content is right all the time.
#[test]
fn a_chain_of_layers_stays_short() {
    let mut known = Known::new();
    let (mut longest, mut copied) = (0, 0);
    let border = known.disk.ids().pop();
    for _ in 0..150 {
        known.change();
        known.freeze();
        longest = longest.max(known.disk.layers());
        if let Some(layers) = merging::layers_to_merge(&known.disk, false, border) {
            copied += known.disk.bytes_of_layers(layers.clone());
            let merged = known.directory.write_merged(&known.disk, layers, &NEVER);
            // Requests go on, and there is another snapshot meanwhile.
            known.change();
            known.freeze();
            let merged = merged.unwrap();
            known.disk = known.directory.adopt_merged(&known.disk, merged).unwrap();
            known.directory.remove_merged(&known.disk).unwrap();
            known.check();
        }
        assert_eq!(known.names().len(), known.disk.layers());
    }
    assert!(longest <= 14, "{longest}");
    // About 80 KiB are new in each of some 190 layers, so this is 3 times what was written.
    assert!(copied <= 45 << 20, "{copied}");
    assert_eq!(
        known.disk.ids().iter().position(|id| Some(*id) == border),
        Some(1)
    );
    known.reopen();
    let disk = known.directory.truncate(border.unwrap()).unwrap();
    assert_eq!(disk.layers(), 3);
}

#[test]
fn layers_up_to_that_of_a_snapshot_are_not_merged_with_others() {
    let mut known = Known::new();
    for number in 0..18 {
        assert_eq!(known.disk.layers(), number + 2);
        let ids = known.disk.ids();
        for border in 0..ids.len() - 1 {
            for in_need in [false, true] {
                let found = merging::layers_to_merge(&known.disk, in_need, Some(ids[border]));
                let Some(layers) = found else {
                    assert!(ids.len() <= if in_need { 8 } else { 12 });
                    continue;
                };
                assert!(layers.start >= 1 && layers.end < ids.len() && layers.len() >= 2);
                assert!(layers.end <= border + 1 || layers.start > border);
            }
        }
        known.change();
        known.freeze();
    }
}

/// A disk that is reset while a merge is in progress.
#[test]
fn a_merged_layer_that_does_not_fit_any_more_is_dropped() {
    let mut known = Known::new();
    let mut content = Vec::new();
    for _ in 0..6 {
        known.change();
        content.clone_from(&known.content);
        known.freeze();
        // A snapshot is complete when its layers are durable.
        known.disk.flush().unwrap();
        if known.disk.layers() == 4 {
            break;
        }
    }
    let border = known.disk.ids()[2];
    for _ in 0..3 {
        known.change();
        known.freeze();
    }
    let merged = known
        .directory
        .write_merged(&known.disk, 3..6, &NEVER)
        .unwrap();
    known.disk = known.directory.truncate(border).unwrap();
    known.content = content;
    assert!(known.directory.adopt_merged(&known.disk, merged).is_err());
    assert_eq!(known.names(), ["0", "1", "2", "3"]);
    known.reopen();
    // The rest of a merge between the layers.
    fs::write(known.directory.path().join("9"), []).unwrap();
    known.disk = known.directory.truncate(border).unwrap();
    assert_eq!(known.names(), ["0", "1", "2", "3"]);
}

/// Each clone of a volume that has changed freezes it.
#[test]
fn a_volume_that_is_cloned_often_stays_short() {
    let mut known = Known::new();
    for number in 0..24 {
        known.change();
        known.disk.flush().unwrap();
        let copy = known.fixture.record(&format!("copy-{number}"));
        known.directory.clone_to(&copy).unwrap();
        assert!(read(&copy.open().unwrap(), 0, LEN) == known.content);
        copy.remove().unwrap();
        known.disk = known.directory.open().unwrap();
        assert!(known.disk.layers() <= MOST + 1, "{}", known.disk.layers());
        known.check();
    }
}

#[test]
fn a_cancelled_merge_leaves_no_file() {
    let mut known = Known::new();
    for _ in 0..3 {
        known.change();
        known.freeze();
    }
    let cancelled = AtomicBool::new(true);
    let refused = known.directory.write_merged(&known.disk, 1..3, &cancelled);
    assert!(matches!(
        refused,
        Err(DiskError::Layer {
            source: LayerError::Cancelled,
            ..
        })
    ));
    assert_eq!(known.names(), ["0", "1", "2", "3", "4"]);
}
