//! Tests with a disk that becomes full at every page and every inode that a snapshot
//! needs: the error says so, existing snapshots remain intact, and the operation succeeds
//! once there is space.
//!
//! Each test runs itself again under `unshare` with a small tmpfs.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use sm_snapshot::Error;
use sm_snapshot::capture::{Ancestry, Capture};
use sm_snapshot::chain::Chain;
use sm_snapshot::flat;
use sm_snapshot::manifest::Layer;
use sm_snapshot::restore::map_memory;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::verify::verify;
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use vm_memory::{Bytes as _, GuestAddress};

use self::common::{description, sections};

const OWN: &str = "SM_TEST_OWN_DISK";
const PAGE: u64 = 4096;

/// Returns the directory of a file system with these limits in a child process; `None` in
/// the parent after the child has run the test.
fn small_disk(name: &str, options: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(OWN) {
        return Some(path.into());
    }
    let at = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    // Other users than root can mount in a user namespace.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let test = command
        .args(["--mount", "sh", "-c"])
        .arg(format!(
            "mount -t tmpfs -o {options} none \"${OWN}\" && exec \"$0\" \"$@\""
        ))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", name])
        .env(OWN, at.path())
        .output()
        .unwrap();
    assert!(test.status.success(), "{test:?}");
    assert!(String::from_utf8_lossy(&test.stdout).contains("1 passed"));
    None
}

/// A file or directory that occupies all space but a given amount.
struct Ballast(PathBuf);

impl Ballast {
    /// Leaves `pages` pages free.
    fn but_pages(disk: &Path, pages: u64) -> Self {
        let path = disk.join("ballast");
        let mut file = File::create(&path).unwrap();
        while file.write(&[1; 4096]).is_ok_and(|count| count > 0) {}
        let len = file.metadata().unwrap().len();
        file.set_len(len.checked_sub(pages * PAGE).unwrap())
            .unwrap();
        Self(path)
    }

    /// Leaves `inodes` inodes free.
    fn but_inodes(disk: &Path, inodes: u64) -> Self {
        let path = disk.join("ballast");
        fs::create_dir(&path).unwrap();
        let made = (0..)
            .take_while(|n| File::create(path.join(format!("{n}"))).is_ok())
            .count();
        for n in 0..inodes {
            assert!(n < made as u64);
            fs::remove_file(path.join(format!("{n}"))).unwrap();
        }
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let removed = match self.0.is_dir() {
            true => fs::remove_dir_all(&self.0),
            false => fs::remove_file(&self.0),
        };
        removed.unwrap();
    }
}

fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

fn capture(
    store: &SnapshotStore,
    name: &str,
    memory: &MachineMemory,
    ancestry: Ancestry<'_>,
) -> Result<(), Error> {
    // The state also needs several pages.
    let state = sections([7; 20_000]);
    Capture::begin(store, memory, ancestry)?.finish(
        store,
        name,
        description(Layer::Base),
        state,
    )?;
    Ok(())
}

fn write(memory: &MachineMemory, page: u64, value: u64) {
    let at = GuestAddress(page * PAGE + 64);
    memory.guest.write_obj(value, at).unwrap();
}

fn is_sound(store: &SnapshotStore, name: &str, value: u64) {
    let chain = Chain::open(store, name).unwrap();
    verify(&chain).unwrap();
    let memory = map_memory(&chain).unwrap();
    let at = GuestAddress(3 * PAGE + 64);
    assert_eq!(memory.guest.read_obj::<u64>(at).unwrap(), value, "{name}");
}

/// Calls `act`, which writes to the store, first without free space and then with one
/// more unit each time until it succeeds. Returns the number of failures.
fn wherever_it_gets_full(
    root: &Path,
    ballast: &impl Fn(u64) -> Ballast,
    names: &[&str],
    mut act: impl FnMut(&SnapshotStore) -> Result<(), Error>,
) -> u64 {
    for room in 0.. {
        let full = ballast(room);
        // Every writer opens the store first.
        let acted = SnapshotStore::open(root).and_then(|store| act(&store));
        let Err(error) = acted else {
            return room;
        };
        let text = with_causes(&error);
        assert!(text.contains("No space left"), "with {room}: {text}");
        // Existing snapshots can be used, and there is nothing else in the store.
        let store = SnapshotStore::open(root).unwrap();
        let listed: Vec<String> = store.list().unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(listed, names, "with {room}");
        is_sound(&store, "parent", 33);
        let left = fs::read_dir(root).unwrap().count();
        assert_eq!(left, names.len() + 1, "the snapshots, and the lock");
        drop(full);
    }
    unreachable!()
}

fn all_that_is_written(disk: &Path, ballast: impl Fn(u64) -> Ballast, at_least: u64) {
    let root = disk.join("snapshots");
    let store = SnapshotStore::open(&root).unwrap();
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    for page in 0..10 {
        write(&memory, page, page * 11);
    }
    capture(&store, "parent", &memory, Ancestry::Booted).unwrap();
    let chain = Chain::open(&store, "parent").unwrap();
    let memory = map_memory(&chain).unwrap();
    for page in 0..20 {
        write(&memory, 3 + page * 5, 44);
    }
    let is_full = |names: &[&str], act: &mut dyn FnMut(&SnapshotStore) -> Result<(), Error>| {
        wherever_it_gets_full(&root, &ballast, names, act)
    };
    let failed = is_full(&["parent"], &mut |store| {
        capture(store, "child", &memory, Ancestry::Diff(&chain))
    });
    assert!(failed >= at_least, "{failed}");
    is_sound(&store, "child", 44);
    // Writing a file into an existing snapshot.
    let set = WorkingSet::record(&memory).unwrap();
    let failed = is_full(&["child", "parent"], &mut |store| {
        set.save(store, &store.lease("child")?)
    });
    assert!(failed > 0);
    let child = store.lease("child").unwrap();
    assert_eq!(WorkingSet::load(child.dir()).unwrap().pages(), set.pages());
    drop((child, memory, chain));
    // Replacing a snapshot.
    let failed = is_full(&["child", "parent"], &mut |store| {
        flat::flatten(store, "child").map(drop)
    });
    assert!(failed >= at_least, "{failed}");
    is_sound(&store, "child", 44);
    assert_eq!(Chain::open(&store, "child").unwrap().members().len(), 1);
    // Removal frees space on a full disk.
    let full = ballast(0);
    let store = SnapshotStore::open(&root).unwrap();
    store.remove("child").unwrap();
    assert_eq!(store.trim(0, |_| true).unwrap(), 1);
    drop(full);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "the lock");
}

#[test]
fn snapshots_are_intact_when_the_disk_is_full() {
    let name = "snapshots_are_intact_when_the_disk_is_full";
    if let Some(disk) = small_disk(name, "size=2m") {
        all_that_is_written(&disk, |pages| Ballast::but_pages(&disk, pages), 25);
    }
}

#[test]
fn snapshots_are_intact_when_inodes_run_out() {
    let name = "snapshots_are_intact_when_inodes_run_out";
    if let Some(disk) = small_disk(name, "size=4m,nr_inodes=100") {
        all_that_is_written(&disk, |inodes| Ballast::but_inodes(&disk, inodes), 4);
    }
}
