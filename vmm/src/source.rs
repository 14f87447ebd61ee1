//! Resolves the start source of a request: to a kernel, or to the best usable snapshot.

use sm_control::launch::{ImageSource, LaunchRequest, StartSource};
use sm_control::with_causes;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;

use super::cache::Cache;
use super::environment::{BootAssets, Identity, InitramfsBuilder, VmmEnvironment};
use super::saved::{Content, Plan, Saved};

/// A resolved start source, the identity of the guest software, and the snapshots to
/// create.
pub(crate) struct StartPlan {
    pub(crate) source: ResolvedSource,
    pub(crate) content: Content,
    pub(crate) identity: Identity,
    /// The store of snapshots, which may be read-only.
    pub(crate) store: SnapshotStore,
    /// Snapshots to create before the workload starts.
    pub(crate) base_plan: Option<Plan>,
    pub(crate) image_plan: Option<Plan>,
}

pub(crate) enum ResolvedSource {
    /// A kernel is booted.
    Kernel { initramfs: InitramfsBuilder },
    /// A snapshot is restored.
    Snapshot {
        store: SnapshotStore,
        saved: Box<Saved>,
        /// True for an automatic snapshot, which is used in place of a boot.
        automatic: bool,
    },
}

impl StartPlan {
    /// Resolves the start source of `request`, on a host that offers `cpu` to guests.
    /// `has_changes` says that the VM has a disk with changes to its root.
    ///
    /// # Errors
    /// The requested snapshot cannot be used, or kernel and agent cannot be read; a
    /// sentence.
    pub(crate) fn of(
        request: &LaunchRequest,
        cpu: &CpuFeatures,
        environment: &dyn VmmEnvironment,
        has_changes: bool,
    ) -> Result<Self, String> {
        let root = request.data.join("snapshots");
        let store = SnapshotStore::open(&root).unwrap_or_else(|error| {
            // Existing snapshots are still usable; creating one reports its own error.
            tracing::warn!(error = with_causes(&error), "no snapshots can be taken");
            SnapshotStore::read_only(&root)
        });
        let image = match &request.source {
            StartSource::Image(image) => image,
            StartSource::Snapshot(name) | StartSource::IdentityReport(name) => {
                return Self::named(store, name, cpu);
            }
        };
        let BootAssets {
            identity,
            initramfs,
        } = environment.boot_assets(request, image)?;
        let mut plan = Self {
            source: ResolvedSource::Kernel { initramfs },
            content: Content {
                kernel: request.config.kernel.clone(),
                root: image.root.clone(),
                config: None,
                disks: Vec::new(),
                shares: Vec::new(),
            },
            identity,
            store: store.clone(),
            base_plan: None,
            image_plan: None,
        };
        if !image.cold {
            plan.use_cache(store, request, image, cpu, has_changes)?;
        }
        Ok(plan)
    }

    /// Opens the snapshot that the user named.
    fn named(store: SnapshotStore, name: &str, cpu: &CpuFeatures) -> Result<Self, String> {
        let saved = Saved::open(&store, name, cpu, None).map_err(|error| with_causes(&error))?;
        store.note_use(&saved.chain.tip().lease);
        let content = saved.content.clone();
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
            source: ResolvedSource::Snapshot {
                store,
                saved: Box::new(saved),
                automatic: false,
            },
        })
    }

    /// Selects the best cached snapshot, and plans the missing ones.
    fn use_cache(
        &mut self,
        store: SnapshotStore,
        request: &LaunchRequest,
        image: &ImageSource,
        cpu: &CpuFeatures,
        has_changes: bool,
    ) -> Result<(), String> {
        let cache = Cache::of(store.clone(), request, image, self.identity.clone(), cpu)?;
        // An image snapshot has a root without changes mounted.
        let found = match has_changes {
            true => cache.open_base(),
            false => cache.open(),
        };
        self.base_plan = found.base_missing.then(|| cache.base_plan(request, image));
        self.image_plan = found
            .image_missing
            .then(|| cache.image_plan(request, image));
        if let Some((_, saved)) = found.best {
            self.source = ResolvedSource::Snapshot {
                store,
                saved: Box::new(saved),
                automatic: true,
            };
        }
        Ok(())
    }

    /// Returns the automatic snapshot that is restored, if the source is one.
    pub(crate) fn automatic(&self) -> Option<(SnapshotStore, String)> {
        match &self.source {
            ResolvedSource::Snapshot {
                store,
                saved,
                automatic: true,
            } => Some((store.clone(), saved.chain.tip().lease.name().to_owned())),
            _ => None,
        }
    }

    /// Returns the layer of the snapshot that is restored; `None` if a kernel is booted.
    pub(crate) fn restored(&self) -> Option<Layer> {
        match &self.source {
            ResolvedSource::Kernel { .. } => None,
            ResolvedSource::Snapshot { saved, .. } => {
                Some(saved.chain.tip().lease.manifest().layer)
            }
        }
    }
}
