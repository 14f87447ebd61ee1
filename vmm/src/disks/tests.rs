//! Disks of layers in their directories.

mod merging;

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;

const CAPACITY: u64 = 64 << 20;
const PAGE: usize = 4096;

fn read(disk: &LayeredDisk, offset: u64, len: usize) -> Vec<u8> {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), len)]).unwrap();
    let spans = [Span {
        address: GuestAddress(0),
        len: u32::try_from(len).unwrap(),
    }];
    disk.read(&memory, Window::new(&spans, 0, u32::MAX), offset)
        .unwrap();
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

struct Fixture {
    dir: tempfile::TempDir,
    templates: Templates,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::new(dir.path());
        Self { dir, templates }
    }

    fn record(&self, name: &str) -> DiskDirectory {
        let record = self.dir.path().join(name);
        fs::create_dir_all(&record).unwrap();
        DiskDirectory::new(&record, 3)
    }

    fn disk(&self, name: &str) -> (DiskDirectory, LayeredDisk) {
        let directory = self.record(name);
        assert!(!directory.exists().unwrap());
        let disk = directory
            .create(&[self.templates.get(CAPACITY).unwrap()])
            .unwrap();
        (directory, disk)
    }
}

#[test]
fn a_template_is_a_sound_file_system() {
    if !sm_test_needs::programs(&["e2fsck"]) {
        return;
    }
    let fixture = Fixture::new();
    for mebibytes in [64, 200, 1000] {
        let (_, disk) = fixture.disk(&format!("vm-{mebibytes}"));
        let bytes = disk.capacity();
        let raw = tempfile::NamedTempFile::new_in(fixture.dir.path()).unwrap();
        raw.as_file().set_len(bytes).unwrap();
        for at in (0..bytes).step_by(1 << 20) {
            let part = read(&disk, at, 1 << 20);
            if part.iter().any(|byte| *byte != 0) {
                use std::os::unix::fs::FileExt as _;
                raw.as_file().write_all_at(&part, at).unwrap();
            }
        }
        let checked = Command::new("e2fsck").arg("-fn").arg(raw.path()).output();
        let checked = checked.unwrap();
        let text = String::from_utf8_lossy(&checked.stdout);
        assert!(checked.status.success(), "{text}");
    }
}

#[test]
fn a_large_disk_costs_little_until_it_is_used() {
    let fixture = Fixture::new();
    let template = fixture.templates.get(64 << 30).unwrap();
    let allocated = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(allocated(&template) < 8 << 20, "{}", allocated(&template));
    let directory = fixture.record("vm");
    let disk = directory.create(std::slice::from_ref(&template)).unwrap();
    assert_eq!(disk.capacity(), 64 << 30);
    let layers = directory.layers().unwrap();
    assert_eq!(layers.len(), 2);
    assert!(allocated(&layers[1]) <= 64 << 10);
    // The template is shared, and made once.
    assert_eq!(fs::metadata(&template).unwrap().nlink(), 2);
    assert_eq!(fixture.templates.get(64 << 30).unwrap(), template);
}

#[test]
fn a_disk_keeps_its_content_and_is_its_own() {
    let fixture = Fixture::new();
    let (directory, disk) = fixture.disk("one");
    let (_, other) = fixture.disk("other");
    let at = CAPACITY / 2;
    disk.store(b"kept", at).unwrap();
    disk.flush().unwrap();
    drop(disk);
    assert!(directory.exists().unwrap());
    let disk = directory.open().unwrap();
    assert_eq!(read(&disk, at, 4), b"kept");
    assert_eq!(read(&other, at, 4), [0; 4]);
    directory.remove().unwrap();
    assert!(!directory.exists().unwrap());
    directory.remove().unwrap();
}

#[test]
fn frozen_layers_are_shared_with_clones() {
    let fixture = Fixture::new();
    let (directory, disk) = fixture.disk("one");
    disk.store(b"before", 0).unwrap();
    let grown = directory.grow(&disk).unwrap();
    let frozen: Vec<_> = directory.layers().unwrap().drain(..2).collect();
    let clone = fixture.record("clone").create(&frozen).unwrap();
    // The clone was made before the first flush, so it sees the layer without its index.
    assert_ne!(read(&clone, 0, 6), b"before");
    disk.flush().unwrap();
    fixture.record("clone").remove().unwrap();
    let clone = fixture.record("clone").create(&frozen).unwrap();
    grown.store(b"after!", 0).unwrap();
    assert_eq!(read(&clone, 0, 6), b"before");
    clone.store(b"cloned", 0).unwrap();
    assert_eq!(read(&grown, 0, 6), b"after!");
    // The original does not need the clone's names, nor the clone the original's.
    directory.remove().unwrap();
    assert_eq!(read(&clone, 0, 6), b"cloned");
}

