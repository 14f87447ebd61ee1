//! Operations of the store with few file descriptors: an error to open a file is no
//! evidence of damage, and the number of descriptors does not depend on that of images.
//!
//! Each test runs in a process of its own, whose limit it changes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::{Resource, getrlimit, setrlimit};
use sm_image::{PruneOptions, PullOptions, Reference, Store, Users};
use support::home::{Home, layers};
use support::{file, tar};

const ALONE: &str = "SM_TEST_ALONE";

const ALL: PruneOptions = PruneOptions::new().all(true).compressed(true);

fn nobody() -> Result<Users, String> {
    Ok(Users::new())
}

/// Runs the test in a process of its own. Returns `true` in that process.
fn is_alone(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "--test-threads=1", name])
        .env(ALONE, "1")
        .output()
        .unwrap();
    assert!(test.status.success(), "{test:?}");
    assert!(String::from_utf8_lossy(&test.stdout).contains("1 passed"));
    false
}

/// Calls `act` while `more` descriptors can be opened.
fn with_descriptors<T>(more: u64, act: impl FnOnce() -> T) -> T {
    // A new descriptor has the lowest free number.
    let next = File::open("/dev/null").unwrap();
    let number = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&next)).unwrap();
    drop(next);
    let before = getrlimit(Resource::Nofile);
    let mut limited = before;
    limited.current = Some(number + more);
    setrlimit(Resource::Nofile, limited).unwrap();
    let done = act();
    setrlimit(Resource::Nofile, before).unwrap();
    done
}

/// Paths and inodes of layers, disks and blobs.
fn parts(home: &Home) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for part in ["layers", "disks", "blobs"] {
        for entry in fs::read_dir(home.path("store").join(part)).unwrap() {
            let entry = entry.unwrap();
            found.push((entry.path(), entry.metadata().unwrap().ino()));
        }
    }
    found.sort();
    found
}

#[test]
fn files_that_cannot_be_opened_are_not_damaged() {
    if !is_alone("files_that_cannot_be_opened_are_not_damaged") {
        return;
    }
    let home = Home::new();
    let (reference, digest) = home.image("layout", &layers());
    let before = parts(&home);
    let parsed = Reference::parse(&reference).unwrap();
    let by_id = Reference::parse(&digest.hex()).unwrap();
    let options = PullOptions::new().max_concurrent(std::num::NonZero::<usize>::MIN);
    let mut complete = 0;
    for more in 0..40 {
        let verified = with_descriptors(more, || home.store.verify(&reference, Some(&nobody)));
        match verified {
            Ok(verified) => {
                assert_eq!(verified.problems, Vec::<String>::new(), "{more}");
                complete += 1;
            }
            Err(error) => assert_eq!(complete, 0, "{more}: {error}"),
        }
        // An image that cannot be opened is not made again.
        for reference in [&parsed, &by_id] {
            let opened = with_descriptors(more, || {
                home.store.open_image(reference, &options).map(drop)
            });
            assert!(opened.is_ok() || more < 30, "{more}: {opened:?}");
            assert_eq!(parts(&home), before, "{more}");
        }
    }
    assert!((5..38).contains(&complete), "{complete}");
}

#[test]
fn removal_of_many_images_needs_few_descriptors() {
    const MORE: u64 = 16;
    if !is_alone("removal_of_many_images_needs_few_descriptors") {
        return;
    }
    let home = Home::new();
    let images: Vec<_> = (0..3 * MORE)
        .map(|n| home.image(&format!("i{n}"), &[tar(&[file("n", n.to_string())])]))
        .collect();
    let (kept, used) = images[0].clone();
    // The callback needs descriptors, too.
    let users = || {
        let opened: Result<Vec<_>, _> = (0..4).map(|_| File::open("/dev/null")).collect();
        opened.map_err(|error| error.to_string())?;
        Ok(Users::from([(used, vec!["snapshot".to_owned()])]))
    };
    let (removed, pruned) = with_descriptors(MORE, || {
        let store = Store::open(&home.path("store")).unwrap();
        let removed = store.remove(&images[1].0, &users);
        (removed, store.prune(ALL, &users))
    });
    assert_eq!(removed.unwrap().images.len(), 1);
    assert_eq!(pruned.unwrap().images.len(), images.len() - 2);
    assert!(home.store.find(&kept).is_ok());
    assert_eq!((home.count("disks"), home.count("layers")), (1, 1));
}
