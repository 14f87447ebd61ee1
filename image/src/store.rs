//! The content store: converted layers and disks, shared by all images.
//!
//! ```text
//! lock                    shared by whoever adds, exclusive for whoever removes
//! locks/                  one for each thing that is being made
//! tmp/                    what is being made
//! layers/<diff_id>/       blob, index
//! disks/<image digest>/   meta.erofs, image.json
//! refs/<hash>.json        names of images
//! ```
//!
//! Invariant: what has its final name is complete and on disk. It is made under
//! `tmp`, synced, and renamed. Two processes never make the same thing: the
//! second one waits and finds it made.
//!
//! Disks in use are not removed: whoever uses one holds a shared `flock` on its
//! `meta.erofs` ([`DiskSegment::open`]).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::image::ImageConfiguration;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::cancel::Cancel;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::documents;
use crate::erofs;
use crate::layer::{self, Expected, LayerIndex};
use crate::limits::Limits;
use crate::platform::Platform;
use crate::reference::Reference;
use crate::source::{self, Session, Source, SourceImage, SourceLayer};
use crate::tree::Tree;

/// Version of everything the store writes; other versions are made again.
const FORMAT: u32 = 2;
/// Fewest digits that are taken for the beginning of an ID.
const SHORTEST_ID: usize = 6;

/// A part of a disk: bytes of one file, in disk order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSegment {
    /// The file.
    pub path: PathBuf,
    /// First byte.
    pub offset: u64,
    /// Length in bytes; a multiple of 4096.
    pub len: u64,
}

impl DiskSegment {
    /// Opens the file for reading. The store removes neither it nor any other
    /// part of its disk while the first segment is open in this way, in any
    /// process.
    ///
    /// # Errors
    /// The file cannot be opened or locked.
    pub fn open(&self) -> Result<File, Error> {
        let file = File::open(&self.path).map_err(Error::file("open", &self.path))?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockShared))
            .map_err(|errno| Error::file("lock", &self.path)(errno.into()))?;
        Ok(file)
    }
}

/// An image in the store. It is not removed from there while this lives.
#[derive(Clone, Debug)]
pub struct StoredImage {
    /// Digest of its manifest (of its configuration, for a Docker archive).
    pub digest: Digest,
    /// Its configuration.
    pub config: ImageConfiguration,
    /// Its root disk: an EROFS file system over these, one after another.
    pub segments: Vec<DiskSegment>,
    /// Keeps the disk in the store.
    _in_use: Arc<File>,
}

impl StoredImage {
    /// What its programs run on.
    #[must_use]
    pub fn platform(&self) -> Platform {
        Platform::of(&self.config)
    }
}

/// A name in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// The reference.
    pub reference: String,
    /// Digest of the image.
    #[serde(rename = "id")]
    pub digest: Digest,
    /// Bytes of its file contents and metadata, shared layers included.
    pub size: u64,
    /// When it was stored, in nanoseconds since the Unix epoch.
    pub stored_ns: u64,
}

/// Progress of bringing an image into the store.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What is being done, to what.
    pub what: &'a str,
    /// Bytes done.
    pub done: u64,
    /// Bytes to do, when known.
    pub total: Option<u64>,
}

/// `image.json` of a disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct DiskRecord {
    format: u32,
    config: ImageConfiguration,
    meta_len: u64,
    layers: Vec<LayerRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct LayerRecord {
    diff_id: Digest,
    blob_len: u64,
}

/// The store of one user.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
    platform: Option<Platform>,
}

impl Store {
    /// Opens the store at `root`, making it if there is none.
    ///
    /// # Errors
    /// Its directories cannot be made.
    pub fn open(root: &Path) -> Result<Self, Error> {
        for name in ["locks", "tmp", "layers", "disks", "refs"] {
            let path = root.join(name);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(Error::file("create directory", &path))?;
        }
        Ok(Self {
            root: root.to_owned(),
            limits: Limits::default(),
            platform: None,
        })
    }

