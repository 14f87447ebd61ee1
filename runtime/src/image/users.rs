//! Snapshots and VMs that need images of a home.

use std::path::Path;

use sm_control::with_causes;
use sm_image::{Digest, Users};
use sm_snapshot::chain::Chain;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::{SnapshotStore, StoreEntry};
use sm_vmm::saved;

use crate::home::Home;
use crate::record::{RecordError, Records};

/// The cause of not knowing which images are needed.
pub(super) enum Unknown {
    /// The snapshots cannot be listed; a sentence.
    Store(String),
    /// This one cannot be read.
    Snapshot {
        /// The snapshot.
        name: String,
        /// The cause.
        reason: String,
    },
}

/// Returns the images that workload snapshots and VMs need, with these users. One that
/// cannot be read may need any image.
///
/// # Errors
/// The store, or a snapshot in it, cannot be read.
pub(super) fn image_users(home: &Home) -> Result<Users, Unknown> {
    let store = SnapshotStore::read_only(&home.snapshots());
    let mut users = Users::new();
    let entries = store.list();
    let entries = entries.map_err(|error| Unknown::Store(with_causes(&error)))?;
    for entry in entries {
        let digest = match image_of(&store, &entry) {
            Ok(digest) => digest,
            // Snapshots can be removed at any time.
            Err(_) if is_gone(&home.snapshots().join(&entry.name)) => continue,
            Err(reason) => {
                let name = entry.name;
                return Err(Unknown::Snapshot { name, reason });
            }
        };
        if let Some(digest) = digest {
            let user = format!("snapshot \"{}\"", entry.name);
            users.entry(digest).or_default().push(user);
        }
    }
    add_vms(home, &mut users)?;
    Ok(users)
}

/// Adds the images of VMs, which can be started again. Without its image, the changes on a
/// VM's disk are of no use.
fn add_vms(home: &Home, users: &mut Users) -> Result<(), Unknown> {
    // Without a directory there are no records, and none is created by looking for them.
    if is_gone(&home.vms()) {
        return Ok(());
    }
    let all = Records::open(home).and_then(|records| records.read_all(false));
    let (records, damaged) = all.map_err(|error| Unknown::Store(with_causes(&error)))?;
    if let Some(damaged) = damaged.into_iter().next() {
        return Err(Unknown::Store(with_causes(&RecordError::from(damaged))));
    }
    for record in records {
        let config = record.config();
        if let Some(digest) = Digest::parse(&config.image_digest) {
            let user = format!("VM \"{}\"", config.name);
            users.entry(digest).or_default().push(user);
        }
    }
    Ok(())
}

/// Returns true only if it is certain that nothing is at `path`.
fn is_gone(path: &Path) -> bool {
    matches!(path.try_exists(), Ok(false))
}

/// Returns the image from which a snapshot's workload runs.
fn image_of(store: &SnapshotStore, entry: &StoreEntry) -> Result<Option<Digest>, String> {
    let manifest = entry
        .manifest
        .as_ref()
        .map_err(|error| with_causes(error))?;
    if manifest.layer != Layer::App {
        return Ok(None);
    }
    let chain = Chain::open(store, &entry.name).map_err(|error| with_causes(&error))?;
    let content = saved::content(&chain).map_err(|error| with_causes(&error))?;
    let Some(config) = content.config else {
        return Ok(None);
    };
    match Digest::parse(&config.image_digest) {
        Some(digest) => Ok(Some(digest)),
        None => Err(format!("{:?} is no image", config.image_digest)),
    }
}

#[cfg(test)]
mod tests;
