//! Tests of removal during running operations and with unreadable data: no data that may
//! be needed is removed, and removals do not wait for a pull.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

#[cfg(feature = "archive")]
#[path = "support/archives.rs"]
mod archives;
mod support;

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::sync::{Barrier, Mutex};
use std::thread;

use sm_image::{
    Cancel, Error, LayerStep, Progress, PruneOptions, PullOptions, Reference, Store, StoredSegment,
    Users,
};
use support::home::{Home, layers};
use support::{file, image, tar};

const ALL: PruneOptions = PruneOptions::new().all(true).compressed(true);

fn nobody() -> Result<Users, String> {
    Ok(Users::new())
}

fn parse(layout: &Path) -> Reference {
    Reference::parse(&format!("oci:{}", layout.display())).unwrap()
}

#[test]
fn removals_do_not_wait_for_a_pull_or_affect_it() {
    let home = Home::new();
    let (other, _) = home.image("other", &[tar(&[file("o", b"o")])]);
    let parts = [
        tar(&[file("a", vec![1; 100_000])]),
        tar(&[file("b", vec![2; 100_000])]),
    ];
    // The first layer belongs to an image without a name; only the pull keeps it.
    let (first, _) = home.image("first", &parts[..1]);
    image(&home.path("both"), &parts);
    let (reached, wait) = sync_channel(0);
    let (go, gone) = sync_channel::<()>(0);
    let gone = Mutex::new(gone);
    let report = |progress: Progress<'_>| {
        if let Progress::Layer {
            number: 2,
            step: LayerStep::Moving { done: 0, .. },
            ..
        } = progress
        {
            reached.send(()).unwrap();
            gone.lock().unwrap().recv().unwrap();
        }
    };
    let options = PullOptions::new()
        .report(&report)
        .max_concurrent(std::num::NonZero::<usize>::MIN);
    let both = home.path("both");
    thread::scope(|scope| {
        let pulling = scope.spawn(|| home.store.open_image(&parse(&both), &options));
        wait.recv().unwrap();
        // The pull is blocked, and continues after these operations.
        home.store.remove(&other, &nobody).unwrap();
        home.store.remove(&first, &nobody).unwrap();
        let pruned = home.store.try_prune(ALL, &nobody).unwrap();
        assert!(pruned.is_some());
        assert_eq!((home.count("disks"), home.count("layers")), (0, 1));
        home.image("meanwhile", &[tar(&[file("m", b"m")])]);
        go.send(()).unwrap();
        pulling.join().unwrap().unwrap();
    });
    let verified = home
        .store
        .verify(&parse(&home.path("both")).to_string(), None);
    assert!(verified.unwrap().problems.is_empty());
    home.store.prune(ALL, &nobody).unwrap();
    assert_eq!((home.count("disks"), home.count("layers")), (0, 0));
    assert_eq!(
        (home.count("tmp"), home.count("locks"), home.count("blobs")),
        (0, 0, 0)
    );
}

#[test]
fn users_are_determined_under_the_exclusive_lock() {
    let home = Home::new();
    let (reference, digest) = home.image("layout", &layers());
    // A shared lock represents another user of the store.
    let root = home.path("store");
    let asked = RefCell::new(0);
    let users = || {
        *asked.borrow_mut() += 1;
        let lock = fs::File::open(root.join("lock")).unwrap();
        let shared = rustix::fs::FlockOperation::NonBlockingLockShared;
        assert!(rustix::fs::flock(&lock, shared).is_err(), "it is locked");
        // A disk is opened under a shared lock on the directory.
        let disks = fs::File::open(root.join("disks")).unwrap();
        assert!(rustix::fs::flock(&disks, shared).is_err(), "it is locked");
        Ok(Users::from([(digest, vec!["snap".to_owned()])]))
    };
    let pruned = home.store.prune(ALL, &users).unwrap();
    assert!(pruned.images.is_empty(), "{pruned:?}");
    let error = home.store.remove(&reference, &users).unwrap_err();
    assert!(matches!(error, Error::Used { .. }), "{error}");
    assert!(error.to_string().contains("snap"), "{error}");
    assert_eq!(*asked.borrow(), 2);
    assert_eq!(home.count("disks"), 1);
    // An unknown set of users does not count as empty.
    let unclear = || Err("snapshot \"x\" cannot be read".to_owned());
    for error in [
        home.store.remove(&reference, &unclear).unwrap_err(),
        home.store.prune(ALL, &unclear).unwrap_err(),
        home.store.try_prune(ALL, &unclear).unwrap_err(),
    ] {
        assert!(error.to_string().contains("snapshot \"x\""), "{error}");
    }
    assert!(home.store.find(&reference).is_ok());
    home.store.remove(&reference, &nobody).unwrap();
    assert_eq!((home.count("disks"), home.count("layers")), (0, 0));
}

