//! Tests of the work that searches and removals take, and of what they leave.

use super::super::FORMAT;
use super::super::files::READS;
use super::super::record::LayerRecord;
use super::*;
use crate::config::ImageConfig;
use crate::platform::Platform;
use crate::source::Origin;

/// Creates a store of images, each with a layer of its own and one that all share.
fn store(images: u32) -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    for number in 0..images {
        let digest = |of: &str| Digest::of(format!("{of} {number}").as_bytes());
        let (image, config) = (digest("image"), digest("config"));
        let layers = [digest("layer"), Digest::of(b"shared")].map(|diff_id| LayerRecord {
            diff_id,
            blob_len: 1,
            digest: diff_id,
            size: None,
            media_type: None,
        });
        for layer in &layers {
            let path = store.layer_path(layer.diff_id);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("blob"), b"x").unwrap();
        }
        fs::write(store.blob_path(config), b"x").unwrap();
        let record = DiskRecord {
            format: FORMAT,
            config: ImageConfig::new(Platform::host().parts(), &[]),
            config_digest: config,
            manifest_type: None,
            meta_len: 1,
            layers: layers.into(),
            origin: Some(Origin {
                registry: "registry".to_owned(),
                repository: "repository".to_owned(),
                base: None,
            }),
            reference: "reference".to_owned(),
        };
        let disk = store.disk_path(image);
        fs::create_dir(&disk).unwrap();
        fs::write(disk.join("meta.erofs"), b"x").unwrap();
        fs::write(
            disk.join("image.json"),
            serde_json::to_vec(&record).unwrap(),
        )
        .unwrap();
        let name = ImageSummary {
            reference: format!("name{number}"),
            digest: image,
            named: image,
            size: 1,
            stored_ns: 0,
        };
        let path = store.ref_path(&name.reference);
        fs::write(path, serde_json::to_vec(&name).unwrap()).unwrap();
    }
    (directory, store)
}

/// Returns the number of directory entries and documents read for the removal of all
/// images of a store, and the number of calls to determine users.
fn work(images: u32, options: PruneOptions) -> (usize, usize) {
    let (_directory, store) = store(images);
    let asked = std::cell::Cell::new(0);
    let users = || {
        asked.set(asked.get() + 1);
        Ok(Users::new())
    };
    let before = READS.get();
    let pruned = store.prune(options, &users).unwrap();
    let reads = READS.get() - before;
    assert_eq!(pruned.images.len(), usize::try_from(images).unwrap());
    for part in ["refs", "disks", "layers", "blobs"] {
        let left = fs::read_dir(store.root.join(part)).unwrap().count();
        assert_eq!(left, 0, "{part}");
    }
    (reads, asked.get())
}

#[test]
fn the_work_of_a_removal_is_proportional_to_the_number_of_images() {
    let all = PruneOptions {
        all: true,
        compressed: true,
        max_bytes: None,
    };
    let shrink = PruneOptions {
        max_bytes: Some(0),
        ..PruneOptions::default()
    };
    for options in [all, shrink] {
        let (few, asked) = work(20, options);
        assert_eq!(asked, 1);
        let (many, asked) = work(80, options);
        assert_eq!(asked, 1);
        assert!(few > 20 && many <= 4 * few, "{options:?}: {few}, {many}");
    }
}

/// Puts something at `path` that the process cannot read as a file, whatever its rights.
fn obstruct(path: &std::path::Path, with: &str) {
    let _ = fs::remove_file(path);
    match with {
        "directory" => fs::create_dir(path).unwrap(),
        "text" => fs::write(path, b"no record").unwrap(),
        "loop" => std::os::unix::fs::symlink(path, path).unwrap(),
        "dangling" => std::os::unix::fs::symlink("nothing", path).unwrap(),
        _ => panic!("{with}"),
    }
}

/// Returns the numbers of disks, layers, blobs and other names than `but`.
fn counts(store: &Store, but: &std::path::Path) -> [usize; 4] {
    ["disks", "layers", "blobs", "refs"].map(|part| {
        let entries = fs::read_dir(store.root.join(part)).unwrap();
        entries
            .filter(|e| e.as_ref().unwrap().path() != but)
            .count()
    })
}

