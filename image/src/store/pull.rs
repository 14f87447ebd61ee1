//! Pulling of images into the store.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::fs::FlockOperation;

use super::files::{StoredLayer, create, write_synced, writing_out};
use super::names::absolute;
use super::options::PullOptions;
use super::record::DiskRecord;
use super::work::Work;
use super::{Store, StoredImage};
use crate::Error;
use crate::digest::Digest;
use crate::documents;
use crate::erofs::{self, LayerData};
use crate::error::printable;
use crate::layer::{self, Converted, Expected, LayerFiles};
use crate::pipeline::Decoders;
use crate::platform::Platform;
use crate::progress::{LayerStep, Progress};
use crate::reference::Reference;
use crate::source::{self, Session, Source, SourceImage, SourceLayer};
use crate::tree::{Refused, Tree};

impl Store {
    /// Finds an image at the source that its reference names, and converts missing parts
    /// into the store. A registry is only contacted if the store does not have the image
    /// under its name, or has it for another platform than the requested one.
    ///
    /// # Errors
    /// See [`Error`]. Complete layers remain in the store; it is otherwise unchanged.
    pub fn open_image(
        &self,
        reference: &Reference,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        if let Reference::Docker(name) = reference {
            let _in_use = self.lock(FlockOperation::LockShared)?;
            if let Some(stored) = self.stored_by_name(name)?
                && stored.serves(options.platform.as_ref())
            {
                self.touch(stored.digest);
                return Ok(stored);
            }
        }
        self.pull(reference, options)
    }

    /// Opens the image with this digest; `None` if it is not in the store.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn open_digest(&self, digest: Digest) -> Result<Option<StoredImage>, Error> {
        let _in_use = self.lock(FlockOperation::LockShared)?;
        let stored = self.stored(digest)?;
        if stored.is_some() {
            self.touch(digest);
        }
        Ok(stored)
    }

    /// As [`Self::open_image`], but a registry is always contacted.
    ///
    /// # Errors
    /// As [`Self::open_image`].
    pub fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        let options = &options.child();
        let work = self.begin()?;
        let session = Session {
            scratch: &work.store.tmp,
            cancel: &options.cancel,
            message: &|text| (options.report)(Progress::Message(text)),
        };
        let Some(source) = source::open(reference, session)? else {
            let _in_use = self.lock(FlockOperation::LockShared)?;
            let named = self.find(&reference.to_string())?;
            self.touch(named.digest);
            let stored = self
                .stored(named.digest)?
                .ok_or_else(|| Error::unknown(reference, "its disk is missing from the store"))?;
            documents::check_platform(&stored.config, options.platform.as_ref())?;
            return Ok(stored);
        };
        let name = absolute(reference);
        if let Some(stored) = self.known(&*source, &name, options.platform.as_ref())? {
            self.touch(stored.digest);
            return Ok(stored);
        }
        let image = source.image(options.platform.as_ref())?;
        let store_compressed =
            options.store_compressed && matches!(reference, Reference::Docker(_));
        work.import_image(&*source, &image, &name, store_compressed, options)
    }

    /// Returns the image with this name, if the source reports its identity without
    /// transferring it, and still has the same one.
    fn known(
        &self,
        source: &dyn Source,
        name: &str,
        platform: Option<&Platform>,
    ) -> Result<Option<StoredImage>, Error> {
        let Some(identity) = source.identity()? else {
            return Ok(None);
        };
        let _in_use = self.lock(FlockOperation::LockShared)?;
        let Some(named) = self.named(name)? else {
            return Ok(None);
        };
        let Some(record) = self.record(named.digest)? else {
            return Ok(None);
        };
        if ![named.digest, named.named, record.config_digest].contains(&identity) {
            return Ok(None);
        }
        let stored = self.stored(named.digest)?;
        Ok(stored.filter(|stored| stored.serves(platform)))
    }
}

