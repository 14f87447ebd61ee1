//! Tests of the store: publishing, leasing, removing, sweeping.

use std::time::SystemTime;

use super::*;
use crate::manifest::{MemoryEntry, ParentRef, tests::sample};

fn write(draft: &Draft, parent: Option<ParentRef>) -> Manifest {
    let mut manifest = Manifest {
        parent,
        memory: MemoryEntry {
            len: 3,
            ..MemoryEntry::default()
        },
        ..sample()
    };
    let bytes = manifest.encode().unwrap();
    fs::write(draft.path().join("manifest.json"), bytes).unwrap();
    fs::write(draft.path().join("state.bin"), b"").unwrap();
    fs::write(draft.path().join("memory.bin"), b"abc").unwrap();
    manifest
}

pub(crate) fn store() -> (tempfile::TempDir, SnapshotStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(&dir.path().join("snapshots")).unwrap();
    (dir, store)
}

pub(crate) fn publish(store: &SnapshotStore, name: &str, parent: Option<ParentRef>) -> Manifest {
    let draft = store.draft().unwrap();
    let manifest = write(&draft, parent);
    store.publish(draft, name).unwrap();
    manifest
}

#[test]
fn a_published_snapshot_is_listed_leased_and_removed() {
    let (_dir, store) = store();
    let manifest = publish(&store, "base", None);
    assert_eq!(store.list().unwrap().len(), 1);
    let lease = store.lease("base").unwrap();
    assert_eq!(*lease.manifest(), manifest);
    assert!(matches!(store.remove("base"), Err(Error::InUse { .. })));
    drop(lease);
    store.remove("base").unwrap();
    assert!(store.list().unwrap().is_empty());
    assert!(matches!(store.lease("base"), Err(Error::NotFound { .. })));
    let left: Vec<_> = fs::read_dir(&store.root)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["lock"]);
}

#[test]
fn of_two_writers_one_succeeds_and_the_other_gets_an_error() {
    let (_dir, store) = store();
    let (first, second) = (store.draft().unwrap(), store.draft().unwrap());
    write(&first, None);
    write(&second, None);
    let loser = second.path().to_owned();
    store.publish(first, "base").unwrap();
    let error = store.publish(second, "base").unwrap_err();
    assert!(matches!(error, Error::Exists { .. }));
    assert!(!loser.exists());
    store.lease("base").unwrap();
}

#[test]
fn abandoned_drafts_are_swept_and_live_ones_are_not() {
    let (_dir, store) = store();
    let live = store.draft().unwrap();
    let dead = store.root.join("tmp-dead");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join(".lock"), b"").unwrap();
    fs::write(dead.join("memory.bin"), b"x").unwrap();
    SnapshotStore::open(&store.root).unwrap();
    assert!(!dead.exists());
    assert!(live.path().exists());
}

/// A machine is paused while its draft is created, so creation must not wait for another
/// writer, which holds its lock while it waits for the disk.
#[test]
fn a_draft_is_created_while_another_writer_waits() {
    let (_dir, store) = store();
    let _guard = store.exclusive().unwrap();
    let root = store.root.clone();
    let (done, drafted) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let draft = SnapshotStore::read_only(&root).draft();
        done.send(draft.is_ok()).unwrap();
    });
    let minute = std::time::Duration::from_secs(60);
    assert!(drafted.recv_timeout(minute).unwrap());
}

#[test]
fn a_snapshot_of_a_store_that_does_not_exist_is_absent() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::read_only(&dir.path().join("none"));
    assert!(matches!(store.remove("x"), Err(Error::NotFound { .. })));
    assert!(matches!(store.lease("x"), Err(Error::NotFound { .. })));
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_parent_cannot_be_removed_before_its_child() {
    let (_dir, store) = store();
    let base = publish(&store, "base", None);
    let parent = ParentRef {
        name: "base".into(),
        digest: base.digest,
    };
    publish(&store, "child", Some(parent));
    assert_eq!(store.children("base").unwrap(), ["child"]);
    let error = store.remove("base").unwrap_err().to_string();
    assert!(error.contains("child"), "{error}");
    store.remove("child").unwrap();
    store.remove("base").unwrap();
}

