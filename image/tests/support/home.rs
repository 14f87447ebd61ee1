//! A store in a temporary directory, and images in it.

use std::fs;
use std::path::PathBuf;

use sm_image::{Digest, PruneOptions, PullOptions, Reference, Store, Users};

use super::{dir, file, image, symlink, tar};

/// A store, and layouts beside it.
pub(crate) struct Home {
    directory: tempfile::TempDir,
    pub(crate) store: Store,
}

impl Home {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        Self { directory, store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Creates an image, imports it into the store, and returns its reference and ID.
    pub(crate) fn image(&self, name: &str, layers: &[Vec<u8>]) -> (String, Digest) {
        let layout = self.path(name);
        let digest = image(&layout, layers);
        let reference = format!("oci:{}", layout.display());
        self.open(&reference);
        (reference, digest)
    }

    pub(crate) fn open(&self, reference: &str) -> Digest {
        let parsed = Reference::parse(reference).unwrap();
        let options = PullOptions::default();
        self.store.open_image(&parsed, &options).unwrap().digest
    }

    pub(crate) fn count(&self, part: &str) -> usize {
        fs::read_dir(self.path("store").join(part)).unwrap().count()
    }

    pub(crate) fn prune(&self, options: PruneOptions) -> sm_image::Pruned {
        self.store.prune(options, &|| Ok(Users::new())).unwrap()
    }
}

/// Returns two layers with all kinds of entries.
pub(crate) fn layers() -> [Vec<u8>; 2] {
    [
        tar(&[
            dir("d"),
            file("d/large", vec![1; 50_000]),
            file("d/small", b"small"),
            file("attributes", b"x").pax("SCHILY.xattr.user.a", b"value"),
            symlink("link", "d/large"),
        ]),
        tar(&[file("top", vec![2; 5000])]),
    ]
}
