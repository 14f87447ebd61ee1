//! Removal of images that snapshots need, with snapshots of a machine that never ran.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;

use sm_control::config::VmConfig;
use sm_control::id::VmId;
use sm_image::{Compression, LayoutBuilder, MemoryFile};
use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::state_file::Section;
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};

use super::*;
use crate::image::{Config, Images, PruneOptions};
use crate::{Error, ErrorKind, Sm};

struct Fixture {
    dir: tempfile::TempDir,
    home: Home,
    images: Images,
    sm: Sm,
}

const ALL: PruneOptions = PruneOptions::new().all(true).compressed(true);

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sm = Sm::builder().below(dir.path()).build().unwrap();
        let (home, images) = (sm.home().clone(), sm.images());
        fs::create_dir(home.data()).unwrap();
        Self {
            dir,
            home,
            images,
            sm,
        }
    }

    /// Brings an image into the store. Returns its reference and digest.
    fn image(&self, name: &str) -> (String, String) {
        let layout = self.dir.path().join(name);
        let mut image = LayoutBuilder::new(&layout, Compression::None).unwrap();
        let file = MemoryFile::File(name.as_bytes().to_vec());
        image.memory_layer(&[("file", 0o644, file)]).unwrap();
        image.finish("v1", Config::default()).unwrap();
        let reference = format!("oci:{}:v1", layout.display());
        let image = self.sm.image(&reference).unwrap();
        (reference, image.digest().to_owned())
    }

    /// Publishes a snapshot with this description of its VM.
    fn snapshot(&self, name: &str, layer: Layer, content: &saved::Content) {
        let store = SnapshotStore::open(&self.home.snapshots()).unwrap();
        let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
        let description = Description {
            layer,
            sm_version: "test".into(),
            machine_version: 1,
            vcpus: 1,
            kernel: "k".into(),
            agent: "a".into(),
            cpu: CpuFeatures::default(),
            protocol: 1,
            devices: Vec::new(),
            labels: BTreeMap::new(),
        };
        let state = vec![Section {
            name: "vm".into(),
            version: 1,
            payload: serde_json::to_vec(content).unwrap(),
        }];
        Capture::begin(&store, &memory, Ancestry::Booted)
            .unwrap()
            .finish(&store, name, description, state)
            .unwrap();
    }

    /// Publishes a snapshot of a VM with this image.
    fn workload(&self, name: &str, image_digest: &str) {
        let mut config = VmConfig::new(VmId::generate(), name);
        config.image_digest = image_digest.to_owned();
        let content = saved::Content {
            config: Some(config.into()),
            ..saved::Content::default()
        };
        self.snapshot(name, Layer::App, &content);
    }

    fn count(&self, part: &str) -> usize {
        let directory = self.home.images().join(part);
        fs::read_dir(directory).unwrap().count()
    }
}

#[test]
fn an_image_stays_as_long_as_a_snapshot_needs_it() {
    let f = Fixture::new();
    let (used, digest) = f.image("used");
    let (unused, _) = f.image("unused");
    f.workload("first", &digest);
    f.workload("second", &digest);
    // A snapshot of the cache is made again from an image.
    f.snapshot("base", Layer::Base, &saved::Content::default());

    let pruned = f.images.prune(ALL).unwrap();
    assert_eq!(pruned.images, [unused]);
    assert_eq!((f.count("disks"), f.count("layers")), (1, 1));
    for query in [&used, &digest] {
        let error = f.images.remove(query).unwrap_err().to_string();
        assert!(error.contains("snapshot \"first\""), "{error}");
    }
    let pruned = f.images.prune_to(0).unwrap().unwrap();
    assert!(pruned.images.is_empty(), "{pruned:?}");
    // Its last name cannot be removed, and others can.
    f.images.tag(&used, "another:1").unwrap();
    f.images.remove("another:1").unwrap();

    // Repair does not remove what is damaged and needed.
    let layer = fs::read_dir(f.home.images().join("layers")).unwrap().next();
    let small = layer.unwrap().unwrap().path().join("small");
    let file = fs::File::options().write(true).open(small).unwrap();
    file.write_all_at(b"U", 0).unwrap();
    let verified = f.images.repair(&used).unwrap();
    assert!(!verified.problems.is_empty() && !verified.repaired);
    assert_eq!((f.count("disks"), f.count("layers")), (1, 1));
    file.write_all_at(b"u", 0).unwrap();

    let snapshots = SnapshotStore::open(&f.home.snapshots()).unwrap();
    for name in ["first", "second"] {
        assert_eq!((f.count("disks"), f.count("layers")), (1, 1));
        assert!(f.images.remove(&used).is_err());
        snapshots.remove(name).unwrap();
    }
    f.images.remove(&used).unwrap();
    assert_eq!((f.count("disks"), f.count("layers")), (0, 0));
}

