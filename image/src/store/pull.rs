//! Bringing images into the store.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write as _};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::fs::FlockOperation;

use super::files::{StoredLayer, create, write_synced, writing_out};
use super::names::absolute;
use super::record::DiskRecord;
use super::work::Work;
use super::{Store, StoredImage};
use crate::Error;
use crate::cancel::Cancel;
use crate::digest::Digest;
use crate::documents;
use crate::erofs::{self, LayerData};
use crate::error::printable;
use crate::layer::{self, Converted, Expected, LayerFiles};
use crate::pipeline::Decoders;
use crate::platform::Platform;
use crate::progress::{LayerStep, Progress, Report};
use crate::reference::Reference;
use crate::source::{self, Session, Source, SourceImage, SourceLayer};
use crate::tree::{Refused, Tree};

/// Layers that are read at once, if there are CPUs for them: as many as Docker
/// downloads, and one more.
const MOST_AT_ONCE: usize = 4;

/// How an image is brought into the store.
#[derive(Clone)]
pub struct PullOptions<'a> {
    /// For which platform, where there is a choice. Without one: Linux on this
    /// host's architecture.
    pub platform: Option<Platform>,
    /// Gets reports of progress.
    pub report: Report<'a>,
    /// Ends everything.
    pub cancel: Cancel,
    /// Layers that are read at once, at most.
    pub at_once: NonZero<usize>,
    /// Keep the layers of registries as they came, besides what is made of them:
    /// pushing and saving give the same bytes then.
    pub keep_compressed: bool,
}

impl Default for PullOptions<'_> {
    fn default() -> Self {
        let cpus = thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
        Self {
            platform: None,
            report: &|_| {},
            cancel: Cancel::new(),
            at_once: cpus.min(NonZero::new(MOST_AT_ONCE).unwrap_or(cpus)),
            keep_compressed: true,
        }
    }
}

impl std::fmt::Debug for PullOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PullOptions")
            .field("platform", &self.platform)
            .field("at_once", &self.at_once)
            .field("keep_compressed", &self.keep_compressed)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Finds an image where its reference says, converting into the store what
    /// is not there yet. A registry is asked for what the store does not have
    /// under its name only.
    ///
    /// # Errors
    /// See [`Error`]. The store is as it was, but for layers that are complete.
    pub fn open_image(
        &self,
        reference: &Reference,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        if let Reference::Docker(name) = reference {
            let _in_use = self.lock(FlockOperation::LockShared)?;
            if let Some(stored) = self.at_hand(name)?
                && stored.serves(options.platform.as_ref())
            {
                self.used_now(stored.digest);
                return Ok(stored);
            }
        }
        self.pull(reference, options)
    }

    /// Like [`Self::open_image`], and asks a registry even for what the store has.
    ///
    /// # Errors
    /// Likewise.
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
            notice: &|text| (options.report)(Progress::Notice(text)),
        };
        let Some(source) = source::open(reference, session)? else {
            let _in_use = self.lock(FlockOperation::LockShared)?;
            let named = self.find(&reference.to_string())?;
            self.used_now(named.digest);
            let stored = self.stored(named.digest)?.ok_or_else(|| Error::Unknown {
                reference: reference.to_string(),
                reason: "its disk is missing from the store".to_owned(),
            })?;
            documents::check_platform(&stored.config, options.platform.as_ref())?;
            return Ok(stored);
        };
        let name = absolute(reference);
        if let Some(stored) = self.known(&*source, &name, options.platform.as_ref())? {
            self.used_now(stored.digest);
            return Ok(stored);
        }
        let image = source.image(options.platform.as_ref())?;
        let keep = options.keep_compressed && matches!(reference, Reference::Docker(_));
        work.bring(&*source, &image, &name, keep, options)
    }

    /// The image of this name, if it is still the one that the source has, and the
    /// source can tell without giving it.
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

impl PullOptions<'_> {
    /// The same, with something to cancel of its own: one layer that fails ends the
    /// others, and not what else the caller does.
    pub(super) fn child(&self) -> Self {
        Self {
            cancel: self.cancel.child(),
            ..self.clone()
        }
    }

    pub(super) fn notice(&self) -> impl Fn(&str) {
        |text| (self.report)(Progress::Notice(text))
    }
}

