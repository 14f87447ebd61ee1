//! Tests of detection and repair of corruption in the store.
//!
//! This is a separate program, because a child process that another test starts briefly
//! holds its parent's locks, and objects in use are not repaired.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use sm_image::{FindUsers, StoredSegment, Users};
use support::home::{Home, layers};

fn nobody() -> Result<Users, String> {
    Ok(Users::new())
}

/// Returns files of the store with the words of the message about their corruption.
fn damageable(home: &Home) -> Vec<(PathBuf, &'static str)> {
    let store = home.path("store");
    let mut found = Vec::new();
    for layer in fs::read_dir(store.join("layers")).unwrap() {
        for file in ["blob", "small", "index", "skeleton"] {
            let path = layer.as_ref().unwrap().path().join(file);
            if path.metadata().unwrap().len() > 0 {
                found.push((path, "layer"));
            }
        }
    }
    for disk in fs::read_dir(store.join("disks")).unwrap() {
        found.push((disk.unwrap().path().join("meta.erofs"), "metadata image"));
    }
    for blob in fs::read_dir(store.join("blobs")).unwrap() {
        found.push((blob.unwrap().path(), "missing or damaged"));
    }
    found
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn any_damage_is_found_and_can_be_repaired() {
    let home = Home::new();
    let (reference, _) = home.image("layout", &layers());
    let sound = home.store.verify(&reference, None).unwrap();
    assert!(sound.problems.is_empty(), "{sound:?}");
    assert!(sound.bytes > 55_000);
    let files = damageable(&home);
    assert!(files.len() >= 10, "{files:?}");
    for (path, what) in files {
        let len = path.metadata().unwrap().len();
        // Guests do not see most of the last block of a blob.
        let places = match path.ends_with("blob") {
            true => [0, len / 2, 4096],
            false => [0, len / 2, len - 1],
        };
        for at in places.into_iter().filter(|at| *at < len) {
            flip(&path, at);
            let found = home.store.verify(&reference, None).unwrap();
            assert!(
                found.problems.iter().any(|text| text.contains(what)),
                "{path:?} at {at}: {found:?}"
            );
            assert!(!found.repaired);
            flip(&path, at);
        }
        flip(&path, 0);
        let repaired = home.store.verify(&reference, Some(&nobody)).unwrap();
        assert!(repaired.repaired, "{path:?}: {repaired:?}");
        assert!(!path.exists());
        home.open(&reference);
        let again = home.store.verify(&reference, None).unwrap();
        assert!(again.problems.is_empty(), "{path:?}: {again:?}");
    }
}

/// Repair removes no part of an image that must stay, as removal does not.
#[test]
fn damage_of_images_that_must_stay_is_not_removed() {
    let home = Home::new();
    let (reference, digest) = home.image("layout", &layers());
    // Another image has the damaged layer, too.
    let (_, sharing) = home.image("sharing", &layers()[..1]);
    let shared = home.store.inspect(&sharing.to_string()).unwrap().layers[0].diff_id;
    let layer = home.path("store/layers").join(shared.hex());
    flip(&layer.join("blob"), 0);
    let repair = |users: FindUsers<'_>| home.store.verify(&reference, Some(users));
    for used in [digest, sharing] {
        let users = || Ok(Users::from([(used, vec!["snapshot".to_owned()])]));
        let verified = repair(&users).unwrap();
        assert!(!verified.problems.is_empty() && !verified.repaired);
        assert!(layer.exists(), "{verified:?}");
    }
    let unknown = || Err("snapshot \"x\" cannot be read".to_owned());
    let error = repair(&unknown).unwrap_err().to_string();
    assert!(error.contains("snapshot \"x\""), "{error}");
    assert!(layer.exists());
    for name in [digest, sharing] {
        let disk = home.path("store/disks").join(name.hex());
        let open = StoredSegment {
            path: disk.join("meta.erofs"),
            offset: 0,
            len: 4096,
        };
        let open = open.open().unwrap();
        assert!(!repair(&nobody).unwrap().repaired);
        assert!(layer.exists());
        drop(open);
    }
    // A disk of another version may need any layer.
    let record = home.path("store/disks").join(sharing.hex());
    let record = record.join("image.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replacen("\"format\":", "\"format\":9", 1)).unwrap();
    assert!(!repair(&nobody).unwrap().repaired);
    fs::write(&record, text).unwrap();
    assert!(repair(&nobody).unwrap().repaired);
    assert!(!layer.exists());
    home.open(&reference);
    assert!(repair(&nobody).unwrap().problems.is_empty());
}
