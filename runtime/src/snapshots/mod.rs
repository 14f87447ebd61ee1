//! The snapshots of a user: take, run, list, verify, remove.
//!
//! `sm run` takes *base* and *image* snapshots for itself, so that it boots no kernel
//! twice. A *workload* snapshot is taken by [`crate::Vm::snapshot`] and continued by
//! [`Snapshot::run`], any number of times: each clone gets a new identity before its
//! workload continues.

mod clone;
mod proof;

pub use clone::{Forked, Snapshot, fork, warm_up};
pub use proof::{Proof, Testimony, Twins, prove_distinct};
use serde::Serialize;
use sm_snapshot::Error;
use sm_snapshot::chain::Chain;
use sm_snapshot::contents;
pub use sm_snapshot::contents::Difference;
use sm_snapshot::flat;
pub use sm_snapshot::manifest::{Layer, Manifest};
use sm_snapshot::store::SnapshotStore;
pub use sm_snapshot::verify::Verified;
use sm_vmm::IMAGE_LABEL;

use crate::Error as RuntimeError;
use crate::home::Home;

/// Prefixes of the names of internal snapshots.
const RESERVED: [&str; 3] = ["base-", "image-", "fork-"];

/// Checks a name that a user chose for a snapshot.
pub(crate) fn check_user_name(name: &str) -> Result<(), RuntimeError> {
    sm_snapshot::store::check_name(name)?;
    if let Some(prefix) = RESERVED.iter().find(|prefix| name.starts_with(**prefix)) {
        return Err(RuntimeError::Option(format!(
            "\"{name}\" cannot be the name of a snapshot: names that begin with \"{prefix}\" are reserved"
        )));
    }
    Ok(())
}

/// A snapshot in a listing.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// The image in it, by its name at the time of the snapshot.
    pub name: String,
    /// The image in it, by its name at the time of the snapshot.
    pub image: Option<String>,
    /// Its layer; `None` if the snapshot cannot be used.
    pub layer: Option<Layer>,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Creation time, in milliseconds since the Unix epoch.
    pub vcpus: u32,
    /// Creation time, in milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
    /// The snapshot on which it builds.
    pub parent: Option<String>,
    /// The cause, if it cannot be used.
    pub problem: Option<String>,
}

fn store(home: &Home) -> SnapshotStore {
    SnapshotStore::read_only(&home.snapshots())
}

/// Returns all snapshots, usable or not, by name.
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
                image: None,
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
                    listed.image = manifest.labels.get(IMAGE_LABEL).cloned();
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

/// Returns the manifest of a snapshot.
///
/// # Errors
/// The snapshot does not exist, or is damaged.
pub fn inspect(home: &Home, name: &str) -> Result<Manifest, Error> {
    Ok(store(home).lease(name)?.manifest().clone())
}

/// Verifies every byte of a snapshot and of those on which it builds.
///
/// # Errors
/// The first difference.
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

/// Makes a snapshot independent of its parents: as the new snapshot `copy`, or in place.
/// The machine in it is the same, and the parents can be removed.
///
/// # Errors
/// The snapshot does not exist, `copy` exists, the snapshot is in use (in place), or the
/// disk is full.
pub fn flatten(home: &Home, name: &str, copy: Option<&str>) -> Result<Manifest, RuntimeError> {
    let store = SnapshotStore::open(&home.snapshots())?;
    let Some(copy) = copy else {
        return Ok(flat::flatten(&store, name)?);
    };
    check_user_name(copy)?;
    Ok(flat::flatten_to(&store, &Chain::open(&store, name)?, copy)?)
}

/// Removes a snapshot.
///
/// # Errors
/// The snapshot does not exist, or is in use.
pub fn remove(home: &Home, name: &str) -> Result<(), Error> {
    store(home).remove(name)
}
