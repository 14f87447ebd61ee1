//! What a machine starts from: a kernel, or the snapshot that saves most work.

use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;

use super::cache::{Cache, Identity};
use super::guest::Start;
use super::machine::initial_ram_fs;
use super::saved::{Content, Plan, Saved};
use crate::doctor::with_causes;
use crate::launch::{LaunchRequest, Origin};

/// See the module's documentation.
pub(crate) struct Beginning {
    pub(crate) source: Source,
    pub(crate) content: Content,
    pub(crate) identity: Identity,
    /// Where snapshots are; they may be all that can be had of it.
    pub(crate) store: SnapshotStore,
    /// Snapshots to leave behind on the way to the workload.
    pub(crate) base_plan: Option<Plan>,
    pub(crate) image_plan: Option<Plan>,
}

pub(crate) enum Source {
    Kernel {
        initramfs: Vec<u8>,
    },
    Snapshot {
        store: SnapshotStore,
        saved: Box<Saved>,
    },
}

impl Beginning {
    /// Decides what `request` starts from.
    ///
    /// # Errors
    /// A snapshot that was asked for cannot be used, or kernel and agent not be
    /// read; a sentence.
    pub(crate) fn of(request: &LaunchRequest) -> Result<Self, String> {
        let root = request.data.join("snapshots");
        let store = SnapshotStore::open(&root).unwrap_or_else(|error| {
            // What it has can be used all the same; making one says why not.
            tracing::warn!(error = with_causes(&error), "no snapshots can be made");
            SnapshotStore::read_only(&root)
        });
        if let Origin::Snapshot(name) | Origin::Evidence(name) = &request.origin {
            return Self::named(store, name);
        }
        let initramfs = initial_ram_fs(request)?;
        let identity = Identity::of(request, &initramfs)?;
        let mut beginning = Self {
            source: Source::Kernel { initramfs },
            content: Content {
                kernel: request.config.kernel.clone(),
                root: request.root.clone(),
                config: None,
            },
            identity,
            store: store.clone(),
            base_plan: None,
            image_plan: None,
        };
        if request.origin == Origin::Image {
            beginning.use_cache(store, request)?;
        }
        Ok(beginning)
    }

    /// A snapshot that the user named.
    fn named(store: SnapshotStore, name: &str) -> Result<Self, String> {
        let mut saved = Saved::open(&store, name, None).map_err(|error| with_causes(&error))?;
        store.note_use(&saved.chain.tip().lease);
        let content = std::mem::take(&mut saved.content);
        let manifest = saved.chain.tip().lease.manifest();
        Ok(Self {
            identity: Identity {
                kernel: manifest.kernel.clone(),
                agent: manifest.agent.clone(),
            },
            content,
            store: store.clone(),
            base_plan: None,
            image_plan: None,
            source: Source::Snapshot {
                store,
                saved: Box::new(saved),
            },
        })
    }

    /// Takes the best that there is, and plans what is missing.
    fn use_cache(&mut self, store: SnapshotStore, request: &LaunchRequest) -> Result<(), String> {
        let cache = Cache::of(store.clone(), request, self.identity.clone())?;
        let best = cache.open();
        let layer = best.as_ref().map(|(layer, _)| *layer);
        self.base_plan = layer.is_none().then(|| cache.base_plan(request));
        self.image_plan = (layer != Some(Layer::Image)).then(|| cache.image_plan(request));
        if let Some((_, saved)) = best {
            self.source = Source::Snapshot {
                store,
                saved: Box::new(saved),
            };
        }
        Ok(())
    }

    pub(crate) fn start(&self) -> Start {
        match &self.source {
            Source::Kernel { .. } => Start::Boot,
            Source::Snapshot { saved, .. } => {
                Start::Restored(saved.chain.tip().lease.manifest().layer)
            }
        }
    }
}