#[test]
fn a_child_that_cannot_be_read_keeps_its_parent() {
    let (_dir, store) = store();
    let base = publish(&store, "base", None);
    let parent = ParentRef {
        name: "base".into(),
        digest: base.digest,
    };
    publish(&store, "child", Some(parent));
    let path = store.root.join("child/manifest.json");
    // The manifest has another version, or was changed.
    let text = fs::read_to_string(&path).unwrap();
    let newer = text.replace("\"format\": ", "\"format\": 9");
    assert_ne!(newer, text);
    fs::write(&path, newer).unwrap();
    let error = store.remove("base").unwrap_err().to_string();
    assert!(error.contains("child"), "{error}");
    assert_eq!(store.trim(0, |name| name == "base").unwrap(), 0);
    // The manifest cannot be opened, as when the process has no file descriptors left.
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(store.remove("base"), Err(Error::Io { .. })));
    assert!(store.trim(0, |name| name == "base").is_err());
    assert!(store.root.join("base").exists());
    store.remove("child").unwrap();
    store.remove("base").unwrap();
}

#[test]
fn trimming_a_chain_removes_tips_before_their_parents() {
    let (_dir, store) = store();
    let mut parent = None;
    for name in ["a", "b", "c"] {
        let manifest = publish(&store, name, parent);
        parent = Some(ParentRef {
            name: name.into(),
            digest: manifest.digest,
        });
    }
    let chosen = |name: &str| name != "lock";
    let newest = store.lease("a").unwrap();
    // The most recently used snapshot is last.
    store.note_use(&store.lease("b").unwrap());
    store.note_use(&newest);
    drop(newest);
    assert_eq!(store.trim(0, chosen).unwrap(), 3);
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn a_truncated_memory_file_is_refused() {
    let (_dir, store) = store();
    publish(&store, "base", None);
    fs::write(store.root.join("base/memory.bin"), b"ab").unwrap();
    assert!(matches!(store.lease("base"), Err(Error::Damaged { .. })));
    assert_eq!(
        store.list().unwrap().len(),
        1,
        "still listed, to be removed"
    );
    store.remove("base").unwrap();
}

#[test]
fn trimming_keeps_what_was_used_last_and_what_is_in_use() {
    let (_dir, store) = store();
    for name in ["auto-1", "auto-2", "auto-3", "auto-4", "mine"] {
        publish(&store, name, None);
    }
    let used = |name: &str, seconds| {
        let path = store.root.join(name).join("manifest.json");
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        File::open(path).unwrap().set_modified(time).unwrap();
    };
    for (name, seconds) in [("auto-1", 10), ("auto-2", 20), ("auto-3", 30)] {
        used(name, seconds);
    }
    used("mine", 1);
    store.note_use(&store.lease("auto-2").unwrap());
    let held = store.lease("auto-1").unwrap();
    let automatic = |name: &str| name.starts_with("auto-");
    assert_eq!(store.trim(2, automatic).unwrap(), 1);
    assert_eq!(store.names().unwrap().len(), 4);
    assert!(matches!(store.lease("auto-3"), Err(Error::NotFound { .. })));
    drop(held);
    assert_eq!(store.trim(2, automatic).unwrap(), 1);
    let mut left = store.names().unwrap();
    left.sort();
    assert_eq!(left, ["auto-2", "auto-4", "mine"]);
}

#[test]
fn names_cannot_leave_the_store() {
    for name in [
        "", "..", ".", "a/b", "/etc", "tmp-1", "lock", "a b", "-x", "é",
    ] {
        assert!(check_name(name).is_err(), "{name:?}");
    }
    assert!(check_name("base-256m.1_x").is_ok());
}

fn temporary(store: &SnapshotStore) -> Vec<String> {
    fs::read_dir(&store.root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with(TEMPORARY))
        .collect()
}

/// Reproduces the directories that a process leaves when it is killed in
/// [`SnapshotStore::publish`] or [`SnapshotStore::remove`].
#[test]
fn remains_of_a_kill_while_publishing_or_removing_are_swept() {
    let (_dir, store) = store();
    let draft = store.draft().unwrap();
    write(&draft, None);
    let path = draft.path().to_owned();
    let _ = draft.dir.keep();
    fs::remove_file(path.join(LOCK)).unwrap();
    publish(&store, "gone", None);
    let grave = store.bury(&store.root.join("gone")).unwrap();
    assert_eq!(temporary(&store).len(), 2);
    SnapshotStore::open(&store.root).unwrap();
    assert!(!path.exists() && !grave.exists());
    assert_eq!(temporary(&store), Vec::<String>::new());
}

#[test]
fn a_failed_sweep_does_not_prevent_opening_the_store() {
    use std::os::unix::fs::PermissionsExt as _;
    if rustix::process::geteuid().is_root() {
        // Root can remove everything except immutable files, so a file in place of a
        // directory represents one that cannot be removed.
        let (_dir, store) = store();
        fs::write(store.root.join("tmp-file"), b"").unwrap();
        SnapshotStore::open(&store.root).unwrap().draft().unwrap();
        return;
    }
    let (_dir, store) = store();
    let stuck = store.root.join("tmp-stuck");
    fs::create_dir_all(stuck.join("inner/deep")).unwrap();
    fs::set_permissions(stuck.join("inner"), fs::Permissions::from_mode(0o000)).unwrap();
    SnapshotStore::open(&store.root).unwrap().draft().unwrap();
    fs::set_permissions(stuck.join("inner"), fs::Permissions::from_mode(0o700)).unwrap();
}

/// A reader that opened a file just before its snapshot was replaced must not combine the
/// new manifest with the old memory.
#[test]
fn a_lease_is_consistent_while_its_name_is_replaced() {
    let (_dir, store) = store();
    let make = |number: u8| {
        let draft = store.draft().unwrap();
        let mut manifest = Manifest {
            memory: MemoryEntry {
                len: 1,
                ..MemoryEntry::default()
            },
            created_ms: number.into(),
            ..sample()
        };
        let bytes = manifest.encode().unwrap();
        fs::write(draft.path().join("manifest.json"), bytes).unwrap();
        fs::write(draft.path().join("state.bin"), b"").unwrap();
        fs::write(draft.path().join("memory.bin"), [number]).unwrap();
        store.publish(draft, "name").unwrap();
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..200 {
                make(number);
                // A reader may hold a lease on it.
                while store.remove("name").is_err() {}
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            match store.lease("name") {
                Ok(lease) => {
                    use std::os::unix::fs::FileExt as _;
                    let mut byte = [0];
                    lease.memory().read_exact_at(&mut byte, 0).unwrap();
                    assert_eq!(u64::from(byte[0]), lease.manifest().created_ms);
                    assert!(lease.dir().join("state.bin").exists());
                }
                Err(Error::NotFound { .. } | Error::InUse { .. }) => {}
                Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
            }
        }
    });
}