/// A disk is opened either before its removal, which is then refused, or not at all.
#[test]
fn no_disk_is_opened_between_its_check_and_its_removal() {
    let home = Home::new();
    let (reference, digest) = home.image("layout", &layers());
    let segment = StoredSegment {
        path: home
            .path("store/disks")
            .join(digest.hex())
            .join("meta.erofs"),
        offset: 0,
        len: 4096,
    };
    let (asked, wait) = sync_channel(0);
    thread::scope(|scope| {
        let segment = &segment;
        let opening = scope.spawn(move || {
            // The disk has been checked, and is not removed yet.
            wait.recv().unwrap();
            segment.open()
        });
        let users = || {
            asked.send(()).unwrap();
            Ok(Users::new())
        };
        home.store.remove(&reference, &users).unwrap();
        assert!(opening.join().unwrap().is_err());
    });
    assert_eq!(home.count("disks"), 0);
}

#[test]
fn objects_of_another_version_and_their_needs_are_kept() {
    let home = Home::new();
    let (old, digest) = home.image("old", &layers());
    let (new, _) = home.image("new", &[tar(&[file("n", b"n")])]);
    let record = home.path("store").join("disks").join(digest.hex());
    let record = record.join("image.json");
    let text = fs::read_to_string(&record).unwrap();
    let other_version = text.replacen("\"format\":", "\"format\":9", 1);
    assert_ne!(other_version, text);
    fs::write(&record, other_version).unwrap();
    // A VM of that version has the disk open.
    let disk = fs::File::open(record.with_file_name("meta.erofs")).unwrap();
    rustix::fs::flock(&disk, rustix::fs::FlockOperation::LockShared).unwrap();
    home.store.remove(&old, &nobody).unwrap();
    let pruned = home.store.prune(ALL, &nobody).unwrap();
    assert_eq!(pruned.images, [new]);
    assert!(pruned.notes[0].contains("another version"), "{pruned:?}");
    assert_eq!((home.count("disks"), home.count("layers")), (1, 3));
    assert!(home.count("blobs") > 0);
    drop(disk);
    home.store.prune(ALL, &nobody).unwrap();
    assert_eq!((home.count("disks"), home.count("layers")), (0, 0));

    // A name that cannot be read could be the name of any image.
    let (name, _) = home.image("named", &layers());
    let reference = fs::read_dir(home.path("store/refs")).unwrap().next();
    let reference = reference.unwrap().unwrap().path();
    let good = fs::read(&reference).unwrap();
    fs::write(&reference, b"{").unwrap();
    let pruned = home.store.prune(ALL, &nobody).unwrap();
    assert!(pruned.notes[0].contains("may be that of any"), "{pruned:?}");
    assert_eq!((home.count("disks"), home.count("layers")), (1, 2));
    fs::write(&reference, good).unwrap();
    assert!(home.store.find(&name).is_ok());
}

#[test]
fn a_pull_that_fails_does_not_cancel_its_caller() {
    let home = Home::new();
    image(&home.path("bad"), &layers());
    for blob in fs::read_dir(home.path("bad/blobs/sha256")).unwrap() {
        let path = blob.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        if !bytes.starts_with(b"{") {
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        }
    }
    image(&home.path("good"), &layers());
    let options = PullOptions::default();
    let failed = home.store.pull(&parse(&home.path("bad")), &options);
    assert!(!matches!(failed, Err(Error::Cancelled)), "{failed:?}");
    assert!(failed.is_err());
    assert!(!options.cancel.is_cancelled());
    home.store
        .pull(&parse(&home.path("good")), &options)
        .unwrap();
    // The caller's own cancellation is respected.
    let cancel = Cancel::new();
    cancel.cancel();
    let options = PullOptions::new().cancel(cancel);
    let empty = Home::new();
    let cancelled = empty.store.pull(&parse(&home.path("good")), &options);
    assert!(matches!(cancelled, Err(Error::Cancelled)), "{cancelled:?}");
}

#[test]
#[cfg(feature = "archive")]
fn an_archive_that_cannot_be_loaded_does_not_cancel_the_caller() {
    let home = Home::new();
    let (reference, _) = home.image("layout", &layers());
    let archive = fs::read(home.save(&[&reference], "saved.tar")).unwrap();
    // One byte of a compressed layer is changed.
    let gzip = |bytes: &[u8]| bytes == [0x1f, 0x8b, 8];
    let at = archive.windows(3).position(gzip).unwrap();
    let mut damaged = archive.clone();
    damaged[at + 20] ^= 1;
    let options = PullOptions::default();
    let again = Home::new();
    let failed = again.store.load(damaged.as_slice(), "damaged", &options);
    assert!(
        failed.is_err() && !matches!(failed, Err(Error::Cancelled)),
        "{failed:?}"
    );
    assert!(!options.cancel.is_cancelled());
    again
        .store
        .load(archive.as_slice(), "whole", &options)
        .unwrap();
}

