//! The snapshots of a user: making, continuing, listing, checking, removing.
//!
//! `sm run` makes *base* and *image* snapshots for itself, so that it boots no
//! kernel twice. A *workload* snapshot is made by [`crate::Vm::snapshot`] and
//! goes on by [`Snapshot::run`], as many times as wished: each clone has an
//! identity of its own before its workload runs on.

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

use crate::Error as RuntimeError;
use crate::home::Home;
use crate::vmm::names::IMAGE_LABEL;

/// How the names of the snapshots begin that are not made by users.
const RESERVED: [&str; 3] = ["base-", "image-", "fork-"];

/// Checks a name that a user wants to give to a snapshot.
pub(crate) fn check_user_name(name: &str) -> Result<(), RuntimeError> {
    sm_snapshot::store::check_name(name)?;
    if let Some(prefix) = RESERVED.iter().find(|prefix| name.starts_with(**prefix)) {
        return Err(RuntimeError::Option(format!(
            "\"{name}\" cannot be the name of a snapshot: sm keeps names that begin with \"{prefix}\" for itself"
        )));
    }
    Ok(())
}

/// One snapshot in a listing.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// The image in it, as it was named when the snapshot was made.
    pub image: Option<String>,
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

/// Makes a snapshot build on nothing: as the new snapshot `copy`, or in place. The
/// machine in it is the same, and the snapshots that it was built on can go.
///
/// # Errors
/// It does not exist, `copy` does, or in place something uses it; or the disk is full.
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
/// It does not exist, or something uses it.
pub fn remove(home: &Home, name: &str) -> Result<(), Error> {
    store(home).remove(name)
}
