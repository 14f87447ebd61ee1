//! The snapshots that `sm run` makes for itself, so that it boots no kernel twice.
//!
//! A *base* snapshot holds kernel and agent, and serves every image; an *image*
//! snapshot is that with an image's root file system mounted. The first VM of
//! its kind leaves them behind; later VMs start from the best there is. All that
//! makes a kind is in the snapshot's name, so another kernel, agent or image
//! is another snapshot, never a wrong one.

use std::collections::BTreeMap;

use sm_control::launch::LaunchRequest;
use sm_control::with_causes;
use sm_snapshot::Error;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::manifest::Layer;
use sm_snapshot::state_file::combined_digest;
use sm_snapshot::store::SnapshotStore;

use super::environment::Identity;
use super::saved::{Content, Plan, Saved, versions};
use crate::names::{EPHEMERAL_LABEL, IMAGE_LABEL, is_automatic, is_of_fork};

/// Automatic snapshots kept; beyond that, those unused for longest go.
const KEPT: usize = 64;

/// The snapshots that a request can use.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    store: SnapshotStore,
    identity: Identity,
    cpu: CpuFeatures,
    base: String,
    image: String,
}

/// What a cache has for a machine.
pub(crate) struct Found {
    pub(crate) best: Option<(Layer, Saved)>,
    /// Nothing stands in the way of making it.
    pub(crate) base_missing: bool,
    /// Likewise.
    pub(crate) image_missing: bool,
}

impl Cache {
    /// The snapshots for `request` on a host that offers `cpu` to guests.
    ///
    /// # Errors
    /// The request cannot be described; a clause.
    pub(crate) fn of(
        store: SnapshotStore,
        request: &LaunchRequest,
        identity: Identity,
        cpu: &CpuFeatures,
    ) -> Result<Self, String> {
        // What another program or host could not use has another name there.
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
        // Everything that attaching a root is given, except what every start
        // gives anew (the host name).
        let root = serde_json::to_vec(&(
            &request.config.image_digest,
            &request.root,
            request.upper_size,
            request.shm_size,
            request.config.read_only,
            &request.extra_hosts,
            &request.nameservers,
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

    /// The best snapshot to start from, and which ones are to be made.
    pub(crate) fn open(&self) -> Found {
        let (image, image_missing) = self.open_one(&self.image);
        if let Some(saved) = image {
            return Found {
                best: Some((Layer::Image, saved)),
                base_missing: false,
                image_missing: false,
            };
        }
        let (base, base_missing) = self.open_one(&self.base);
        Found {
            best: base.map(|saved| (Layer::Base, saved)),
            base_missing,
            image_missing,
        }
    }

    /// One snapshot, if it can be used, and whether its name is free.
    fn open_one(&self, name: &str) -> (Option<Saved>, bool) {
        let error = match Saved::open(&self.store, name, &self.cpu, Some(&self.identity)) {
            Ok(saved) => {
                self.store.note_use(&saved.chain.tip().lease);
                return (Some(saved), false);
            }
            Err(Error::NotFound { .. }) => return (None, true),
            Err(error) => error,
        };
        tracing::warn!(name, error = with_causes(&error), "cannot use a snapshot");
        // Anything else, such as too few descriptors, may be over next time.
        let spoilt = matches!(
            error,
            Error::Damaged { .. } | Error::Older { .. } | Error::Parent { .. }
        );
        (None, spoilt && discard(&self.store, name))
    }

    /// A plan for the snapshot of a machine that is ready for any image.
    pub(crate) fn base_plan(&self, request: &LaunchRequest) -> Plan {
        self.plan(request, Layer::Base, &self.base)
    }

    /// A plan for the snapshot of a machine with the request's image mounted.
    pub(crate) fn image_plan(&self, request: &LaunchRequest) -> Plan {
        self.plan(request, Layer::Image, &self.image)
    }

    fn plan(&self, request: &LaunchRequest, layer: Layer, name: &str) -> Plan {
        let mut labels = BTreeMap::new();
        let mut root = Vec::new();
        if layer == Layer::Image {
            labels.insert(IMAGE_LABEL.to_owned(), request.config.image.clone());
            root.clone_from(&request.root);
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
            },
        }
    }
}

/// Removes a snapshot that cannot be used, and says whether it is gone. Image
/// snapshots that build on it are of no more use; one that a user has made keeps it
/// where it is.
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

/// Removes the automatic snapshots that were not used for longest, beyond those
/// that are worth keeping. What a machine or another snapshot uses stays.
/// Likewise what was made for the clones of `sm fork`, once none of them is left to
/// remove it.
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
    let removed = store.trim(KEPT, is_automatic);
    match removed {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "removed snapshots that were not used any more"),
        Err(error) => tracing::warn!(error = with_causes(&error), "cannot remove old snapshots"),
    }
}
