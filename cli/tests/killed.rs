//! `sm` is killed at random moments while it pulls, converts and removes: the next run
//! finds a consistent store, and finishes; nothing is left over.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

const KILLS: usize = 100;

struct Somebody(tempfile::TempDir);

impl Somebody {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sm"));
        command
            .args(arguments)
            .env("HOME", self.0.path())
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_RUNTIME_DIR", self.path("run"));
        command
    }

    #[track_caller]
    fn sm(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        output
    }

    /// Creates an image of four layers without common files.
    fn image(&self, name: &str, seed: u8) -> String {
        let layout = self.path(name);
        let mut image = LayoutBuilder::new(&layout, Compression::Gzip(1)).unwrap();
        for layer in 0..4u8 {
            let noise = (0..1_500_000u32).map(|n| {
                let mixed = n.wrapping_mul(2_654_435_761) >> 13;
                mixed.to_le_bytes()[0] ^ layer ^ seed
            });
            let large = MemoryFile::File(noise.collect());
            let small = MemoryFile::File(vec![seed; 100]);
            let files = [("large", 0o644, large), ("small", 0o644, small)];
            image.memory_layer(&files).unwrap();
        }
        image.finish("latest", Config::default()).unwrap();
        format!("oci:{}", layout.display())
    }

    /// Returns the files of the store below `part`, with their sizes on disk.
    fn files(&self, part: &str) -> BTreeSet<(PathBuf, u64)> {
        fn visit(path: &Path, found: &mut BTreeSet<(PathBuf, u64)>) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                let meta = entry.metadata().unwrap();
                match meta.is_dir() {
                    true => visit(&entry.path(), found),
                    false => drop(found.insert((entry.path(), meta.blocks() * 512))),
                }
            }
        }
        let mut found = BTreeSet::new();
        visit(&self.path("data/sm/images").join(part), &mut found);
        found
    }
}

/// Pseudo-random numbers with a different seed in each run, which is printed on failures.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn the_store_is_consistent_after_a_hundred_kills() {
    let somebody = Somebody(tempfile::tempdir().unwrap());
    let images = [somebody.image("one", 1), somebody.image("two", 2)];
    let [one, two] = [0, 1].map(|n: usize| images[n].as_str());
    // The duration of the longest command determines the range of kill times.
    let begun = Instant::now();
    somebody.sm(&["pull", one]);
    let whole = begun.elapsed();
    somebody.sm(&["image", "prune", "--all", "--force"]);
    assert!(somebody.files("layers").is_empty(), "where the store is");

    let seed = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_nsec;
    let mut state = u64::try_from(seed).unwrap() | 1;
    let commands: [&[&str]; 4] = [
        &["pull", one],
        &["pull", two],
        &["rmi", one],
        &["image", "prune", "--all", "--force"],
    ];
    // Ranges of kill times per command; reduced when a command turns out to be shorter.
    let mut within = commands.map(|_| u64::try_from(whole.as_micros()).unwrap());
    let (mut killed, mut round) = (0, 0);
    while killed < KILLS {
        round += 1;
        assert!(round < 20 * KILLS, "only {killed} were killed in time");
        let which = usize::try_from(random(&mut state) % 4).unwrap();
        let doing = commands[which];
        let mut child = somebody
            .command(doing)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moment = random(&mut state) % within[which];
        std::thread::sleep(Duration::from_micros(moment));
        child.kill().unwrap();
        match child.wait().unwrap().code() {
            None => killed += 1,
            Some(_) => within[which] = (within[which] * 4 / 5).max(1000),
        }

        // Every listed image is complete.
        let context = format!("round {round}, {doing:?} killed after {moment} us");
        let verified = somebody.command(&["image", "verify"]).output().unwrap();
        assert!(verified.status.success(), "{context}: {verified:?}");
        if round % 5 == 4 {
            somebody.sm(&["pull", one]);
            somebody.sm(&["pull", two]);
            somebody.sm(&["image", "verify", one, two]);
            // The next command has removed the temporary files.
            assert!(somebody.files("tmp").is_empty(), "{context}");
        }
    }
    // Only data that the images need is left.
    somebody.sm(&["pull", one]);
    somebody.sm(&["pull", two]);
    let names = |files: BTreeSet<(PathBuf, u64)>| files.into_iter().map(|(path, _)| path);
    let store: BTreeSet<_> = names(somebody.files("")).collect();
    somebody.sm(&["image", "prune"]);
    let pruned: BTreeSet<_> = names(somebody.files("")).collect();
    let left: Vec<_> = store
        .difference(&pruned)
        .filter(|path| !path.starts_with(somebody.path("data/sm/images/locks")))
        .collect();
    // A layer whose image was not finished may stay for the next attempt.
    let blobs = left.iter().filter(|path| path.ends_with("blob")).count();
    assert!(blobs <= 1, "{left:?}");
    somebody.sm(&["image", "prune", "--all", "--force"]);
    for part in ["layers", "disks", "blobs", "refs", "tmp"] {
        assert!(somebody.files(part).is_empty(), "{part}");
    }
}
