//! The snapshots that `sm run` creates for itself, so that it boots no kernel twice.
//!
//! A *base* snapshot contains kernel and agent, and serves every image; an *image*
//! snapshot also has an image's root file system mounted. The first VM of a kind creates
//! them; later VMs start from the best one. The name of a snapshot contains a digest of
//! everything that determines its kind, so another kernel, agent or image results in
//! another snapshot.

use std::collections::BTreeMap;

use sm_control::config::NetworkMode;
use sm_control::launch::{ImageSource, LaunchRequest};
use sm_control::with_causes;
use sm_snapshot::Error;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::manifest::Layer;
use sm_snapshot::state_file::combined_digest;
use sm_snapshot::store::SnapshotStore;

use super::environment::Identity;
use super::saved::{Content, Plan, Saved, versions};
use crate::names::{EPHEMERAL_LABEL, IMAGE_LABEL, is_automatic, is_of_fork};

/// Most automatic snapshots; beyond it, the least recently used are removed.
const MAX_AUTOMATIC: usize = 64;

/// The cached snapshots that a request can use.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    store: SnapshotStore,
    identity: Identity,
    cpu: CpuFeatures,
    base: String,
    image: String,
}

/// The state of the cache for a machine.
pub(crate) struct CacheLookup {
    pub(crate) best: Option<(Layer, Saved)>,
    /// True if the base snapshot is missing and its name is free.
    pub(crate) base_missing: bool,
    /// True if the image snapshot is missing and its name is free.
    pub(crate) image_missing: bool,
}

impl Cache {
    /// Returns the cache for `request` on a host that offers `cpu` to guests.
    ///
    /// # Errors
    /// The request cannot be encoded; a clause.
    pub(crate) fn of(
        store: SnapshotStore,
        request: &LaunchRequest,
        image: &ImageSource,
        identity: Identity,
        cpu: &CpuFeatures,
    ) -> Result<Self, String> {
        // Snapshots that only another program version or host can use have other names.
        let reader = serde_json::to_vec(&(versions(), cpu))
            .map_err(|error| format!("cannot describe the host: {error}"))?;
        let kind = combined_digest(&[
            identity.kernel.as_bytes(),
            identity.agent.as_bytes(),
            request.cmdline.as_bytes(),
            &reader,
        ]);
        let name = |layer: &str, digest: &str| {
            let (mib, vcpus) = (request.config.memory >> 20, request.config.cpus);
            let short = digest.get(..16).unwrap_or(digest);
            format!("{layer}-{mib}m-{vcpus}c-{short}")
        };
        // All parameters of attaching the root, except those that every start sends again
        // (host name and addresses). A guest without a network has no driver on its device,
        // and to put it back at each start takes time.
        let root = serde_json::to_vec(&(
            &request.config.image_digest,
            &image.root,
            request.root_disk,
            request.upper_size,
            request.shm_size,
            request.config.read_only,
            request.config.network.mode == NetworkMode::None,
        ))
        .map_err(|error| format!("cannot describe the root: {error}"))?;
        Ok(Self {
            store,
            base: name("base", &kind),
            image: name("image", &combined_digest(&[kind.as_bytes(), &root])),
            identity,
            cpu: cpu.clone(),
        })
    }

    /// Opens the best snapshot, and returns which ones are missing.
    pub(crate) fn open(&self) -> CacheLookup {
        let (image, image_missing) = self.open_entry(&self.image);
        if let Some(saved) = image {
            return CacheLookup {
                best: Some((Layer::Image, saved)),
                base_missing: false,
                image_missing: false,
            };
        }
        CacheLookup {
            image_missing,
            ..self.open_base()
        }
    }

    /// Opens the base snapshot only.
    pub(crate) fn open_base(&self) -> CacheLookup {
        let (base, base_missing) = self.open_entry(&self.base);
        CacheLookup {
            best: base.map(|saved| (Layer::Base, saved)),
            base_missing,
            image_missing: false,
        }
    }

    /// Opens one snapshot. Returns it if it can be used, and true if its name is free,
    /// perhaps after a corrupt one was removed.
    fn open_entry(&self, name: &str) -> (Option<Saved>, bool) {
        let error = match Saved::open(&self.store, name, &self.cpu, Some(&self.identity)) {
            Ok(saved) => {
                self.store.note_use(&saved.chain.tip().lease);
                return (Some(saved), false);
            }
            Err(Error::NotFound { .. }) => return (None, true),
            Err(error) => error,
        };
        tracing::warn!(name, error = with_causes(&error), "cannot use a snapshot");
        // Other errors, such as a lack of descriptors, may be transient.
        let corrupt = matches!(
            error,
            Error::Damaged { .. } | Error::Older { .. } | Error::Parent { .. }
        );
        (None, corrupt && discard(&self.store, name))
    }

    /// Plans the snapshot of a machine that is ready for any image.
    pub(crate) fn base_plan(&self, request: &LaunchRequest, image: &ImageSource) -> Plan {
        self.plan(request, image, Layer::Base, &self.base)
    }

    /// Plans the snapshot of a machine with the request's image mounted.
    pub(crate) fn image_plan(&self, request: &LaunchRequest, image: &ImageSource) -> Plan {
        self.plan(request, image, Layer::Image, &self.image)
    }

    fn plan(&self, request: &LaunchRequest, image: &ImageSource, layer: Layer, name: &str) -> Plan {
        let mut labels = BTreeMap::new();
        let mut root = Vec::new();
        if layer == Layer::Image {
            labels.insert(IMAGE_LABEL.to_owned(), request.config.image.clone());
            root.clone_from(&image.root);
        }
        Plan {
            store: self.store.clone(),
            name: name.to_owned(),
            layer,
            identity: self.identity.clone(),
            labels,
            content: Content {
                kernel: request.config.kernel.clone(),
                root,
                config: None,
                disks: Vec::new(),
                shares: Vec::new(),
            },
        }
    }
}

/// Removes an unusable snapshot; returns true if it is gone. Automatic image snapshots
/// that build on it are unusable, too, and are removed; a snapshot of a user that builds
/// on it prevents the removal.
pub(crate) fn discard(store: &SnapshotStore, name: &str) -> bool {
    for child in store.children(name).unwrap_or_default() {
        if is_automatic(&child) {
            let _ = store.remove(&child);
        }
    }
    match store.remove(name) {
        Ok(()) | Err(Error::NotFound { .. }) => true,
        Err(error) => {
            tracing::warn!(name, error = with_causes(&error), "it is not removed");
            false
        }
    }
}

/// Removes the least recently used automatic snapshots beyond the limit, except those in
/// use by machines or other snapshots. Also removes snapshots of `sm fork` of which no
/// clone is left.
pub(crate) fn trim(store: &SnapshotStore) {
    let forked = store.remove_unused(is_of_fork, |manifest| {
        manifest.labels.contains_key(EPHEMERAL_LABEL)
    });
    if let Err(error) = forked {
        tracing::warn!(
            error = with_causes(&error),
            "cannot look for forgotten forks"
        );
    }
    let removed = store.trim(MAX_AUTOMATIC, is_automatic);
    match removed {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "removed snapshots that were not used any more"),
        Err(error) => tracing::warn!(error = with_causes(&error), "cannot remove old snapshots"),
    }
}