#[test]
fn a_reset_discards_what_came_after_the_snapshot() {
    let fixture = Fixture::new();
    let (directory, disk) = fixture.disk("one");
    disk.store(b"one", 0).unwrap();
    let disk = directory.grow(&disk).unwrap();
    disk.store(b"two", 0).unwrap();
    let disk = directory.grow(&disk).unwrap();
    disk.store(b"six", 0).unwrap();
    disk.flush().unwrap();
    assert_eq!(directory.layers().unwrap().len(), 4);
    let disk = directory.truncate(disk.ids()[1]).unwrap();
    assert_eq!(read(&disk, 0, 3), b"one");
    assert_eq!(disk.layers(), 3);
    assert_eq!(directory.layers().unwrap().len(), 3);
}

/// A crash of the host may leave a new top without its header, or with a part of it.
#[test]
fn a_top_that_was_never_flushed_may_be_lost() {
    let fixture = Fixture::new();
    let (directory, disk) = fixture.disk("one");
    disk.store(b"kept", 0).unwrap();
    disk.flush().unwrap();
    let disk = directory.grow(&disk).unwrap();
    drop(disk);
    let top = directory.layers().unwrap().pop().unwrap();
    for len in [0, 1 << 20] {
        let file = File::create(&top).unwrap();
        file.set_len(len).unwrap();
        let disk = directory.open().unwrap();
        assert_eq!(read(&disk, 0, 4), b"kept");
        assert_eq!(disk.layers(), 3);
    }
    // A damaged one is an error.
    fs::write(&top, [1; 2 * PAGE]).unwrap();
    let error = directory.open().unwrap_err();
    assert!(matches!(error, DiskError::Layer { path, .. } if path == top));
}

/// The host may have written a part of the upper one of two new layers, but nothing of the
/// lower one.
#[test]
fn layers_above_one_that_was_never_flushed_may_be_lost() {
    let fixture = Fixture::new();
    let (directory, disk) = fixture.disk("one");
    disk.store(b"kept", 0).unwrap();
    disk.flush().unwrap();
    let disk = directory.grow(&disk).unwrap();
    drop(directory.grow(&disk).unwrap());
    let [.., lost, _] = &directory.layers().unwrap()[..] else {
        panic!("two layers are new");
    };
    File::create(lost).unwrap();
    let disk = directory.open().unwrap();
    assert_eq!((read(&disk, 0, 4), disk.layers()), (b"kept".to_vec(), 3));
    assert_eq!(directory.layers().unwrap().len(), 3);
}

#[test]
fn layers_of_a_snapshot_are_verified() {
    let fixture = Fixture::new();
    let (directory, disk) = fixture.disk("one");
    disk.store(&[1; 3 * PAGE], 0).unwrap();
    disk.flush().unwrap();
    let layers = directory.layers().unwrap();
    let verify = |layers: &[PathBuf]| {
        let mut verified = VerifiedDisks::default();
        verified.add(layers).map(|()| verified)
    };
    let verified = verify(&layers).unwrap();
    let template = verify(&layers[..1]).unwrap();
    assert_eq!((verified.layers, template.layers), (2, 1));
    assert_eq!(verified.bytes - template.bytes, 3 * PAGE as u64);
    // Of another disk, not in order, missing, cut.
    let (other, _) = fixture.disk("other");
    let other = other.layers().unwrap().pop().unwrap();
    let fails = |layers: &[PathBuf]| match verify(layers).unwrap_err() {
        DiskError::Layer { path, .. } | DiskError::Io { path, .. } => path,
        error => panic!("{error}"),
    };
    let [lowest, top] = &layers[..] else {
        panic!("two layers");
    };
    assert_eq!(fails(&[lowest.clone(), top.clone(), other.clone()]), other);
    assert_eq!(fails(&[top.clone(), lowest.clone()]), *lowest);
    let missing = top.with_file_name("9");
    assert_eq!(fails(&[lowest.clone(), missing.clone()]), missing);
    fs::OpenOptions::new()
        .write(true)
        .open(top)
        .and_then(|file| file.set_len(CAPACITY))
        .unwrap();
    assert_eq!(fails(&layers), *top);
}

#[test]
fn a_failed_creation_leaves_no_disk() {
    let fixture = Fixture::new();
    let directory = fixture.record("one");
    let missing = fixture.dir.path().join("missing");
    assert!(directory.create(&[missing]).is_err());
    assert!(!directory.exists().unwrap());
    assert!(directory.create(&[]).is_err());
    let template = fixture.templates.get(CAPACITY).unwrap();
    directory.create(&[template]).unwrap();
    let text = fixture.templates.get(4096).unwrap_err().to_string();
    assert_eq!(text, "cannot make a file system of 4096 bytes");
}

#[test]
fn layers_are_copied_where_they_cannot_be_linked() {
    let fixture = Fixture::new();
    let template = fixture.templates.get(CAPACITY).unwrap();
    let copy = fixture.dir.path().join("copy");
    template::copy_sparse(&template, &copy).unwrap();
    assert!(fs::read(&copy).unwrap() == fs::read(&template).unwrap());
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks();
    assert!(blocks(&copy) <= blocks(&template) + 64);
    assert!(template::copy_sparse(&template, &copy).is_err());
}