    /// The same store, with other limits for what it takes in.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The same store, finding images for `platform` only: one of the same name
    /// for another counts as absent. Without this, images for guests of this host
    /// are chosen where there is a choice.
    #[must_use]
    pub fn with_platform(mut self, platform: Option<Platform>) -> Self {
        self.platform = platform;
        self
    }

    /// Finds an image where its reference says, converting into the store what
    /// is not there yet. A registry is asked for what the store does not have
    /// under its name only.
    ///
    /// # Errors
    /// See [`Error`]. The store is as it was, but for layers that are complete.
    pub fn open_image(
        &self,
        reference: &Reference,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<StoredImage, Error> {
        if let Reference::Docker(name) = reference
            && let Some(stored) = self.at_hand(name)?
        {
            return Ok(stored);
        }
        self.pull(reference, progress)
    }

    /// Whether [`Self::open_image`] would find the image in the store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn has(&self, reference: &Reference) -> Result<bool, Error> {
        if let Reference::Docker(name) = reference {
            return Ok(self.at_hand(name)?.is_some());
        }
        match self.find(&absolute(reference)) {
            Ok(_) => Ok(true),
            Err(Error::Unknown { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What a name without a transport means in the store: that name, or the
    /// beginning of an ID.
    fn at_hand(&self, name: &DockerReference) -> Result<Option<StoredImage>, Error> {
        let _in_use = self.lock(FlockOperation::LockShared)?;
        let text = name.to_string();
        let bare = text.strip_suffix(":latest").unwrap_or(&text);
        let is_id = bare.len() >= SHORTEST_ID && bare.bytes().all(|b| b.is_ascii_hexdigit());
        for query in [Some(&*text), is_id.then_some(bare)].into_iter().flatten() {
            match self.find(query) {
                Ok(found) => {
                    let stored = self.load(found.digest)?;
                    return Ok(stored.filter(|stored| self.serves(stored)));
                }
                Err(Error::Unknown { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Whether an image is for the platform that is wanted.
    fn serves(&self, stored: &StoredImage) -> bool {
        let wanted = self.platform.as_ref();
        wanted.is_none_or(|wanted| wanted.accepts(&stored.platform()))
    }

    /// Like [`Self::open_image`], and asks a registry even for what the store has.
    ///
    /// # Errors
    /// Likewise.
    pub fn pull(
        &self,
        reference: &Reference,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<StoredImage, Error> {
        let cancel = Cancel::new();
        let scratch = self.root.join("tmp");
        let session = Session {
            scratch: &scratch,
            cancel: &cancel,
            notice: &|_| {},
        };
        let Some(source) = source::open(reference, session)? else {
            let _in_use = self.lock(FlockOperation::LockShared)?;
            let named = self.find(&reference.to_string())?;
            let stored = self.load(named.digest)?.ok_or_else(|| Error::Unknown {
                reference: reference.to_string(),
                reason: "its disk is missing from the store".to_owned(),
            })?;
            documents::check_platform(&stored.config, self.platform.as_ref())?;
            return Ok(stored);
        };
        let image = source.image(self.platform.as_ref())?;
        let _in_use = self.lock(FlockOperation::LockShared)?;
        let stored = match self.load(image.digest)? {
            Some(stored) => stored,
            None => {
                let _making = self.making("disk", image.digest)?;
                match self.load(image.digest)? {
                    Some(stored) => stored,
                    None => self.convert(&*source, &image, progress)?,
                }
            }
        };
        self.name(reference, &stored)?;
        Ok(stored)
    }

    /// All names, sorted.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, Error> {
        let mut found = Vec::new();
        for path in entries(&self.root.join("refs"))? {
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                found.extend(read_json::<ImageSummary>(&path)?);
            }
        }
        found.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(found)
    }

    /// The image of this name, or of the digest that begins like this.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, query: &str) -> Result<ImageSummary, Error> {
        let all = self.list()?;
        if let Some(named) = all.iter().find(|image| image.reference == query) {
            return Ok(named.clone());
        }
        let digits = query.strip_prefix("sha256:").unwrap_or(query);
        let mut matching = all
            .into_iter()
            .filter(|image| !digits.is_empty() && image.digest.hex().starts_with(digits));
        let first = matching.next().ok_or_else(|| Error::Unknown {
            reference: query.to_owned(),
            reason: "there is none of this name in the store; give its source, \
                     such as oci:DIR[:TAG]"
                .to_owned(),
        })?;
        match matching.all(|other| other.digest == first.digest) {
            true => Ok(first),
            false => Err(Error::Ambiguous(query.to_owned())),
        }
    }

    /// Removes an image: its name, or all names of the digest that begins like
    /// this, and what no other image needs.
    ///
    /// # Errors
    /// None or several match, or files cannot be removed.
    pub fn remove(&self, query: &str) -> Result<(), Error> {
        let _alone = self.lock(FlockOperation::LockExclusive)?;
        let found = self.find(query)?;
        let by_name = found.reference == query;
        for image in self.list()? {
            let meant = match by_name {
                true => image.reference == query,
                false => image.digest == found.digest,
            };
            if meant {
                let path = self.ref_path(&image.reference);
                fs::remove_file(&path).map_err(Error::file("remove", &path))?;
            }
        }
        self.collect()
    }

    /// Removes what no name leads to. The caller holds the lock exclusively.
    fn collect(&self) -> Result<(), Error> {
        let wanted: Vec<String> = self.list()?.iter().map(|i| i.digest.hex()).collect();
        let mut layers = Vec::new();
        for path in entries(&self.root.join("disks"))? {
            let name = path.file_name().and_then(|name| name.to_str());
            let named = name.is_some_and(|name| wanted.iter().any(|wanted| wanted == name));
            if named || in_use(&path) {
                if let Some(record) = read_json::<DiskRecord>(&path.join("image.json"))? {
                    layers.extend(record.layers.iter().map(|layer| layer.diff_id.hex()));
                }
            } else {
                self.discard(&path)?;
            }
        }
        for path in entries(&self.root.join("layers"))? {
            let name = path.file_name().and_then(|name| name.to_str());
            if !name.is_some_and(|name| layers.iter().any(|layer| layer == name)) {
                self.discard(&path)?;
            }
        }
        // Nobody makes anything while the store is locked.
        for path in entries(&self.root.join("locks"))? {
            fs::remove_file(&path).map_err(Error::file("remove", &path))?;
        }
        self.clear_tmp()
    }

    /// Waits for whoever else makes the same thing, and keeps others waiting.
    /// The caller holds the store's lock.
    fn making(&self, what: &str, digest: Digest) -> Result<File, Error> {
        let path = self
            .root
            .join("locks")
            .join(format!("{what}-{}", digest.hex()));
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("open", &path))?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
            .map_err(|errno| Error::file("lock", &path)(errno.into()))?;
        Ok(file)
    }

    /// Removes something that has its final name, without it ever being there
    /// by half.
    fn discard(&self, path: &Path) -> Result<(), Error> {
        let grave = self.temporary()?;
        let inside = grave.path().join("removed");
        fs::rename(path, &inside).map_err(Error::file("remove", path))
    }

    fn clear_tmp(&self) -> Result<(), Error> {
        for path in entries(&self.root.join("tmp"))? {
            fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
        }
        Ok(())
    }

    fn lock(&self, operation: FlockOperation) -> Result<File, Error> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("open", &path))?;
        // Nobody uses the store: what is under `tmp` was left by the dead.
        let alone = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if alone {
            self.clear_tmp()?;
        }
        rustix::io::retry_on_intr(|| flock(&file, operation))
            .map_err(|errno| Error::file("lock", &path)(errno.into()))?;
        Ok(file)
    }

    fn temporary(&self) -> Result<tempfile::TempDir, Error> {
        let path = self.root.join("tmp");
        tempfile::TempDir::new_in(&path).map_err(Error::file("create a directory in", &path))
    }

    fn layer_path(&self, diff_id: Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    fn disk_path(&self, digest: Digest) -> PathBuf {
        self.root.join("disks").join(digest.hex())
    }

    fn ref_path(&self, reference: &str) -> PathBuf {
        let hash = Digest::of(reference.as_bytes()).hex();
        self.root.join("refs").join(format!("{hash}.json"))
    }

    /// The image of this digest, if its disk is there and whole.
    fn load(&self, digest: Digest) -> Result<Option<StoredImage>, Error> {
        let directory = self.disk_path(digest);
        let Some(record) = read_json::<DiskRecord>(&directory.join("image.json"))? else {
            return Ok(None);
        };
        if record.format != FORMAT {
            return Ok(None);
        }
        let mut segments = vec![DiskSegment {
            path: directory.join("meta.erofs"),
            offset: 0,
            len: record.meta_len,
        }];
        segments.extend(record.layers.iter().map(|layer| DiskSegment {
            path: self.layer_path(layer.diff_id).join("blob"),
            offset: 0,
            len: layer.blob_len,
        }));
        let whole = |segment: &DiskSegment| {
            fs::metadata(&segment.path).is_ok_and(|meta| meta.len() == segment.len)
        };
        if !segments.iter().all(whole) {
            return Ok(None);
        }
        segments.retain(|segment| segment.len > 0);
        let Some(in_use) = segments.first().map(DiskSegment::open).transpose()? else {
            return Ok(None);
        };
        Ok(Some(StoredImage {
            digest,
            config: record.config,
            segments,
            _in_use: Arc::new(in_use),
        }))
    }

    fn convert(
        &self,
        source: &dyn Source,
        image: &SourceImage,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<StoredImage, Error> {
        let mut tree = Tree::new();
        let mut layers = Vec::with_capacity(image.layers.len());
        for (number, layer) in image.layers.iter().enumerate() {
            let what = format!("Layer {} of {}", number + 1, image.layers.len());
            let index = self.layer(source, layer, &what, progress)?;
            tree.apply(number, &index)
                .map_err(|misplaced| Error::Entry {
                    layer: layer.digest.to_string(),
                    entry: String::from_utf8_lossy(&misplaced.path).into_owned(),
                    reason: misplaced.reason.to_owned(),
                })?;
            layers.push(LayerRecord {
                diff_id: layer.diff_id,
                blob_len: index.blob_len,
            });
        }
        let blob_lens: Vec<u64> = layers.iter().map(|layer| layer.blob_len).collect();
        let meta = erofs::build(&tree, &blob_lens)?;
        let record = DiskRecord {
            format: FORMAT,
            config: image.config.clone(),
            meta_len: u64::try_from(meta.len()).unwrap_or(u64::MAX),
            layers,
        };
        let made = self.temporary()?;
        write_synced(&made.path().join("meta.erofs"), &meta)?;
        let json = serde_json::to_vec(&record).map_err(|error| Error::document("record", error))?;
        write_synced(&made.path().join("image.json"), &json)?;
        self.publish(made, &self.disk_path(image.digest))?;
        self.load(image.digest)?.ok_or_else(|| {
            let path = self.disk_path(image.digest);
            Error::file("read back", &path)(io::ErrorKind::NotFound.into())
        })
    }

    /// The index of a layer, converting it if it is not in the store.
    fn layer(
        &self,
        source: &dyn Source,
        layer: &SourceLayer,
        what: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<LayerIndex, Error> {
        let path = self.layer_path(layer.diff_id);
        if let Some(index) = read_index(&path) {
            return Ok(index);
        }
        let _making = self.making("layer", layer.diff_id)?;
        if let Some(index) = read_index(&path) {
            return Ok(index);
        }
        let made = self.temporary()?;
        let blob_path = made.path().join("blob");
        let blob = create(&blob_path)?;
        let expected = Expected {
            digest: layer.digest,
            size: layer.size,
            diff_id: layer.diff_id,
        };
        let index = layer::convert(
            source.layer(layer)?,
            &expected,
            self.limits,
            &blob,
            &mut |done| {
                progress(Progress {
                    what,
                    done,
                    total: layer.size,
                });
            },
        )?;
        blob.sync_all().map_err(Error::file("write", &blob_path))?;
        let bytes = postcard::to_stdvec(&(FORMAT, &index))
            .map_err(|error| Error::document("layer index", error))?;
        write_synced(&made.path().join("index"), &bytes)?;
        self.publish(made, &path)?;
        Ok(index)
    }

    /// Gives what was made its final name, replacing what is not whole.
    fn publish(&self, made: tempfile::TempDir, path: &Path) -> Result<(), Error> {
        let publish = |from: &Path| -> io::Result<()> {
            File::open(from)?.sync_all()?;
            fs::rename(from, path)?;
            match path.parent() {
                Some(parent) => File::open(parent)?.sync_all(),
                None => Ok(()),
            }
        };
        // Only what is not whole is made again. Renaming over a directory works
        // only if that one is empty.
        if path.exists() {
            self.discard(path)?;
        }
        match publish(made.path()) {
            Ok(()) => {
                // It is not there any more to be removed.
                let _ = made.keep();
                Ok(())
            }
            Err(error) => Err(Error::file("publish", path)(error)),
        }
    }

    /// Records the name of an image, unless it is recorded already.
    fn name(&self, reference: &Reference, image: &StoredImage) -> Result<(), Error> {
        let text = absolute(reference);
        let path = self.ref_path(&text);
        let known = read_json::<ImageSummary>(&path)?;
        if known.is_some_and(|known| known.digest == image.digest) {
            return Ok(());
        }
        let summary = ImageSummary {
            reference: text,
            digest: image.digest,
            size: image.segments.iter().map(|segment| segment.len).sum(),
            stored_ns: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .ok()
                .and_then(|time| u64::try_from(time.as_nanos()).ok())
                .unwrap_or(0),
        };
        let json =
            serde_json::to_vec(&summary).map_err(|error| Error::document("record", error))?;
        let made = self.temporary()?;
        let fresh = made.path().join("ref");
        write_synced(&fresh, &json)?;
        fs::rename(&fresh, &path).map_err(Error::file("write", &path))
    }
}

/// The reference with an absolute path, so that it means the same everywhere.
fn absolute(reference: &Reference) -> String {
    let mut reference = reference.clone();
    let path = match &mut reference {
        Reference::Oci { directory, .. } | Reference::RootFs { directory } => directory,
        Reference::OciArchive { file, .. } | Reference::DockerArchive { file, .. } => file,
        Reference::Docker(_) | Reference::Stored(_) => return reference.to_string(),
    };
    if let Ok(real) = path.canonicalize() {
        *path = real;
    }
    reference.to_string()
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .map_err(Error::file("list", directory))
}

/// Somebody has the disk open by [`DiskSegment::open`].
fn in_use(disk: &Path) -> bool {
    File::open(disk.join("meta.erofs")).is_ok_and(|file| {
        flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK)
    })
}

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("create", path))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file = create(path)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(Error::file("write", path))
}

/// `None` if there is no such file, or it is not what this version writes.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", path)(error)),
    }
}

/// The index of a layer that is in the store and whole.
fn read_index(directory: &Path) -> Option<LayerIndex> {
    let bytes = fs::read(directory.join("index")).ok()?;
    let (format, index): (u32, LayerIndex) = postcard::from_bytes(&bytes).ok()?;
    let blob = fs::metadata(directory.join("blob")).ok()?;
    (format == FORMAT && blob.len() == index.blob_len).then_some(index)
}
