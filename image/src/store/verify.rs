//! Verification of stored images against their digests.
//!
//! A layer's tar stream is reconstructed from its files, and its digest must be the one
//! in the image's configuration. The index is recreated from that stream and the metadata
//! image from the indexes, and both must be equal to the stored ones. All data of an
//! image that a guest can see is thus checked against the image's digest.

use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::Serialize;

use super::Store;
use super::files::StoredLayer;
use super::record::{DiskRecord, LayerRecord};
use crate::Error;
use crate::digest::{Digest, HashingReader};
use crate::layer;

/// Result of verifying an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Number of bytes of tar streams that were reconstructed and hashed.
    pub bytes: u64,
    /// Problems that were found, as sentences; empty if the image is intact.
    pub problems: Vec<String>,
    /// Corrupt objects have been removed.
    pub repaired: bool,
}

impl Store {
    /// Verifies an image completely; see the module's documentation. With `repair`,
    /// corrupt objects that are not in use are removed, and are created again when the
    /// image is next requested.
    ///
    /// # Errors
    /// No image or several match, or the store cannot be read. Corruption is not an
    /// error.
    pub fn verify(&self, query: &str, repair: bool) -> Result<Verified, Error> {
        let work = self.begin()?;
        let (found, record) = work.needed_image(query)?;
        let digest = found.digest;
        let mut check = Check {
            store: &work.store,
            verified: Verified::default(),
            damaged: Vec::new(),
        };
        check.documents(digest, &record)?;
        let mut layers = Vec::new();
        for layer in &record.layers {
            layers.extend(check.layer(layer)?);
            check.kept(layer)?;
        }
        if layers.len() == record.layers.len() {
            check.metadata(digest, &record, &mut layers)?;
        }
        let Check {
            mut verified,
            damaged,
            ..
        } = check;
        if repair && !damaged.is_empty() {
            let _alone = self.lock(FlockOperation::LockExclusive)?;
            let needed = self.needed_by_work(Some(&work))?;
            let disk = self.disk_path(digest);
            let in_use = super::files::in_use(&disk) || needed.contains(&disk);
            if !in_use && !damaged.iter().any(|(path, _)| needed.contains(path)) {
                // An object that was created again in the meantime is not the one that
                // was checked.
                for (path, _) in damaged.iter().filter(|(path, id)| id_of(path) == *id) {
                    if path.exists() {
                        self.discard(path)?;
                    }
                }
                verified.repaired = true;
            }
        }
        Ok(verified)
    }
}

struct Check<'s> {
    store: &'s Store,
    verified: Verified,
    /// Objects to be removed, with their inode numbers.
    damaged: Vec<(PathBuf, Option<u64>)>,
}

impl Check<'_> {
    fn problem(&mut self, text: String, path: &Path) {
        self.verified.problems.push(text);
        if path.exists() {
            self.damage(path);
        }
    }

    fn damage(&mut self, path: &Path) {
        if !self.damaged.iter().any(|(known, _)| known == path) {
            self.damaged.push((path.to_owned(), id_of(path)));
        }
    }

    fn documents(&mut self, image: Digest, record: &DiskRecord) -> Result<(), Error> {
        let manifest = record.manifest_type.is_some().then_some(image);
        for (what, digest) in [
            ("manifest", manifest),
            ("configuration", Some(record.config_digest)),
        ] {
            if let Some(digest) = digest
                && self.store.document(digest)?.is_none()
            {
                let path = self.store.blob_path(digest);
                self.problem(format!("the {what} {digest} is missing or damaged"), &path);
                // The document is restored together with the image.
                self.damage(&self.store.disk_path(image));
            }
        }
        Ok(())
    }

    /// Checks a layer and returns it, if it is intact.
    fn layer(&mut self, layer: &LayerRecord) -> Result<Option<StoredLayer>, Error> {
        let path = self.store.layer_path(layer.diff_id);
        let name = layer.diff_id;
        let Some(stored) = StoredLayer::open(path.clone()) else {
            self.problem(format!("layer {name} is missing or truncated"), &path);
            return Ok(None);
        };
        let again = tempfile::tempfile_in(&self.store.tmp);
        let again = again.map_err(Error::file("create a file in", &self.store.root))?;
        let found = layer::index_again(self.store.assemble(name)?, &again);
        match found {
            Err(error) => self.problem(format!("layer {name} is damaged: {error}"), &path),
            Ok(found) if found.diff_id != layer.diff_id => self.problem(
                format!(
                    "layer {name} is damaged: its contents have diff_id {}",
                    found.diff_id
                ),
                &path,
            ),
            Ok(found) => {
                self.verified.bytes += found.totals.tar_len;
                let index = stored.file("index")?;
                let path_of_index = path.join("index");
                if !same(&index, &again).map_err(Error::file("read", &path_of_index))? {
                    self.problem(format!("the index of layer {name} is damaged"), &path);
                } else {
                    return Ok(Some(stored));
                }
            }
        }
        Ok(None)
    }

    /// Checks the original layer, if it is stored.
    fn kept(&mut self, layer: &LayerRecord) -> Result<(), Error> {
        let path = self.store.blob_path(layer.digest);
        let Ok(file) = File::open(&path) else {
            return Ok(());
        };
        let mut stream = HashingReader::new(file, std::rc::Rc::default());
        stream.drain().map_err(Error::file("read", &path))?;
        let (found, _) = stream.finish();
        if found != layer.digest {
            let text = format!("the original of layer {} is damaged", layer.digest);
            self.problem(text, &path);
        }
        Ok(())
    }

    fn metadata(
        &mut self,
        digest: Digest,
        record: &DiskRecord,
        layers: &mut [StoredLayer],
    ) -> Result<(), Error> {
        let made = self.store.temporary()?;
        let again = super::files::create(&made.path().join("meta.erofs"))?;
        self.store.write_metadata(digest, record, layers, &again)?;
        let disk = self.store.disk_path(digest);
        let path = disk.join("meta.erofs");
        let stored = File::open(&path).map_err(Error::file("open", &path))?;
        if !same(&stored, &again).map_err(Error::file("read", &path))? {
            self.problem("the metadata image is damaged".to_owned(), &disk);
        }
        Ok(())
    }
}

fn id_of(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    path.metadata().ok().map(|meta| meta.ino())
}

/// Returns true if two files have the same contents.
fn same(a: &File, b: &File) -> io::Result<bool> {
    use std::io::Seek as _;
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let rewound = |mut file: &File| -> io::Result<()> { file.rewind() };
    rewound(a)?;
    rewound(b)?;
    let (mut a, mut b) = (BufReader::new(a), BufReader::new(b));
    let (mut ours, mut theirs) = ([0; 16 << 10], [0; 16 << 10]);
    loop {
        let count = a.read(&mut ours)?;
        let Some(theirs) = theirs.get_mut(..count).filter(|part| !part.is_empty()) else {
            return Ok(true);
        };
        b.read_exact(theirs)?;
        if ours.get(..count) != Some(&*theirs) {
            return Ok(false);
        }
    }
}