#[test]
fn unused_snapshots_of_a_kind_are_removed_and_used_ones_are_not() {
    let (_dir, store) = store();
    publish(&store, "fork-idle", None);
    publish(&store, "fork-held", None);
    let parent = publish(&store, "fork-parent", None);
    let parent = ParentRef {
        name: "fork-parent".into(),
        digest: parent.digest,
    };
    publish(&store, "child", Some(parent));
    publish(&store, "mine", None);
    let held = store.lease("fork-held").unwrap();
    let forks = |name: &str| name.starts_with("fork-");
    assert_eq!(store.remove_unused(forks, |_| false).unwrap(), 0);
    assert_eq!(store.remove_unused(forks, |_| true).unwrap(), 1);
    drop(held);
    assert_eq!(store.remove_unused(forks, |_| true).unwrap(), 1);
    let mut left = store.names().unwrap();
    left.sort();
    assert_eq!(left, ["child", "fork-parent", "mine"]);
}

/// A memory file that cannot be opened may be in use by a machine.
#[test]
fn a_snapshot_that_cannot_be_examined_is_not_removed() {
    let (_dir, store) = store();
    publish(&store, "name", None);
    let memory = store.root.join("name/memory.bin");
    fs::remove_file(&memory).unwrap();
    std::os::unix::fs::symlink("memory.bin", &memory).unwrap();
    let refused = store.remove("name");
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    assert!(store.root.join("name").exists());
    // Without a memory file it is of no use to anyone.
    fs::remove_file(&memory).unwrap();
    store.remove("name").unwrap();
    assert!(!store.root.join("name").exists());
}

