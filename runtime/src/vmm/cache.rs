//! The snapshots that `sm run` makes for itself, so that it boots no kernel twice.
//!
//! A *base* snapshot holds kernel and agent, and serves every image; an *image*
//! snapshot is that with an image's root file system mounted. The first VM of
//! its kind leaves them behind; later VMs start from the best there is. All that
//! makes a kind is in the snapshot's name, so another kernel, agent or image
//! is another snapshot, never a wrong one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use sm_snapshot::Error;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;

use super::saved::{Content, Plan, Saved};
use crate::doctor::with_causes;
use crate::launch::LaunchRequest;
use crate::snapshots::{IMAGE_LABEL, is_automatic};

/// Automatic snapshots kept; beyond that, those unused for longest go.
const KEPT: usize = 64;

/// What tells one guest software from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Digest that tells the kernel.
    pub(crate) kernel: String,
    /// Digest of agent and modules.
    pub(crate) agent: String,
}

impl Identity {
    /// The identity of what `request` boots; `initramfs` holds agent and modules.
    ///
    /// # Errors
    /// The kernel cannot be examined; a clause.
    pub(crate) fn of(request: &LaunchRequest, initramfs: &[u8]) -> Result<Self, String> {
        Ok(Self {
            kernel: kernel_identity(&request.config.kernel)
                .map_err(|error| format!("cannot examine the kernel: {error}"))?,
            agent: digest(&[initramfs]),
        })
    }
}

/// The snapshots that a request can use.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    store: SnapshotStore,
    identity: Identity,
    base: String,
    image: String,
}

/// SHA-256 in hexadecimal.
fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .fold(String::new(), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Tells kernels apart without reading them: the file's identity, size and age.
fn kernel_identity(path: &Path) -> std::io::Result<String> {
    let meta = path.metadata()?;
    let text = format!(
        "{}:{}:{}:{}:{}",
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    Ok(digest(&[text.as_bytes()]))
}

impl Cache {
    /// The snapshots for `request`.
    ///
    /// # Errors
    /// The request cannot be described; a clause.
    pub(crate) fn of(
        store: SnapshotStore,
        request: &LaunchRequest,
        identity: Identity,
    ) -> Result<Self, String> {
        let kind = digest(&[
            identity.kernel.as_bytes(),
            identity.agent.as_bytes(),
            request.cmdline.as_bytes(),
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
            image: name("image", &digest(&[kind.as_bytes(), &root])),
            identity,
        })
    }

    /// The best snapshot to start from, and what it holds. One that cannot be
    /// used is removed, so that another is made.
    pub(crate) fn open(&self) -> Option<(Layer, Saved)> {
        [(Layer::Image, &self.image), (Layer::Base, &self.base)]
            .into_iter()
            .find_map(|(layer, name)| Some((layer, self.open_one(name)?)))
    }

    fn open_one(&self, name: &str) -> Option<Saved> {
        match Saved::open(&self.store, name, Some(&self.identity)) {
            Ok(saved) => {
                self.store.note_use(&saved.chain.tip().lease);
                Some(saved)
            }
            Err(Error::NotFound { .. }) => None,
            Err(error) => {
                tracing::warn!(name, error = with_causes(&error), "cannot use a snapshot");
                self.discard(name);
                None
            }
        }
    }

    /// Removes a snapshot that cannot be used. Image snapshots that build on it
    /// are of no more use; one that a user has made keeps it where it is.
    fn discard(&self, name: &str) {
        for child in self.store.children(name).unwrap_or_default() {
            if is_automatic(&child) {
                let _ = self.store.remove(&child);
            }
        }
        if let Err(error) = self.store.remove(name) {
            tracing::warn!(name, error = with_causes(&error), "it is not removed");
        }
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

/// Removes the automatic snapshots that were not used for longest, beyond those
/// that are worth keeping. What a machine or another snapshot uses stays.
pub(crate) fn trim(store: &SnapshotStore) {
    let removed = store.trim(KEPT, is_automatic);
    match removed {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "removed snapshots that were not used any more"),
        Err(error) => tracing::warn!(error = with_causes(&error), "cannot remove old snapshots"),
    }
}