impl Work {
    /// Converts a layer of which nothing is known before.
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
            store.making("layer", diff_id, &options.notice())
        })
    }

    /// Makes what is missing of an image, and names it.
    pub(super) fn bring(
        &self,
        source: &dyn Source,
        image: &SourceImage,
        name: &str,
        keep: bool,
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
                let _making = store.making("disk", image.digest, &options.notice())?;
                match store.stored(image.digest)? {
                    Some(stored) => stored,
                    None => store.make(source, image, name, keep, options)?,
                }
            }
        };
        store.used_now(stored.digest);
        store.name(name, image.named, &stored)?;
        Ok(stored)
    }
}

impl Store {
    fn make(
        &self,
        source: &dyn Source,
        image: &SourceImage,
        name: &str,
        keep: bool,
        options: &PullOptions<'_>,
    ) -> Result<StoredImage, Error> {
        let work = Pull {
            store: self,
            source,
            keep,
            options,
            decoders: Decoders::default(),
        };
        work.check_sizes(&image.layers)?;
        let layers = work.layers(&image.layers)?;
        self.finish(image, name, layers)
    }

    /// Makes the disk of an image whose layers are in the store.
    pub(super) fn finish(
        &self,
        image: &SourceImage,
        name: &str,
        layers: Vec<StoredLayer>,
    ) -> Result<StoredImage, Error> {
        self.keep_document(Digest::of(&image.config_bytes), &image.config_bytes)?;
        if let Some(raw) = &image.manifest {
            self.keep_document(image.digest, &raw.bytes)?;
        }
        self.make_disk(image, name, layers)?;
        self.stored(image.digest)?.ok_or_else(|| {
            let path = self.disk_path(image.digest);
            Error::file("read back", &path)(io::ErrorKind::NotFound.into())
        })
    }

    fn make_disk(
        &self,
        image: &SourceImage,
        name: &str,
        mut layers: Vec<StoredLayer>,
    ) -> Result<(), Error> {
        let mut record = DiskRecord::new(image, name.to_owned());
        for (layer, stored) in image.layers.iter().zip(&layers) {
            record.push(layer, stored.totals().blob_len);
        }
        let made = self.temporary()?;
        let path = made.path().join("meta.erofs");
        let meta = create(&path)?;
        record.meta_len = self.write_metadata(image.digest, &record, &mut layers, &meta)?;
        meta.sync_all().map_err(Error::file("write", &path))?;
        let json = serde_json::to_vec(&record).map_err(|error| Error::document("record", error))?;
        write_synced(&made.path().join("image.json"), &json)?;
        self.publish(made, &self.disk_path(image.digest))
    }

    /// Writes the metadata image that belongs to these layers; returns its length.
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

/// The layers of one image on their way into the store.
struct Pull<'p> {
    store: &'p Store,
    source: &'p dyn Source,
    /// Keep the layers as they come, too.
    keep: bool,
    options: &'p PullOptions<'p>,
    decoders: Decoders,
}

/// What has become of a layer.
type Slot = Mutex<Option<StoredLayer>>;