#[test]
fn a_file_is_distinguished_from_its_replacement() {
    let (_dir, store) = store();
    publish(&store, "name", None);
    let path = store.root.join("name/memory.bin");
    let first = File::open(&path).unwrap();
    assert!(is_still_at(&first, &path).unwrap());
    store.remove("name").unwrap();
    assert!(!is_still_at(&first, &path).unwrap());
    publish(&store, "name", None);
    assert!(!is_still_at(&first, &path).unwrap());
}

/// Obstacles keep every process from reading a manifest, also root's.
#[test]
fn nothing_is_removed_while_a_manifest_cannot_be_examined() {
    let (_dir, store) = store();
    publish(&store, "base", None);
    publish(&store, "other", None);
    let path = store.root.join("other/manifest.json");
    for with in ["loop", "directory"] {
        fs::remove_file(&path).unwrap();
        match with {
            "loop" => std::os::unix::fs::symlink("manifest.json", &path).unwrap(),
            _ => fs::create_dir(&path).unwrap(),
        }
        let is_base = |name: &str| name == "base";
        assert!(store.children("base").is_err(), "{with}");
        assert!(store.remove("base").is_err(), "{with}");
        assert!(store.trim(0, is_base).is_err(), "{with}");
        assert!(store.remove_unused(is_base, |_| true).is_err(), "{with}");
        let listed = store.list().unwrap();
        assert_eq!(listed.len(), 2, "{with}");
        assert!(listed[1].manifest.is_err(), "{with}");
        match with {
            "loop" => fs::remove_file(&path).unwrap(),
            _ => fs::remove_dir(&path).unwrap(),
        }
        fs::write(&path, b"no manifest").unwrap();
    }
    store.remove("base").unwrap();
}

/// They are not listed, and nothing that removes snapshots removes them.
#[test]
fn entries_that_are_no_snapshots_stay() {
    use std::os::unix::ffi::OsStrExt as _;

    let (_dir, store) = store();
    publish(&store, "one", None);
    let odd = store.root.join(std::ffi::OsStr::from_bytes(b"one\xff"));
    let blank = store.root.join("a b");
    for directory in [&odd, &blank] {
        fs::create_dir(directory).unwrap();
        fs::copy(
            store.root.join("one/manifest.json"),
            directory.join("manifest.json"),
        )
        .unwrap();
    }
    let file = store.root.join("file");
    fs::write(&file, b"x").unwrap();
    assert_eq!(store.names().unwrap(), ["one"]);
    assert_eq!(store.remove_unused(|_| true, |_| true).unwrap(), 1);
    assert_eq!(store.trim(0, |_| true).unwrap(), 0);
    SnapshotStore::open(&store.root).unwrap();
    assert!(odd.is_dir() && blank.is_dir() && file.is_file());
}