#[test]
#[cfg(feature = "archive")]
fn a_save_that_fails_does_not_cancel_its_caller() {
    let home = Home::new();
    let (reference, _) = home.image("layout", &layers());
    let options = PullOptions::default();
    let save = |out: &mut dyn std::io::Write| {
        let saved = home
            .store
            .save(std::slice::from_ref(&reference), out, &options);
        assert!(!matches!(saved, Err(Error::Cancelled)), "{saved:?}");
        assert!(!options.cancel.is_cancelled());
        saved
    };
    let mut whole = Vec::new();
    save(&mut whole).unwrap();
    // The archive's disk is full.
    for room in [0, 1000, whole.len() / 2, whole.len() - 1] {
        let mut disk = vec![0; room];
        let failed = save(&mut disk.as_mut_slice());
        assert!(matches!(failed, Err(Error::Archive(_))), "{failed:?}");
    }
    // Layers that are not stored are damaged at their source.
    home.prune(PruneOptions::new().compressed(true));
    let mut good = Vec::new();
    for blob in fs::read_dir(home.path("layout/blobs/sha256")).unwrap() {
        let path = blob.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        if !bytes.starts_with(b"{") {
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            good.push((path, bytes));
        }
    }
    assert_eq!(good.len(), 2);
    assert!(save(&mut Vec::new()).is_err());
    for (path, bytes) in good {
        fs::write(path, bytes).unwrap();
    }
    let mut again = Vec::new();
    save(&mut again).unwrap();
    assert!(again == whole);
}

#[test]
fn a_name_precedes_an_id_and_short_prefixes_are_refused() {
    let home = Home::new();
    let (first, digest) = home.image("first", &layers());
    let (second, other) = home.image("second", &[tar(&[file("n", b"n")])]);
    let tag = |query: &str, name: &str| {
        let name = sm_image::DockerReference::parse(name).unwrap();
        home.store.tag(query, &name).unwrap();
    };
    let hex = digest.hex();
    for short in [
        &hex[..1],
        &hex[..3],
        "",
        "sha256:",
        &format!("sha256:{}", &hex[..3]),
    ] {
        assert!(home.store.find(short).is_err(), "{short:?}");
        assert!(home.store.remove(short, &nobody).is_err(), "{short:?}");
    }
    assert_eq!(home.store.find(&hex[..4]).unwrap().digest, digest);
    // Another image has a name that looks like a prefix of this one's ID.
    tag(&second, &hex[..8]);
    assert_eq!(home.store.find(&hex[..8]).unwrap().digest, other);
    let removed = home.store.remove(&hex[..8], &nobody).unwrap();
    assert_eq!(removed.images.len(), 1);
    assert!(home.store.find(&first).is_ok() && home.store.find(&second).is_ok());
    // The same applies to a name of the image itself: only the name is removed.
    tag(&first, &hex[..8]);
    let removed = home.store.remove(&hex[..8], &nobody).unwrap();
    assert_eq!(removed.images.len(), 1, "{removed:?}");
    assert!(home.store.find(&first).is_ok());
}

#[test]
fn concurrent_removal_and_pull_leave_complete_images() {
    let home = Home::new();
    let names = ["one", "two", "three"];
    for (number, name) in (1_u8..).zip(names) {
        let shared = tar(&[file("shared", vec![9; 50_000])]);
        let own = tar(&[file("own", vec![number; 50_000])]);
        image(&home.path(name), &[shared, own]);
    }
    let barrier = Barrier::new(names.len() + 1);
    thread::scope(|scope| {
        for name in names {
            let (home, barrier) = (&home, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for _ in 0..30 {
                    let store = Store::open(&home.path("store")).unwrap();
                    let stored =
                        store.open_image(&parse(&home.path(name)), &PullOptions::default());
                    for segment in &stored.unwrap().segments {
                        let len = segment.open().unwrap().metadata().unwrap().len();
                        assert_eq!(len, segment.len);
                    }
                }
            });
        }
        barrier.wait();
        for _ in 0..60 {
            home.store.prune(ALL, &nobody).unwrap();
        }
    });
    home.store.prune(ALL, &nobody).unwrap();
    assert_eq!((home.count("disks"), home.count("layers")), (0, 0));
    assert_eq!((home.count("tmp"), home.count("locks")), (0, 0));
}
