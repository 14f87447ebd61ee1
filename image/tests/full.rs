//! Tests with a disk that becomes full at every page and every inode that a pull needs:
//! the error says so, the store remains intact, and the pull succeeds once there is
//! space.
//!
//! Each test runs itself again under `unshare` with a small tmpfs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use sm_image::{Error, ErrorKind, PruneOptions, PullOptions, Reference, Store, Users};

use support::{dir, file, image, tar};

const OWN: &str = "SM_TEST_OWN_DISK";

const ALL: PruneOptions = PruneOptions::new().all(true).compressed(true);

const UNUSED: PruneOptions = PruneOptions::new();

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
        file.set_len(len.checked_sub(pages * 4096).unwrap())
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

fn parse(layout: &Path) -> Reference {
    Reference::parse(&format!("oci:{}", layout.display())).unwrap()
}

fn nobody() -> Result<Users, String> {
    Ok(Users::new())
}

fn is_sound(store: &Store, reference: &Reference) {
    let verified = store.verify(&reference.to_string(), None).unwrap();
    assert!(verified.problems.is_empty(), "{verified:?}");
}

/// Pulls first without free space, then with one more unit each time until it succeeds.
fn wherever_it_gets_full(disk: &Path, ballast: impl Fn(u64) -> Ballast) {
    let layouts = tempfile::tempdir().unwrap();
    let [small, large] = ["small", "large"].map(|name| layouts.path().join(name));
    image(&small, &[tar(&[file("s", b"s")])]);
    // Compressed, the layer fits long before its conversion does.
    let text = |seed: u8| {
        (0..30_000_u32)
            .map(|n| seed | n.to_le_bytes()[1] | 1)
            .collect()
    };
    let layers: Vec<Vec<u8>> = (1..=3)
        .map(|n| {
            let large: Vec<u8> = text(n << 4);
            tar(&[
                dir("d"),
                file(format!("d/{n}"), large),
                file("few", [n; 50]),
            ])
        })
        .collect();
    image(&large, &layers);
    let [small, large] = [parse(&small), parse(&large)];
    let options = PullOptions::default();

    let root = disk.join("store");
    let store = Store::open(&root).unwrap();
    store.open_image(&small, &options).unwrap();
    let (mut failed, mut layers_left) = (0, 0);
    for room in 0.. {
        let full = ballast(room);
        let pulled = store.open_image(&large, &options);
        let Err(error) = pulled else {
            drop(full);
            break;
        };
        failed += 1;
        assert_eq!(error.kind(), ErrorKind::NoSpace, "with {room}: {error:?}");
        let text = with_causes(&error);
        assert!(
            text.contains("No space left") || text.contains("has room for"),
            "with {room}: {text}"
        );
        // Other images can be used and listed.
        let store = Store::open(&root).unwrap();
        assert_eq!(store.list().unwrap().len(), 1, "with {room}");
        drop(full);
        is_sound(&store, &small);
        assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0);
        // A failed attempt leaves the layers that were complete. How many depends on the
        // order in which threads use up the space.
        let left = fs::read_dir(root.join("layers")).unwrap().count() - 1;
        if left > 0 && room % 8 != 0 {
            layers_left += left;
            let _full = ballast(0);
            store.prune(UNUSED, &nobody).unwrap();
            assert_eq!(fs::read_dir(root.join("layers")).unwrap().count(), 1);
        }
        if room % 8 == 0 {
            // A pull succeeds immediately once there is space, after any earlier attempt.
            store.open_image(&large, &options).unwrap();
            is_sound(&store, &large);
            // Removal frees space on a full disk.
            let _full = ballast(0);
            store.remove(&large.to_string(), &nobody).unwrap();
        }
    }
    assert!(failed > 10 && layers_left > 0, "{failed}, {layers_left}");
    for reference in [&small, &large] {
        is_sound(&store, reference);
    }
    let full = ballast(0);
    store.prune(ALL, &nobody).unwrap();
    drop(full);
    for part in ["layers", "disks", "blobs", "refs", "tmp", "locks"] {
        assert_eq!(fs::read_dir(root.join(part)).unwrap().count(), 0, "{part}");
    }
}