#[test]
fn a_store_that_cannot_be_listed_is_not_empty() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("snapshots");
    let store = SnapshotStore::read_only(&root);
    assert!(store.list().unwrap().is_empty(), "there is none");
    for with in ["loop", "file"] {
        match with {
            "loop" => std::os::unix::fs::symlink(&root, &root).unwrap(),
            _ => fs::write(&root, b"x").unwrap(),
        }
        assert!(store.list().is_err(), "{with}");
        assert!(store.children("x").is_err(), "{with}");
        assert!(store.trim(0, |_| true).is_err(), "{with}");
        assert!(store.remove_unused(|_| true, |_| true).is_err(), "{with}");
        fs::remove_file(&root).unwrap();
    }
}

/// Returns the number of calls of read(2) and its relatives by this thread
/// (proc_pid_io(5)); those that read this number are among them.
fn reads() -> u64 {
    let io = fs::read_to_string("/proc/thread-self/io").unwrap();
    let count = io.lines().find_map(|line| line.strip_prefix("syscr: "));
    count.unwrap().parse().unwrap()
}

/// Returns the number of reads that `work` makes on a store of a parent and its children.
fn reads_of(children: usize, work: impl Fn(&SnapshotStore)) -> u64 {
    let (_dir, store) = store();
    let base = publish(&store, "base", None);
    for number in 0..children {
        let parent = ParentRef {
            name: "base".into(),
            digest: base.digest.clone(),
        };
        publish(&store, &format!("auto-{number}"), Some(parent));
    }
    let before = reads();
    work(&store);
    reads() - before
}

#[test]
fn the_work_of_a_removal_is_proportional_to_the_number_of_snapshots() {
    let left = |store: &SnapshotStore| store.names().unwrap().len();
    let trim = |store: &SnapshotStore| {
        let removed = store.trim(0, |name| name != "base");
        assert_eq!((removed.unwrap() > 9, left(store)), (true, 1));
    };
    let unused = |store: &SnapshotStore| {
        let removed = store.remove_unused(|name| name != "base", |_| true);
        assert_eq!((removed.unwrap() > 9, left(store)), (true, 1));
    };
    let children = |store: &SnapshotStore| {
        assert_eq!(store.children("base").unwrap().len() + 1, left(store));
    };
    let list = |store: &SnapshotStore| {
        assert_eq!(store.list().unwrap().len(), left(store));
    };
    let works: [&dyn Fn(&SnapshotStore); 4] = [&trim, &unused, &children, &list];
    for (number, work) in works.into_iter().enumerate() {
        let (few, many) = (reads_of(10, work), reads_of(20, work));
        assert!(few > 10 && 2 * many < 5 * few, "{number}: {few}, {many}");
    }
}

/// The directory that a link names may be on a disk that is not mounted now.
#[test]
fn a_link_to_nothing_is_not_an_empty_store() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("snapshots");
    let store = SnapshotStore::read_only(&root);
    std::os::unix::fs::symlink("elsewhere", &root).unwrap();
    assert!(store.list().is_err());
    assert!(store.children("x").is_err());
    fs::create_dir(dir.path().join("elsewhere")).unwrap();
    assert!(store.list().unwrap().is_empty());
}

/// A link would be run, although nothing that looks for users of parents and images sees it.
#[test]
fn a_link_to_a_snapshot_is_no_snapshot() {
    let (_dir, store) = store();
    publish(&store, "one", None);
    std::os::unix::fs::symlink("one", store.root.join("link")).unwrap();
    fs::write(store.root.join("file"), b"x").unwrap();
    assert_eq!(store.names().unwrap(), ["one"]);
    for name in ["link", "file", "none"] {
        let refused = store.lease(name).unwrap_err();
        assert!(matches!(refused, Error::NotFound { .. }), "{refused:?}");
    }
    store.lease("one").unwrap();
}
