//! Pushing of a stored image to a registry.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::Store;
use super::export::{Exported, ExportedLayer, Form};
use super::options::PullOptions;
use crate::Error;
use crate::digest::Digest;
use crate::docker_reference::DockerReference;
use crate::progress::{LayerStep, Progress};
use crate::source::{OpenBlob, Pushed, Pusher};

impl Store {
    /// Pushes an image under its name in the store to the registry in the name. Returns
    /// the digest of its manifest in the registry. A pulled image is pushed byte for
    /// byte; see [`Self::save`] for other images.
    ///
    /// # Errors
    /// The store has no image with that name, or the registry refuses it.
    pub fn push(&self, name: &DockerReference, options: &PullOptions<'_>) -> Result<Digest, Error> {
        let options = &options.child();
        let work = self.begin()?;
        let store = &work.store;
        let (found, record) = work.needed_image(&name.to_string())?;
        let others = self.repositories(name.registry())?;
        let others: Vec<_> = others.iter().map(String::as_str).collect();
        let message = |text: &str| (options.report)(Progress::Message(text));
        let pusher = Pusher::open(name, &others, &options.cancel, &message)?;
        let push = Push {
            store,
            pusher: &pusher,
            options,
        };
        // Layers that the registry has need not be available here.
        let absent: OpenBlob<'_> = &|| Err(io::ErrorKind::NotFound.into());
        let has = |digest, size| pusher.blob(digest, size, absent, &mut |_| {}).is_ok();
        let exported = store.export(found.digest, &record, Form::Gzip, &has, options)?;
        push.layers(&exported)?;
        push.document(&exported.config)?;
        pusher.manifest(&exported.manifest_type, &exported.manifest)
    }

    /// Returns the repositories of `registry` from which images of the store were pulled.
    /// Blobs can be mounted from them instead of being uploaded.
    fn repositories(&self, registry: &str) -> Result<Vec<String>, Error> {
        let records = self.records()?.into_values();
        let origins = records.filter_map(|record| record.origin);
        let here = origins.filter(|origin| origin.registry == registry);
        let repositories: BTreeSet<_> = here.map(|origin| origin.repository).collect();
        Ok(repositories.into_iter().collect())
    }
}

/// State of pushing one image.
struct Push<'p> {
    store: &'p Store,
    pusher: &'p Pusher<'p>,
    options: &'p PullOptions<'p>,
}

impl Push<'_> {
    /// Pushes layers, several concurrently.
    fn layers(&self, image: &Exported) -> Result<(), Error> {
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
        let work = || {
            while let Some((number, layer)) = {
                let number = next.fetch_add(1, Ordering::Relaxed);
                image.layers.get(number).map(|layer| (number, layer))
            } {
                if failed().is_some() {
                    return;
                }
                if let Err(error) = self.layer(image, layer, number) {
                    failed().get_or_insert(error);
                    self.options.cancel.cancel();
                    return;
                }
            }
        };
        let workers = self.options.max_concurrent.get().min(image.layers.len());
        thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
        match failed().take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn layer(&self, image: &Exported, layer: &ExportedLayer, number: usize) -> Result<(), Error> {
        let of = image.layers.len();
        let report_step = |step| {
            (self.options.report)(Progress::Layer {
                number: number + 1,
                of,
                digest: layer.digest,
                step,
            });
        };
        let open = || image.open(self.store, layer).map_err(io::Error::other);
        let total = Some(layer.size);
        let mut progress = |done| report_step(LayerStep::Moving { done, total });
        let pushed = self
            .pusher
            .blob(layer.digest, layer.size, &open, &mut progress)?;
        report_step(match pushed {
            Pushed::Sent => LayerStep::Done,
            Pushed::Existed | Pushed::Mounted => LayerStep::Present,
        });
        Ok(())
    }

    fn document(&self, bytes: &[u8]) -> Result<(), Error> {
        let owned = bytes.to_vec();
        let open = move || -> io::Result<Box<dyn io::Read + Send>> {
            Ok(Box::new(io::Cursor::new(owned.clone())))
        };
        let size = bytes.len() as u64;
        self.pusher
            .blob(Digest::of(bytes), size, &open, &mut |_| {})?;
        Ok(())
    }
}