impl Work {
    /// Converts a layer whose digest is not known before.
    pub(super) fn convert_unknown(
        &self,
        stream: impl Read + Send,
        expected: &Expected,
        progress: &mut dyn FnMut(u64),
        options: &PullOptions<'_>,
    ) -> Result<Converted, Error> {
        let store = &self.store;
        let decoders = Decoders::default();
        store.convert_as(stream, expected, &decoders, None, progress, |diff_id| {
            self.need([store.layer_path(diff_id)])?;
            store.lock_creation("layer", diff_id, &options.message())
        })
    }

    /// Creates the missing parts of an image, and names it.
    pub(super) fn import_image(
        &self,
        source: &dyn Source,
        image: &SourceImage,
        name: &str,
        store_compressed: bool,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        let store = &self.store;
        let layers = image.layers.iter();
        let layers = layers.map(|layer| (layer.diff_id, layer.digest));
        let parts = store.parts_of(image.digest, Digest::of(&image.config_bytes), layers);
        self.need(parts.into_iter().chain([store.disk_path(image.digest)]))?;
        let stored = match store.stored(image.digest)? {
            Some(stored) => stored,
            None => {
                let _creating = store.lock_creation("disk", image.digest, &options.message())?;
                match store.stored(image.digest)? {
                    Some(stored) => stored,
                    None => store.create(source, image, name, store_compressed, options)?,
                }
            }
        };
        store.touch(stored.digest);
        store.name(name, image.named, &stored)?;
        Ok(stored)
    }
}

impl Store {
    fn create(
        &self,
        source: &dyn Source,
        image: &SourceImage,
        name: &str,
        store_compressed: bool,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        let work = Pull {
            store: self,
            source,
            store_compressed,
            options,
            decoders: Decoders::default(),
        };
        work.check_sizes(&image.layers)?;
        let layers = work.layers(&image.layers)?;
        self.finish(image, name, layers)
    }

    /// Creates the disk of an image whose layers are in the store.
    pub(super) fn finish(
        &self,
        image: &SourceImage,
        name: &str,
        layers: Vec<StoredLayer>,
    ) -> Result<StoredImage, Error> {
        self.store_document(Digest::of(&image.config_bytes), &image.config_bytes)?;
        if let Some(raw) = &image.manifest {
            self.store_document(image.digest, &raw.bytes)?;
        }
        self.create_disk(image, name, layers)?;
        self.stored(image.digest)?.ok_or_else(|| {
            let path = self.disk_path(image.digest);
            Error::file("read back", &path)(io::ErrorKind::NotFound.into())
        })
    }

    fn create_disk(
        &self,
        image: &SourceImage,
        name: &str,
        mut layers: Vec<StoredLayer>,
    ) -> Result<(), Error> {
        let mut record = DiskRecord::new(image, name.to_owned());
        for (layer, stored) in image.layers.iter().zip(&layers) {
            record.push(layer, stored.totals().blob_len);
        }
        let created = self.temporary()?;
        let path = created.path().join("meta.erofs");
        let meta = create(&path)?;
        record.meta_len = self.write_metadata(image.digest, &record, &mut layers, &meta)?;
        meta.sync_all().map_err(Error::file("write", &path))?;
        let json = serde_json::to_vec(&record).map_err(|error| Error::document("record", error))?;
        write_synced(&created.path().join("image.json"), &json)?;
        self.publish(created, &self.disk_path(image.digest))
    }

    /// Writes the metadata image of these layers and returns its length.
    pub(super) fn write_metadata(
        &self,
        image: Digest,
        record: &DiskRecord,
        layers: &mut [StoredLayer],
        meta: &File,
    ) -> Result<u64, Error> {
        let mut tree = Tree::new(self.limits);
        for ((number, stored), layer) in (0..).zip(&mut *layers).zip(&record.layers) {
            tree.apply(number, &mut stored.index)
                .map_err(|refused| match refused {
                    Refused::Entry { path, reason } => Error::Entry {
                        layer: layer.digest.to_string(),
                        entry: printable(&path),
                        reason,
                    },
                    Refused::Index(error) => Error::file("read", &stored.path)(error),
                })?;
        }
        let small = layers
            .iter()
            .map(|layer| layer.file("small"))
            .collect::<Result<Vec<_>, _>>()?;
        let data: Vec<_> = layers
            .iter()
            .zip(&small)
            .map(|(layer, small)| LayerData {
                blob_len: layer.totals().blob_len,
                small,
            })
            .collect();
        erofs::build(&tree, &data, image, meta)
    }
}

