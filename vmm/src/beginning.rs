//! What a machine starts from: a kernel, or the snapshot that saves most work.

use sm_control::launch::{LaunchRequest, Origin};
use sm_control::with_causes;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::store::SnapshotStore;

use super::cache::Cache;
use super::environment::{BootAssets, Environment, Identity, InitramfsBuilder};
use super::guest::Start;
use super::saved::{Content, Plan, Saved};

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
        initramfs: InitramfsBuilder,
    },
    Snapshot {
        store: SnapshotStore,
        saved: Box<Saved>,
    },
}

impl Beginning {
    /// Decides what `request` starts from, on a host that offers `cpu` to guests.
    ///
    /// # Errors
    /// A snapshot that was asked for cannot be used, or kernel and agent not be
    /// read; a sentence.
    pub(crate) fn of(
        request: &LaunchRequest,
        cpu: &CpuFeatures,
        environment: &dyn Environment,
    ) -> Result<Self, String> {
        let root = request.data.join("snapshots");
        let store = SnapshotStore::open(&root).unwrap_or_else(|error| {
            // What it has can be used all the same; making one says why not.
            tracing::warn!(error = with_causes(&error), "no snapshots can be made");
            SnapshotStore::read_only(&root)
        });
        if let Origin::Snapshot(name) | Origin::Evidence(name) = &request.origin {
            return Self::named(store, name, cpu);
        }
        let BootAssets {
            identity,
            initramfs,
        } = environment.boot_assets(request)?;
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
            beginning.use_cache(store, request, cpu)?;
        }
        Ok(beginning)
    }

    /// A snapshot that the user named.
    fn named(store: SnapshotStore, name: &str, cpu: &CpuFeatures) -> Result<Self, String> {
        let mut saved =
            Saved::open(&store, name, cpu, None).map_err(|error| with_causes(&error))?;
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
    fn use_cache(
        &mut self,
        store: SnapshotStore,
        request: &LaunchRequest,
        cpu: &CpuFeatures,
    ) -> Result<(), String> {
        let cache = Cache::of(store.clone(), request, self.identity.clone(), cpu)?;
        let found = cache.open();
        self.base_plan = found.base_missing.then(|| cache.base_plan(request));
        self.image_plan = found.image_missing.then(|| cache.image_plan(request));
        if let Some((_, saved)) = found.best {
            self.source = Source::Snapshot {
                store,
                saved: Box::new(saved),
            };
        }
        Ok(())
    }

    /// The snapshot of the cache that is restored, if one is.
    pub(crate) fn cached(&self, request: &LaunchRequest) -> Option<(SnapshotStore, String)> {
        match &self.source {
            Source::Snapshot { store, saved } if request.origin == Origin::Image => {
                Some((store.clone(), saved.chain.tip().lease.name().to_owned()))
            }
            _ => None,
        }
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
