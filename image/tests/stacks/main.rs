//! Tests that random stacks of layers become the same trees as in containerd and umoci.
//!
//! Every stack is converted and its disk mounted, applied by containerd's applier (in a
//! containerd of the test's own), and unpacked by `umoci`; the three trees are compared
//! entry by entry. Where the two references differ, containerd is authoritative, and the
//! class of the difference must be listed in `compare.rs`.
//!
//! The test needs `containerd`, `curl`, `umoci` and root, and is left out without them
//! (`cargo xtask test` installs and requires the tools). `SM_TEST_STACKS=N` sets the
//! number of stacks, `SM_TEST_FULL` sets it to 20,000, `SM_TEST_SEED=N` tests one seed
//! only, `SM_TEST_FIRST=N` sets the first seed, and `SM_TEST_THREADS=N` the number of
//! threads.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod compare;
mod containerd;
mod others;
mod programs;
mod random;
mod straight;
#[path = "../support/mod.rs"]
mod support;
mod tree;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use compare::{Appliers, Outcome, Tally, shrink};
use programs::output;
use rustix::mount::UnmountFlags;

/// Number of stacks in an ordinary run.
const STACKS: u64 = 300;
/// Number of stacks in a thorough run.
const STACKS_FULL: u64 = 20_000;
/// Number of stacks whose layers are imported into containerd together.
const BATCH: usize = 100;
/// Seeds that found a problem before. They are tested first.
const KEPT: &[u64] = &[
    2, 3, 9, 22, 23, 59, 74, 158, 189, 201, 205, 206, 241, 307, 349, 357, 369, 633, 698, 791, 827,
    879, 3605, 7949, 10636, 11433, 11892, 18742, 19796,
];

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is a number")),
    )
}

fn seeds() -> Vec<u64> {
    if let Some(seed) = number("SM_TEST_SEED") {
        return vec![seed];
    }
    let full = std::env::var_os("SM_TEST_FULL").is_some();
    let count = number("SM_TEST_STACKS").unwrap_or(if full { STACKS_FULL } else { STACKS });
    let first = number("SM_TEST_FIRST").unwrap_or(0);
    let kept = KEPT.iter().copied();
    kept.chain(first..first + count).collect()
}

/// A tmpfs, because the test would otherwise spend its time syncing files.
struct Memory(tempfile::TempDir);

impl Memory {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mount = ["-t", "tmpfs", "-o", "mode=755", "stacks"];
        output(Command::new("mount").args(mount).arg(directory.path())).unwrap();
        Self(directory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// Findings of all threads.
#[derive(Default)]
struct Found {
    tally: Tally,
    failures: Vec<String>,
}

/// Compares the stacks of these seeds.
fn compare(appliers: &mut Appliers, seeds: &[u64], found: &Mutex<Found>) {
    appliers.clear();
    let stacks: Vec<_> = seeds
        .iter()
        // A quarter of them keep entries that are refused.
        .map(|seed| appliers.prepared(random::stack(*seed), seed % 4 == 0))
        .collect();
    let outcomes = appliers.compare(&stacks);
    for ((seed, stack), outcome) in seeds.iter().zip(&stacks).zip(outcomes) {
        let failure = match &outcome {
            Outcome::Different(verdict) => {
                let (least, verdict) = shrink(appliers, stack, verdict.clone());
                let text = format!(
                    "seed {seed}: {}\n{}  (- theirs, + ours)\n{}",
                    verdict.class,
                    random::describe(&least.layers),
                    verdict.details
                );
                eprintln!("{text}");
                Some(text)
            }
            _ => None,
        };
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        found.tally.count(&outcome);
        found.failures.extend(failure);
    }
}

fn run(seeds: &[u64], directory: &Path) -> Found {
    let found = Mutex::new(Found::default());
    let batches: Vec<_> = seeds.chunks(BATCH).collect();
    let next = AtomicUsize::new(0);
    let threads = number("SM_TEST_THREADS").map_or_else(
        || thread::available_parallelism().map_or(1, usize::from),
        |threads| usize::try_from(threads).unwrap(),
    );
    thread::scope(|scope| {
        for number in 0..threads.min(batches.len()) {
            let (found, batches, next) = (&found, &batches, &next);
            let directory = directory.join(number.to_string());
            scope.spawn(move || {
                let mut appliers = Appliers::start(&directory);
                while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                    compare(&mut appliers, batch, found);
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn random_stacks_become_what_containerd_makes_of_them() {
    if !sm_test_needs::root()
        || !sm_test_needs::programs(&["containerd", "curl", "umoci", "fsck.erofs"])
    {
        return;
    }
    let seeds = seeds();
    let memory = Memory::new();
    let begin = Instant::now();
    let found = run(&seeds, memory.0.path());
    eprintln!(
        "{} stacks in {:.1?}:\n{}",
        seeds.len(),
        begin.elapsed(),
        found.tally.lines()
    );
    assert!(
        found.failures.is_empty(),
        "{} stacks differ:\n{}",
        found.failures.len(),
        found.failures.join("\n")
    );
}
