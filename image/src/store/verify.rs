//! Checking that what is in the store is what it was made from.
//!
//! A layer's tar stream is put together again from its files and must have the
//! digest that the image's configuration gives it; the index is made again from
//! that stream, and the metadata image from the indexes, and must be the same. So
//! whatever a guest can see of an image is checked against the image's digest.

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

/// What came of checking an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Bytes of tar streams that were put together and hashed.
    pub bytes: u64,
    /// What is wrong, in sentences; nothing if all is well.
    pub problems: Vec<String>,
    /// What was wrong has been removed.
    pub repaired: bool,
}

impl Store {
    /// Checks all of an image; see the module's documentation. With `repair`, what
    /// is damaged and not in use is removed, so that it is made again when the image
    /// is wanted again.
    ///
    /// # Errors
    /// None or several match, or the store cannot be read. Damage is no error.
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
                // What has been made again meanwhile is not what was checked.
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
    /// What is to be removed, and which file or directory that is.
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
                // It comes again with the image.
                self.damage(&self.store.disk_path(image));
            }
        }
        Ok(())
    }

    /// The layer, if it is there and whole.
    fn layer(&mut self, layer: &LayerRecord) -> Result<Option<StoredLayer>, Error> {
        let path = self.store.layer_path(layer.diff_id);
        let name = layer.diff_id;
        let Some(stored) = StoredLayer::open(path.clone()) else {
            self.problem(format!("layer {name} is missing or cut short"), &path);
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

    /// The layer as it came, if it is kept.
    fn kept(&mut self, layer: &LayerRecord) -> Result<(), Error> {
        let path = self.store.blob_path(layer.digest);
        let Ok(file) = File::open(&path) else {
            return Ok(());
        };
        let mut stream = HashingReader::new(file, std::rc::Rc::default());
        stream.drain().map_err(Error::file("read", &path))?;
        let (found, _) = stream.finish();
        if found != layer.digest {
            let text = format!("layer {}, as it came, is damaged", layer.digest);
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

/// Whether two files have the same contents.
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