impl Pull<'_> {
    /// Refuses what cannot become an image, by what its manifest says, before anything
    /// is asked for.
    fn check_sizes(&self, layers: &[SourceLayer]) -> Result<(), Error> {
        let missing = |layer: &&SourceLayer| {
            StoredLayer::open(self.store.layer_path(layer.diff_id)).is_none()
        };
        let sizes = layers.iter().filter(missing);
        let sizes = sizes.map(|layer| (layer.digest, layer.size.unwrap_or(0)));
        self.store.check_room(&sizes.collect())
    }

    /// Brings all layers into the store, several at once.
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
                        // What the others find then follows from this one.
                        lock(&failure).get_or_insert(error);
                        self.options.cancel.cancel();
                        return;
                    }
                }
            }
        };
        let workers = self.options.at_once.get().min(layers.len());
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

    /// The layer in the store, converting it if it is not there.
    fn layer(&self, layer: &SourceLayer, number: usize, of: usize) -> Result<StoredLayer, Error> {
        let tell = |step| {
            (self.options.report)(Progress::Layer {
                number: number + 1,
                of,
                digest: layer.digest,
                step,
            });
        };
        let path = self.store.layer_path(layer.diff_id);
        if let Some(stored) = StoredLayer::open(path.clone()) {
            tell(LayerStep::Present);
            return Ok(stored);
        }
        let notice = self.options.notice();
        let _making = self.store.making("layer", layer.diff_id, &notice)?;
        if let Some(stored) = StoredLayer::open(path.clone()) {
            tell(LayerStep::Present);
            return Ok(stored);
        }
        let mut progress = |done| {
            let total = layer.size;
            tell(LayerStep::Moving { done, total });
        };
        progress(0);
        self.convert(layer, &mut progress)?;
        tell(LayerStep::Done);
        StoredLayer::open(path.clone())
            .ok_or_else(|| Error::file("read back", &path)(io::ErrorKind::NotFound.into()))
    }

    fn convert(&self, layer: &SourceLayer, progress: &mut dyn FnMut(u64)) -> Result<(), Error> {
        let expected = Expected {
            digest: layer.digest,
            size: layer.size,
            diff_id: Some(layer.diff_id),
        };
        let stream = self.source.layer(layer)?;
        // A plain tar stream can be put together again.
        let keep = self.keep && layer.size.is_some() && layer.digest != layer.diff_id;
        let beside = self.store.temporary()?;
        let kept_path = beside.path().join("kept");
        let kept = keep.then(|| create(&kept_path)).transpose()?;
        let copy = kept.as_ref().map(File::try_clone).transpose();
        let copy = copy.map_err(Error::file("write", &kept_path))?;
        let failed = Mutex::new(None);
        let stream = Keeping {
            inner: stream,
            kept: copy.map(|file| BufWriter::with_capacity(1 << 20, file)),
            failed: &failed,
        };
        let (store, decoders) = (self.store, &self.decoders);
        let converted = store.convert(stream, &expected, decoders, kept.as_ref(), progress);
        // Whatever follows from it.
        if let Some(error) = lock(&failed).take() {
            return Err(Error::file("write", &kept_path)(error));
        }
        converted?;
        if keep {
            // Its digest has been checked.
            self.store.keep_blob(layer.digest, &kept_path)?;
        }
        Ok(())
    }
}

impl Store {
    /// Converts a layer into the store, and sees to it that `beside`, which the stream
    /// writes, is on the disk, too. The caller needs the layer, and holds its lock.
    /// ([`Work::convert_unknown`] is for a layer that is not known before.)
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

    /// Does `before_publishing` when it is known which layer it is.
    fn convert_as<T>(
        &self,
        stream: impl Read + Send,
        expected: &Expected,
        decoders: &Decoders,
        beside: Option<&File>,
        progress: &mut dyn FnMut(u64),
        before_publishing: impl FnOnce(Digest) -> Result<T, Error>,
    ) -> Result<Converted, Error> {
        let made = self.temporary()?;
        let file = |name: &str| create(&made.path().join(name));
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
        .map_err(Error::file("write", &made.path().join("blob")))??;
        for (name, file) in [
            ("blob", &blob),
            ("small", &small),
            ("index", &index),
            ("skeleton", &skeleton),
        ]
        .into_iter()
        .chain(beside.map(|file| ("kept", file)))
        {
            let path = made.path().join(name);
            file.sync_all().map_err(Error::file("write", &path))?;
        }
        let _held = before_publishing(converted.diff_id)?;
        let path = self.layer_path(converted.diff_id);
        if expected.diff_id.is_some() || StoredLayer::open(path.clone()).is_none() {
            self.publish(made, &path)?;
        }
        Ok(converted)
    }

    /// Checks layers of these sizes against the limits, and all of them together
    /// against what is free. (What is made of them takes at least as much.)
    pub(super) fn check_room(&self, sizes: &BTreeMap<Digest, u64>) -> Result<(), Error> {
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

/// Writes down what is read.
struct Keeping<'f, R> {
    inner: R,
    kept: Option<BufWriter<File>>,
    /// Why it could not be written down, which is no fault of the stream.
    failed: &'f Mutex<Option<io::Error>>,
}

impl<R: Read> Read for Keeping<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(kept) = &mut self.kept {
            let written = match count {
                0 => kept.flush(),
                count => kept.write_all(buffer.get(..count).unwrap_or_default()),
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
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
