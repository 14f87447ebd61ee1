//! Verification of stored images against their digests.
//!
//! A layer's tar stream is reconstructed from its files, and its digest must be the one
//! in the image's configuration. The index is recreated from that stream and the metadata
//! image from the indexes, and both must be equal to the stored ones. All data of an
//! image that a guest can see is thus checked against the image's digest.

use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::Path;

use serde::Serialize;

use super::Store;
use super::collect::FindUsers;
use super::damaged::Damaged;
use super::files::{StoredLayer, is_absence};
use super::record::{DiskRecord, LayerRecord};
use crate::Error;
use crate::digest::{Digest, HashingReader};
use crate::layer;
use crate::skeleton::is_damage;

/// Result of verifying an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
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
    /// objects that are proven to be corrupt are removed, and are created again when the
    /// image is next requested. As in [`Self::remove`], parts of images that are in use,
    /// or that `repair` returns, stay.
    ///
    /// # Errors
    /// No image or several match, or the store cannot be read or written, in which case
    /// nothing is removed. Corruption is not an error.
    pub fn verify(&self, query: &str, repair: Option<FindUsers<'_>>) -> Result<Verified, Error> {
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
            check.original(layer)?;
        }
        if layers.len() == record.layers.len() {
            check.metadata(digest, &record, &mut layers)?;
        }
        let Check {
            mut verified,
            damaged,
            ..
        } = check;
        if let Some(users) = repair.filter(|_| !damaged.is_empty()) {
            drop(layers);
            verified.repaired = self.discard_damaged(digest, &damaged, &work, users)?;
        }
        Ok(verified)
    }
}

struct Check<'s> {
    store: &'s Store,
    verified: Verified,
    damaged: Vec<Damaged>,
}

impl Check<'_> {
    fn problem(&mut self, text: String, path: &Path) {
        self.verified.problems.push(text);
        self.damage(path);
    }

    fn damage(&mut self, path: &Path) {
        if !self.damaged.iter().any(|known| known.path() == path) {
            self.damaged.extend(Damaged::at(path));
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
        let Some(stored) = StoredLayer::open(path.clone())? else {
            self.problem(format!("layer {name} is missing or truncated"), &path);
            return Ok(None);
        };
        let rebuilt = tempfile::tempfile_in(&self.store.tmp);
        let rebuilt = rebuilt.map_err(Error::file("create a file in", &self.store.root))?;
        let found = match layer::index_again(self.store.assemble(name)?, &rebuilt) {
            Err(error) if is_damage(&error) => {
                self.problem(format!("layer {name} is damaged: {error}"), &path);
                return Ok(None);
            }
            found => found.map_err(Error::file("read", &path))?,
        };
        if found.diff_id != layer.diff_id {
            let text = format!(
                "layer {name} is damaged: its contents have diff_id {}",
                found.diff_id
            );
            self.problem(text, &path);
            return Ok(None);
        }
        // The stream is what it should be. If there is no index of it, the reason is
        // elsewhere, such as in a full disk.
        let totals = found.index?;
        self.verified.bytes += totals.tar_len;
        let index = stored.file("index")?;
        if same(&index, &rebuilt).map_err(Error::file("read", &path.join("index")))? {
            return Ok(Some(stored));
        }
        self.problem(format!("the index of layer {name} is damaged"), &path);
        Ok(None)
    }

    /// Checks the original layer, if it is stored.
    fn original(&mut self, layer: &LayerRecord) -> Result<(), Error> {
        let path = self.store.blob_path(layer.digest);
        let file = match File::open(&path) {
            Err(error) if is_absence(&error) => return Ok(()),
            opened => opened.map_err(Error::file("open", &path))?,
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
        let created = self.store.temporary()?;
        let rebuilt = super::files::create(&created.path().join("meta.erofs"))?;
        self.store
            .write_metadata(digest, record, layers, &rebuilt)?;
        let disk = self.store.disk_path(digest);
        let path = disk.join("meta.erofs");
        let stored = match File::open(&path) {
            Err(error) if is_absence(&error) => {
                self.problem("the metadata image is missing".to_owned(), &disk);
                return Ok(());
            }
            opened => opened.map_err(Error::file("open", &path))?,
        };
        if !same(&stored, &rebuilt).map_err(Error::file("read", &path))? {
            self.problem("the metadata image is damaged".to_owned(), &disk);
        }
        Ok(())
    }
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