#[test]
fn an_image_stays_as_long_as_a_vm_has_it() {
    let f = Fixture::new();
    let (used, digest) = f.image("used");
    let (unused, _) = f.image("unused");
    let records = Records::open(&f.home).unwrap();
    let draft = crate::record::Draft::default();
    let config = |id, name| {
        let mut config = VmConfig::new(id, name);
        config.image_digest = digest.clone();
        Ok(config)
    };
    let (record, lock) = records.create(&draft, config).unwrap();
    drop(lock);
    let pruned = f.images.prune(ALL).unwrap();
    assert_eq!(pruned.images, [unused]);
    let error = f.images.remove(&used).unwrap_err().to_string();
    let user = format!("is used by VM \"{}\"", record.config().name);
    assert!(error.contains(&user), "{error}");
    // One that cannot be read may have any image.
    let path = record.directory().join("config.json");
    let json = fs::read(&path).unwrap();
    fs::write(&path, "{").unwrap();
    let error = f.images.remove(&used).unwrap_err().to_string();
    assert!(error.contains("is damaged"), "{error}");
    fs::write(&path, json).unwrap();
    record.erase().unwrap();
    f.images.remove(&used).unwrap();
}

#[test]
fn nothing_is_removed_while_a_snapshot_cannot_be_read() {
    let f = Fixture::new();
    let (reference, digest) = f.image("image");
    f.workload("readable", &digest);
    let snapshot = f.home.snapshots().join("readable");
    let damage = |file: &str, bytes: &[u8]| {
        let path = snapshot.join(file);
        let before = fs::read(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        for error in [
            f.images.remove(&reference).map(drop),
            f.images.prune(ALL).map(drop),
            f.images.prune_to(0).map(drop),
        ] {
            let error: Error = error.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
            let error = error.to_string();
            assert!(error.contains("\"readable\" cannot be read"), "{error}");
        }
        assert_eq!((f.count("disks"), f.count("layers")), (1, 1));
        fs::write(&path, before).unwrap();
    };
    damage("manifest.json", b"{");
    damage("state.bin", b"");
    // The digest of an image is none.
    f.workload("odd", "image");
    let error = f.images.prune(ALL).unwrap_err().to_string();
    assert!(error.contains("\"odd\" cannot be read"), "{error}");
    assert_eq!((f.count("disks"), f.count("layers")), (1, 1));
}

#[test]
fn a_path_that_cannot_be_examined_may_exist() {
    let dir = tempfile::tempdir().unwrap();
    assert!(is_gone(&dir.path().join("nothing")));
    assert!(!is_gone(dir.path()));
    let looping = dir.path().join("loop");
    std::os::unix::fs::symlink("loop", &looping).unwrap();
    assert!(!is_gone(&looping.join("x")));
}

/// Neither can be read by any process, whatever its rights.
#[test]
fn nothing_is_removed_while_the_snapshots_cannot_be_examined() {
    let f = Fixture::new();
    let (reference, digest) = f.image("image");
    f.workload("one", &digest);
    let snapshots = f.home.snapshots();
    let aside = f.dir.path().join("aside");
    for path in [
        snapshots.clone(),
        snapshots.join("one/manifest.json"),
        snapshots.join("one/state.bin"),
        snapshots.join("one/memory.bin"),
    ] {
        fs::rename(&path, &aside).unwrap();
        for with in ["loop", "file"] {
            match with {
                "loop" => std::os::unix::fs::symlink(&path, &path).unwrap(),
                _ => fs::write(&path, b"x").unwrap(),
            }
            let removed = f.images.remove(&reference);
            assert!(removed.is_err(), "{path:?}: {with}");
            assert!(f.images.prune(ALL).is_err(), "{path:?}: {with}");
            assert!(f.images.prune_to(0).is_err(), "{path:?}: {with}");
            assert_eq!((f.count("disks"), f.count("layers")), (1, 1));
            fs::remove_file(&path).unwrap();
        }
        fs::rename(&aside, &path).unwrap();
    }
    assert!(f.images.prune(ALL).unwrap().images.is_empty());
    let store = SnapshotStore::open(&snapshots).unwrap();
    store.remove("one").unwrap();
    assert_eq!(f.images.prune(ALL).unwrap().images, [reference]);
}

/// Returns the number of calls of read(2) and its relatives by this thread
/// (proc_pid_io(5)); those that read this number are among them.
fn reads() -> u64 {
    let io = fs::read_to_string("/proc/thread-self/io").unwrap();
    let count = io.lines().find_map(|line| line.strip_prefix("syscr: "));
    count.unwrap().parse().unwrap()
}

#[test]
fn the_work_of_finding_users_is_proportional_to_the_number_of_snapshots() {
    let work = |snapshots: usize| {
        let f = Fixture::new();
        let digest = Digest::of(b"image");
        for number in 0..snapshots {
            f.workload(&format!("s{number}"), &digest.to_string());
        }
        let before = reads();
        let users = image_users(&f.home).ok().unwrap();
        let made = reads() - before;
        assert_eq!(users[&digest].len(), snapshots);
        made
    };
    let (few, many) = (work(8), work(16));
    assert!(few > 8 && 2 * many < 5 * few, "{few}, {many}");
}