/// State of importing the layers of one image.
struct Pull<'p> {
    store: &'p Store,
    source: &'p dyn Source,
    /// Also store the original layers.
    store_compressed: bool,
    options: &'p PullOptions<'p>,
    decoders: Decoders,
}

/// Result slot of a layer.
type Slot = Mutex<Option<StoredLayer>>;

impl Pull<'_> {
    /// Checks the sizes in the manifest against the limits and the free space, before any
    /// layer is requested.
    fn check_sizes(&self, layers: &[SourceLayer]) -> Result<(), Error> {
        let mut missing = BTreeMap::new();
        for layer in layers {
            if StoredLayer::open(self.store.layer_path(layer.diff_id))?.is_none() {
                missing.insert(layer.digest, layer.size.unwrap_or(0));
            }
        }
        self.store.check_free_space(&missing)
    }

    /// Imports all layers, several concurrently.
    fn layers(&self, layers: &[SourceLayer]) -> Result<Vec<StoredLayer>, Error> {
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let slots: Vec<Slot> = layers.iter().map(|_| Slot::default()).collect();
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let (Some(layer), Some(slot)) = (layers.get(number), slots.get(number)) else {
                    return;
                };
                if lock(&failure).is_some() || self.options.cancel.is_cancelled() {
                    return;
                }
                match self.layer(layer, number, layers.len()) {
                    Ok(stored) => *lock(slot) = Some(stored),
                    Err(error) => {
                        // Later failures of the other layers are consequences of this
                        // one.
                        lock(&failure).get_or_insert(error);
                        self.options.cancel.cancel();
                        return;
                    }
                }
            }
        };
        let workers = self.options.max_concurrent.get().min(layers.len());
        thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
        if let Some(error) = lock(&failure).take() {
            return Err(error);
        }
        let stored = slots.iter().map(|slot| lock(slot).take());
        stored.collect::<Option<_>>().ok_or(Error::Cancelled)
    }

    /// Returns the layer in the store, and converts it if it is missing.
    fn layer(&self, layer: &SourceLayer, number: usize, of: usize) -> Result<StoredLayer, Error> {
        let report_step = |step| {
            (self.options.report)(Progress::Layer {
                number: number + 1,
                of,
                digest: layer.digest,
                step,
            });
        };
        let path = self.store.layer_path(layer.diff_id);
        if let Some(stored) = StoredLayer::open(path.clone())? {
            report_step(LayerStep::Present);
            return Ok(stored);
        }
        let message = self.options.message();
        let _creating = self.store.lock_creation("layer", layer.diff_id, &message)?;
        if let Some(stored) = StoredLayer::open(path.clone())? {
            report_step(LayerStep::Present);
            return Ok(stored);
        }
        let mut progress = |done| {
            let total = layer.size;
            report_step(LayerStep::Moving { done, total });
        };
        progress(0);
        self.convert(layer, &mut progress)?;
        report_step(LayerStep::Done);
        StoredLayer::open_published(path)
    }

    fn convert(&self, layer: &SourceLayer, progress: &mut dyn FnMut(u64)) -> Result<(), Error> {
        let expected = Expected {
            digest: layer.digest,
            size: layer.size,
            diff_id: Some(layer.diff_id),
        };
        let stream = self.source.layer(layer)?;
        // A plain tar stream can be reconstructed, so it need not be stored.
        let store_compressed =
            self.store_compressed && layer.size.is_some() && layer.digest != layer.diff_id;
        let beside = self.store.temporary()?;
        let original_path = beside.path().join("kept");
        let original = store_compressed
            .then(|| create(&original_path))
            .transpose()?;
        let copy = original.as_ref().map(File::try_clone).transpose();
        let copy = copy.map_err(Error::file("write", &original_path))?;
        let failed = Mutex::new(None);
        let stream = Tee {
            inner: stream,
            original: copy.map(|file| BufWriter::with_capacity(1 << 20, file)),
            failed: &failed,
        };
        let (store, decoders) = (self.store, &self.decoders);
        let converted = store.convert(stream, &expected, decoders, original.as_ref(), progress);
        // This error takes precedence over errors that it caused.
        if let Some(error) = lock(&failed).take() {
            return Err(Error::file("write", &original_path)(error));
        }
        converted?;
        if store_compressed {
            // The digest has been checked.
            self.store.store_blob(layer.digest, &original_path)?;
        }
        Ok(())
    }
}

