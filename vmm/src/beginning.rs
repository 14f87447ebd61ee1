//! The start source of a machine: a kernel, or the best usable snapshot.

use sm_control::launch::{LaunchRequest, Origin};
use sm_control::with_causes;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::store::SnapshotStore;

use super::cache::Cache;
use super::environment::{BootAssets, Environment, Identity, InitramfsBuilder};
use super::guest::Start;
use super::saved::{Content, Plan, Saved};

/// The start source, the identity of the guest software, and the snapshots to create.
pub(crate) struct Beginning {
    pub(crate) source: Source,
    pub(crate) content: Content,
    pub(crate) identity: Identity,
    /// The store of snapshots, which may be read-only.
    pub(crate) store: SnapshotStore,
    /// Snapshots to create before the workload starts.
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
    /// Selects the start source for `request`, on a host that offers `cpu` to guests.
    ///
    /// # Errors
    /// The requested snapshot cannot be used, or kernel and agent cannot be read; a
    /// sentence.
    pub(crate) fn of(
        request: &LaunchRequest,
        cpu: &CpuFeatures,
        environment: &dyn Environment,
    ) -> Result<Self, String> {
        let root = request.data.join("snapshots");
        let store = SnapshotStore::open(&root).unwrap_or_else(|error| {
            // Existing snapshots are still usable; creating one reports its own error.
            tracing::warn!(error = with_causes(&error), "no snapshots can be taken");
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

    /// Opens the snapshot that the user named.
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

    /// Selects the best cached snapshot, and plans the missing ones.
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

    /// Returns the cached snapshot that is restored, if the source is one.
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