/// The size of a stream is unknown until its end: only then it can be compared with the
/// free space.
#[cfg(feature = "archive")]
#[test]
fn a_stream_that_fills_the_disk_leaves_nothing() {
    let Some(disk) = small_disk("a_stream_that_fills_the_disk_leaves_nothing", "size=4m") else {
        return;
    };
    // Hashes do not compress.
    let noise: Vec<u8> = (0..6000_u32)
        .flat_map(|n| *sm_image::Digest::of(&n.to_le_bytes()).bytes())
        .collect();
    let stream = tar(&[dir("d"), file("d/large", noise), file("small", b"s")]);
    let root = disk.join("store");
    let store = Store::open(&root).unwrap();
    let options = PullOptions::default();
    let import = || {
        let imported = store.import(&stream[..], None, sm_image::Config::default(), "", &options);
        imported.map(|image| image.digest.to_string())
    };
    let mut archive = Vec::new();
    let name = import().unwrap();
    store.save(&[name], &mut archive, &options).unwrap();
    store.prune(ALL, &nobody).unwrap();
    let load = || {
        let loaded = store.load(&archive[..], "an archive", &options);
        loaded.map(|images| images[0].digest.to_string())
    };
    for (number, bring) in [&import as &dyn Fn() -> Result<String, Error>, &load]
        .into_iter()
        .enumerate()
    {
        let mut failed = 0;
        for pages in (0..).step_by(5) {
            let full = Ballast::but_pages(&disk, pages);
            let brought = bring();
            drop(full);
            let count = |part| fs::read_dir(root.join(part)).unwrap().count();
            assert_eq!(count("tmp"), 0, "{number}: {pages}");
            assert_eq!(
                count("refs"),
                usize::from(brought.is_ok()),
                "{number}: {pages}"
            );
            // Like complete layers, a complete disk without a name stays until a prune.
            assert!(count("disks") <= 1, "{number}: {pages}");
            let Err(error) = brought else {
                break;
            };
            failed += 1;
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{number}: {error:?}");
            let text = with_causes(&error);
            assert!(
                text.contains("No space left") || text.contains("has room for"),
                "{number}: {text}"
            );
            if failed % 8 == 0 {
                // There is room, and the stream arrives again.
                let name = bring().unwrap();
                let verified = store.verify(&name, None).unwrap();
                assert!(verified.problems.is_empty(), "{number}: {verified:?}");
                store.remove(&name, &nobody).unwrap();
            }
        }
        assert!(failed > 10, "{number}: {failed}");
        store.prune(ALL, &nobody).unwrap();
        for part in ["layers", "disks", "blobs", "refs", "tmp", "locks"] {
            assert_eq!(fs::read_dir(root.join(part)).unwrap().count(), 0, "{part}");
        }
    }
}

#[test]
fn a_full_disk_is_no_damage() {
    let Some(disk) = small_disk("a_full_disk_is_no_damage", "size=8m") else {
        return;
    };
    let layouts = tempfile::tempdir().unwrap();
    let layout = layouts.path().join("layout");
    // The index takes several pages.
    let files = (0..300).map(|n| file(format!("a-file-with-a-rather-long-name-{n}"), b"x"));
    image(&layout, &[tar(&files.collect::<Vec<_>>())]);
    let reference = parse(&layout);
    let store = Store::open(&disk.join("store")).unwrap();
    store
        .open_image(&reference, &PullOptions::default())
        .unwrap();
    let mut failed = 0;
    for pages in 0.. {
        let full = Ballast::but_pages(&disk, pages);
        let verified = store.verify(&reference.to_string(), Some(&nobody));
        drop(full);
        is_sound(&store, &reference);
        match verified {
            Ok(verified) => {
                assert!(verified.problems.is_empty(), "{pages}: {verified:?}");
                break;
            }
            Err(error) => {
                let text = with_causes(&error);
                assert!(text.contains("No space left"), "{pages}: {text}");
                failed += 1;
            }
        }
    }
    assert!(failed > 5, "{failed}");
}

#[test]
fn the_store_is_intact_when_the_disk_is_full() {
    let name = "the_store_is_intact_when_the_disk_is_full";
    if let Some(disk) = small_disk(name, "size=2m") {
        wherever_it_gets_full(&disk, |pages| Ballast::but_pages(&disk, pages));
    }
}

#[test]
fn the_store_is_intact_when_inodes_run_out() {
    let name = "the_store_is_intact_when_inodes_run_out";
    if let Some(disk) = small_disk(name, "size=4m,nr_inodes=200") {
        wherever_it_gets_full(&disk, |inodes| Ballast::but_inodes(&disk, inodes));
    }
}
