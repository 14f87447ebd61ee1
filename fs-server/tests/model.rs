//! Random sequences of operations, on a directory of the host and on the same through the
//! server, which must do the same.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use common::{Mounted, driver};
use rustix::fs::{FallocateFlags, fallocate};
use sm_fs_server::testing::FuseDriver;
use sm_fs_server::{CacheMode, ShareOptions};

/// Numbers from a seed that a failure names.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap()
    }
}

/// Contents and links of everything below a directory.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_dir() {
                left.push(path.clone());
                "directory".to_owned()
            } else if meta.is_symlink() {
                format!("{:?}", fs::read_link(&path).unwrap())
            } else {
                format!("{} {:?}", meta.nlink(), fs::read(&path).unwrap())
            };
            let name = path.strip_prefix(root).unwrap();
            all.insert(name.to_string_lossy().into_owned(), content);
        }
    }
    all
}

/// Performs one operation on the tree of names by a driver, and by system calls on `plain`;
/// returns an error if only one of them failed.
fn step(
    numbers: &mut Numbers,
    driver: &mut FuseDriver,
    plain: &Path,
    places: &[&str],
) -> Result<(), String> {
    let at = places[numbers.index(places.len())];
    let to = places[numbers.index(places.len())];
    let name = ["a", "b", "c"][numbers.index(3)];
    let new = ["a", "b", "c"][numbers.index(3)];
    let bytes = vec![u8::try_from(numbers.below(256)).unwrap(); numbers.index(9000)];
    let (host, host_new) = (plain.join(at).join(name), plain.join(to).join(new));
    let node = |driver: &mut FuseDriver, place: &str| driver.walk(&format!("s/{place}"));
    let operation = numbers.below(9);
    let guest: Result<(), i32> = node(driver, at).and_then(|parent| {
        let parent = parent.node;
        match operation {
            0 => driver.mkdir(parent, name, 0o755).map(drop),
            1 => driver.unlink(parent, name),
            2 => driver.rmdir(parent, name),
            3 => {
                let to = node(driver, to)?.node;
                driver.rename((parent, name), (to, new), 0)
            }
            4 => {
                let file = driver.lookup(parent, name)?.node;
                let to = node(driver, to)?.node;
                driver.link(file, to, new).map(drop)
            }
            5 => driver.symlink(parent, name, "target").map(drop),
            6 => {
                let file = driver.lookup(parent, name)?;
                driver.truncate(file.node, bytes.len() as u64).map(drop)
            }
            _ => {
                let (file, handle) = driver.create(parent, name, 0o644)?;
                driver.write(file.node, handle, 5, &bytes, false)?;
                driver.release(file.node, handle)
            }
        }
    });
    let plain = match operation {
        0 => fs::create_dir(&host),
        1 => fs::remove_file(&host),
        2 => fs::remove_dir(&host),
        3 => fs::rename(&host, &host_new),
        4 => fs::hard_link(&host, &host_new),
        5 => std::os::unix::fs::symlink("target", &host),
        6 => match fs::symlink_metadata(&host) {
            // The guest follows links itself.
            Ok(meta) if !meta.is_file() => Err(std::io::Error::other("not a file")),
            _ => File::options()
                .write(true)
                .open(&host)
                .and_then(|file| file.set_len(bytes.len() as u64)),
        },
        _ => match fs::symlink_metadata(&host) {
            Ok(meta) if !meta.is_file() => Err(std::io::Error::other("not a file")),
            _ => File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&host)
                .and_then(|file| file.write_all_at(&bytes, 5)),
        },
    };
    if guest.is_ok() != plain.is_ok() {
        return Err(format!(
            "operation {operation} {at}/{name} {to}/{new}: {guest:?}, on the host {plain:?}"
        ));
    }
    Ok(())
}

#[test]
fn trees_of_names_are_equal() {
    // Some of these never exist, or are files.
    let places = [".", "a", "b", "a/a", "a/b", "b/a", "b/b/c", "c"];
    let places: Vec<&str> = places.iter().map(|place| place.trim_matches('.')).collect();
    for seed in 0..8 {
        let (shared, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut driver, _) = driver(shared.path(), ShareOptions::default());
        let mut numbers = Numbers(seed);
        for number in 0..600 {
            let root = |place: &&str| !place.is_empty();
            let below: Vec<&str> = places.iter().filter(|place| root(place)).copied().collect();
            // Directories at the top come first.
            if number < 3 {
                let name = ["a", "b", "c"][number];
                let share = driver.walk("s").unwrap().node;
                driver.mkdir(share, name, 0o755).unwrap();
                fs::create_dir(plain.path().join(name)).unwrap();
                continue;
            }
            if let Err(text) = step(&mut numbers, &mut driver, plain.path(), &below) {
                panic!("seed {seed}, step {number}: {text}");
            }
        }
        assert_eq!(tree(shared.path()), tree(plain.path()), "seed {seed}");
    }
}

/// Reads, writes, truncations and holes of one file, with the guest's caches between (fsx).
fn contents(options: ShareOptions, seed: u64) {
    let (shared, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(mounted) = Mounted::new(shared.path(), options) else {
        return;
    };
    let open = |path: &Path| {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        options.open(path.join("f")).unwrap()
    };
    let mut numbers = Numbers(seed);
    let mut files = [open(plain.path()), open(&mounted.guest)];
    for number in 0..1500 {
        let at = numbers.below(200_000);
        let len = numbers.below(50_000);
        let byte = u8::try_from(number % 251).unwrap();
        match numbers.below(10) {
            0 => files.iter().for_each(|file| file.set_len(at).unwrap()),
            1 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let punched = files.each_ref().map(|file| fallocate(file, flags, at, len));
                assert_eq!(punched[0], punched[1], "seed {seed}, step {number}");
            }
            2 => {
                let none = FallocateFlags::empty();
                let grown = files.each_ref().map(|file| fallocate(file, none, at, len));
                assert_eq!(grown[0], grown[1], "seed {seed}, step {number}");
            }
            3 => files = [open(plain.path()), open(&mounted.guest)],
            4 => files.iter().for_each(|file| file.sync_data().unwrap()),
            5 | 6 => {
                let read = files.each_ref().map(|file| {
                    let mut bytes = vec![0; usize::try_from(len).unwrap()];
                    let read = file.read_at(&mut bytes, at).unwrap();
                    bytes.truncate(read);
                    bytes
                });
                assert!(read[0] == read[1], "seed {seed}, step {number}: {at} {len}");
            }
            _ => {
                let bytes = vec![byte; usize::try_from(len).unwrap()];
                files
                    .iter()
                    .for_each(|file| file.write_all_at(&bytes, at).unwrap());
            }
        }
        let sizes = files.each_ref().map(|file| file.metadata().unwrap().len());
        assert_eq!(sizes[0], sizes[1], "seed {seed}, step {number}");
    }
    drop(files);
    mounted.unmount();
    let both = [plain.path(), shared.path()].map(|path| fs::read(path.join("f")).unwrap());
    assert!(
        both[0] == both[1],
        "seed {seed}: the contents on the host differ"
    );
}

#[test]
fn contents_are_equal() {
    for seed in 0..2 {
        contents(ShareOptions::default(), seed);
    }
}

#[test]
fn contents_are_equal_with_delayed_writes() {
    for seed in 10..12 {
        contents(ShareOptions::default().cache(CacheMode::Exclusive), seed);
    }
}