#[test]
fn nothing_is_removed_while_a_name_or_record_cannot_be_read() {
    use std::os::unix::ffi::OsStrExt as _;

    let all = PruneOptions {
        all: true,
        compressed: true,
        max_bytes: Some(0),
    };
    let users = || Ok(Users::new());
    let disk = Digest::of(b"image 1").hex();
    let odd = std::ffi::OsStr::from_bytes(b"\xff.json");
    let name = |name: &str| std::path::Path::new("refs").join(name);
    let record = std::path::Path::new("disks").join(disk).join("image.json");
    for (path, with, is_error) in [
        (name("other.json"), "directory", true),
        (name("other.json"), "loop", true),
        (name("other.json"), "dangling", false),
        (name("other.json"), "text", false),
        (std::path::Path::new("refs").join(odd), "loop", true),
        (std::path::Path::new("refs").join(odd), "text", false),
        (record.clone(), "directory", true),
        (record, "loop", true),
    ] {
        let (_directory, store) = store(3);
        let path = store.root.join(path);
        let before = fs::read(&path).ok();
        obstruct(&path, with);
        let pruned = store.prune(all, &users);
        assert_eq!(pruned.is_err(), is_error, "{path:?}: {with}");
        if let Ok(pruned) = pruned {
            assert!(pruned.images.is_empty(), "{pruned:?}");
            let note = pruned.notes.concat();
            assert!(note.contains("all images are kept"), "{note}");
        }
        let left = counts(&store, &path);
        assert_eq!(left, [3, 4, 3, 3], "{path:?}: {with}");
        match path.is_dir() {
            true => fs::remove_dir(&path).unwrap(),
            false => fs::remove_file(&path).unwrap(),
        }
        if let Some(before) = before {
            fs::write(&path, before).unwrap();
        }
        store.prune(all, &users).unwrap();
        assert_eq!(counts(&store, &path), [0; 4], "{path:?}: {with}");
    }
}

/// A process may have such a disk open.
#[test]
fn a_disk_whose_metadata_cannot_be_opened_stays() {
    let (_directory, store) = store(3);
    let digest = Digest::of(b"image 1");
    let meta = store.disk_path(digest).join("meta.erofs");
    obstruct(&meta, "loop");
    assert!(lock_disk(&store.disk_path(digest)).is_none());
    let all = PruneOptions::new().all(true).max_bytes(0);
    let pruned = store.prune(all, &|| Ok(Users::new())).unwrap();
    assert_eq!(pruned.images, ["name0", "name2"]);
    // Its own layer, and the one that it shared.
    assert_eq!(counts(&store, &meta), [1, 2, 1, 1]);
    // Without this file it cannot be open.
    fs::remove_file(&meta).unwrap();
    store.prune(all, &|| Ok(Users::new())).unwrap();
    assert_eq!(counts(&store, &meta), [0; 4]);
}

/// Returns the number of directory entries and documents read by `search`.
fn searched(images: u32, search: impl Fn(&Store)) -> usize {
    let (_directory, store) = store(images);
    let before = READS.get();
    search(&store);
    READS.get() - before
}

#[test]
fn the_work_of_a_search_is_at_most_proportional_to_the_number_of_images() {
    let id = Digest::of(b"image 3").to_string();
    let by_name = |store: &Store| drop(store.find("name3").unwrap());
    let by_id = |store: &Store| assert_eq!(store.find(&id).unwrap().reference, "name3");
    let usage = |store: &Store| assert!(store.usage().unwrap().images.len() > 9);
    // A name has a file of its own.
    assert_eq!(searched(10, by_name), 1);
    assert_eq!(searched(20, by_name), 1);
    for search in [&by_id as &dyn Fn(&Store), &usage] {
        let (few, many) = (searched(10, search), searched(20, search));
        assert!(few > 10 && 2 * many < 5 * few, "{few}, {many}");
    }
}
