//! Tests of the work that a removal takes.

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
