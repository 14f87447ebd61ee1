//! The snapshots of a user: listing, checking, comparing, removing.
//!
//! Making them is the VMM's business: the first VM of its kind leaves a base
//! snapshot behind.

use serde::Serialize;
use sm_snapshot::Error;
use sm_snapshot::chain::Chain;
use sm_snapshot::contents;
pub use sm_snapshot::contents::Difference;
pub use sm_snapshot::manifest::{Layer, Manifest};
use sm_snapshot::store::SnapshotStore;
pub use sm_snapshot::verify::Verified;

use crate::home::Home;

/// One snapshot in a listing.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// What it holds; absent when it cannot be used.
    pub layer: Option<Layer>,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// When it was made, in milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Bytes it occupies on disk.
    pub disk_bytes: u64,
    /// The snapshot it builds on.
    pub parent: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

fn store(home: &Home) -> SnapshotStore {
    SnapshotStore::read_only(&home.snapshots())
}

/// All snapshots, usable or not, by name.
///
/// # Errors
/// The store cannot be read.
pub fn list(home: &Home) -> Result<Vec<Listed>, Error> {
    let entries = store(home).list()?;
    Ok(entries
        .into_iter()
        .map(|entry| {
            let mut listed = Listed {
                name: entry.name,
                layer: None,
                memory_bytes: 0,
                vcpus: 0,
                created_ms: 0,
                disk_bytes: entry.disk_bytes,
                parent: None,
                problem: None,
            };
            match entry.manifest {
                Ok(manifest) => {
                    listed.layer = Some(manifest.layer);
                    listed.memory_bytes = manifest.memory_bytes;
                    listed.vcpus = manifest.vcpus;
                    listed.created_ms = manifest.created_ms;
                    listed.parent = manifest.parent.map(|parent| parent.name);
                }
                Err(error) => listed.problem = Some(error.to_string()),
            }
            listed
        })
        .collect())
}

/// The manifest of a snapshot.
///
/// # Errors
/// It does not exist, or is damaged.
pub fn inspect(home: &Home, name: &str) -> Result<Manifest, Error> {
    Ok(store(home).lease(name)?.manifest().clone())
}

/// Checks every byte of a snapshot and of those it builds on.
///
/// # Errors
/// The first thing that differs from what was written.
pub fn verify(home: &Home, name: &str) -> Result<Verified, Error> {
    sm_snapshot::verify::verify(&Chain::open(&store(home), name)?)
}

/// Compares the guest memory of two snapshots.
///
/// # Errors
/// One of them does not exist or is damaged, or their sizes differ.
pub fn diff(home: &Home, a: &str, b: &str) -> Result<Difference, Error> {
    let store = store(home);
    contents::compare(&Chain::open(&store, a)?, &Chain::open(&store, b)?)
}

/// Removes a snapshot.
///
/// # Errors
/// It does not exist, or something uses it.
pub fn remove(home: &Home, name: &str) -> Result<(), Error> {
    store(home).remove(name)
}