impl Store {
    /// Converts a layer into the store, and syncs `beside`, which the stream writes. The
    /// caller needs the layer, and holds its lock. ([`Work::convert_unknown`] converts a
    /// layer that is not known before.)
    fn convert(
        &self,
        stream: impl Read + Send,
        expected: &Expected,
        decoders: &Decoders,
        beside: Option<&File>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Converted, Error> {
        let known = |_| Ok(());
        self.convert_as(stream, expected, decoders, beside, progress, known)
    }

    /// As `convert`, with a callback that is run once the layer's diff_id is known.
    fn convert_as<T>(
        &self,
        stream: impl Read + Send,
        expected: &Expected,
        decoders: &Decoders,
        beside: Option<&File>,
        progress: &mut dyn FnMut(u64),
        before_publishing: impl FnOnce(Digest) -> Result<T, Error>,
    ) -> Result<Converted, Error> {
        let created = self.temporary()?;
        let file = |name: &str| create(&created.path().join(name));
        let (blob, small) = (file("blob")?, file("small")?);
        let (index, skeleton) = (file("index")?, file("skeleton")?);
        let files = LayerFiles {
            blob: &blob,
            small: &small,
            index: &index,
            skeleton: &skeleton,
        };
        let large: Vec<_> = beside.into_iter().chain([&blob]).collect();
        let converted = writing_out(&large, progress, |progress| {
            layer::convert(stream, expected, self.limits, decoders, files, progress)
        })
        .map_err(Error::file("write", &created.path().join("blob")))??;
        for (name, file) in [
            ("blob", &blob),
            ("small", &small),
            ("index", &index),
            ("skeleton", &skeleton),
        ]
        .into_iter()
        .chain(beside.map(|file| ("kept", file)))
        {
            let path = created.path().join(name);
            file.sync_all().map_err(Error::file("write", &path))?;
        }
        let _guard = before_publishing(converted.diff_id)?;
        let path = self.layer_path(converted.diff_id);
        if expected.diff_id.is_some() || StoredLayer::open(path.clone())?.is_none() {
            self.publish(created, &path)?;
        }
        Ok(converted)
    }

    /// Checks layers of these sizes against the limits, and their sum against the free
    /// space. (The converted data takes at least as much.)
    pub(super) fn check_free_space(&self, sizes: &BTreeMap<Digest, u64>) -> Result<(), Error> {
        let mut needed: u64 = 0;
        for (digest, size) in sizes {
            layer::check_stated(*digest, *size, self.limits)?;
            needed = needed.saturating_add(*size);
        }
        let found = rustix::fs::statvfs(&self.root);
        let found = found.map_err(|errno| Error::file("look at", &self.root)(errno.into()))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        match needed > free {
            true => Err(Error::Space {
                needed,
                free,
                path: self.root.clone(),
            }),
            false => Ok(()),
        }
    }
}

/// A reader that also writes the data to a file.
struct Tee<'f, R> {
    inner: R,
    original: Option<BufWriter<File>>,
    /// Error of writing the file, which is not an error of the stream.
    failed: &'f Mutex<Option<io::Error>>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(original) = &mut self.original {
            let written = match count {
                0 => original.flush(),
                count => original.write_all(buffer.get(..count).unwrap_or_default()),
            };
            if let Err(error) = written {
                let kind = error.kind();
                *lock(self.failed) = Some(error);
                return Err(kind.into());
            }
        }
        Ok(count)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // No code panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
