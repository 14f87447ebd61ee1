//! Tests that kill a process at random moments while it creates, replaces and removes
//! snapshots: the next process finds all listed snapshots intact, and no remains.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sm_snapshot::capture::Ancestry;
use sm_snapshot::chain::Chain;
use sm_snapshot::flat;
use sm_snapshot::manifest::Layer;
use sm_snapshot::restore::map_memory;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::verify::verify;
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use vm_memory::{Bytes as _, GuestAddress};

const KILLS: usize = 60;
const NAME: &str = "snapshots_listed_after_a_kill_are_intact";
/// Name of the environment variable with the store's directory for the process to be
/// killed.
const VICTIM: &str = "SM_TEST_VICTIM";
const PAGE: u64 = 4096;

fn capture(store: &SnapshotStore, name: &str, memory: &MachineMemory, ancestry: Ancestry<'_>) {
    common::capture(store, name, memory, ancestry, Layer::App);
}

fn write(memory: &MachineMemory, page: u64, value: u64) {
    let at = GuestAddress(page * PAGE + 64);
    memory.guest.write_obj(value, at).unwrap();
}

/// Creates, replaces and removes snapshots until the process is killed.
fn work(root: &Path) {
    let store = SnapshotStore::open(root).unwrap();
    for round in 0.. {
        // An earlier process may have left any of these snapshots.
        for name in ["grandchild", "child"] {
            let _ = store.remove(name);
        }
        store.trim(1, |name| name != "parent").unwrap();
        let chain = Chain::open(&store, "parent").unwrap();
        let memory = map_memory(&chain).unwrap();
        for page in 0..50 {
            write(&memory, page * 3, round);
        }
        capture(&store, "child", &memory, Ancestry::Diff(&chain));
        let child = Chain::open(&store, "child").unwrap();
        WorkingSet::record(&memory)
            .unwrap()
            .save(&store, &child.tip().lease)
            .unwrap();
        let memory = map_memory(&child).unwrap();
        write(&memory, 1, 1);
        capture(&store, "grandchild", &memory, Ancestry::Diff(&child));
        drop((memory, child, chain));
        flat::flatten(&store, "grandchild").unwrap();
        store.remove("child").unwrap();
    }
}

/// Returns pseudo-random numbers from a seed.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn snapshots_listed_after_a_kill_are_intact() {
    if let Some(root) = std::env::var_os(VICTIM) {
        return work(Path::new(&root));
    }
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("snapshots");
    let store = SnapshotStore::open(&root).unwrap();
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    for page in 0..100 {
        write(&memory, page, page + 1);
    }
    capture(&store, "parent", &memory, Ancestry::Booted);
    let seed = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_nsec;
    let mut state = u64::try_from(seed).unwrap() | 1;
    let mut seen = BTreeMap::new();
    let said = directory.path().join("said");
    // The moments vary; a busy machine may need more attempts to hit each kind.
    let kinds = ["child", "grandchild", "1 unfinished"];
    let mut kills = 0..20 * KILLS;
    while kills.start < KILLS || !kinds.iter().all(|kind| seen.contains_key(*kind)) {
        let kill = kills.next().unwrap_or_else(|| panic!("{seen:?}"));
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", NAME])
            .env(VICTIM, &root)
            .stdout(Stdio::null())
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let within = 300_000 + 10_000 * u64::try_from(kill).unwrap();
        let moment = Duration::from_micros(20_000 + random(&mut state) % within);
        std::thread::sleep(moment);
        victim.kill().unwrap();
        let ended = victim.wait().unwrap();
        let context = format!("kill {kill} after {moment:?}");
        let said = fs::read_to_string(&said).unwrap();
        assert!(ended.code().is_none(), "{context}: it failed: {said}");

        let left = fs::read_dir(&root).unwrap().flatten();
        let left = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("tmp-"));
        *seen
            .entry(format!("{} unfinished", left.count()))
            .or_insert(0) += 1;
        let store = SnapshotStore::open(&root).unwrap();
        let entries = store.list().unwrap();
        assert!(
            entries.iter().any(|entry| entry.name == "parent"),
            "{context}"
        );
        for entry in &entries {
            assert!(entry.manifest.is_ok(), "{context}: {entry:?}");
            let chain = Chain::open(&store, &entry.name);
            let chain = chain.unwrap_or_else(|error| panic!("{context}: {error}"));
            verify(&chain).unwrap_or_else(|error| panic!("{context}: {error}"));
            map_memory(&chain).unwrap();
            *seen.entry(entry.name.clone()).or_insert(0) += 1;
        }
        // Only the snapshots and the lock are left.
        let there = fs::read_dir(&root).unwrap().count();
        assert_eq!(there, entries.len() + 1, "{context}");
    }
}
