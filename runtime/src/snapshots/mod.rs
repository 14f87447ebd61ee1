//! The snapshots of a user: take, run, list, verify, remove.
//!
//! `sm run` takes *base* and *image* snapshots for itself, so that it boots no kernel
//! twice. A *workload* snapshot is taken by [`crate::Vm::snapshot`] and continued by
//! [`Snapshot::run`], any number of times: each clone gets a new identity before its
//! workload continues.

mod clone;
mod proof;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use clone::{Forked, Snapshot};
pub use proof::{IdentityReport, Proof, SharedValue, VmIdentityReport};
use serde::{Serialize, Serializer};
use sm_control::config::SettingsSourceV1;
pub use sm_snapshot::Error as SnapshotError;
use sm_snapshot::chain::Chain;
use sm_snapshot::contents;
pub use sm_snapshot::contents::Difference;
pub use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::flat;
pub use sm_snapshot::manifest::{DeviceEntry, Layer, Manifest, MemoryEntry, ParentRef, StateEntry};
use sm_snapshot::store::{A_MACHINE, SnapshotStore};
pub use sm_snapshot::verify::VerifiedSnapshot;
use sm_vmm::IMAGE_LABEL;
pub use sm_vmm::disks::VerifiedDisks;
pub use sm_vmm::saved::SavedShare;

use crate::events::{EventAction, EventLog, EventRecord, EventSubject};
use crate::record::{Record, Records, VmState};
use crate::sm::Sm;
use crate::{Error, OptionError};

/// Prefixes of the names of internal snapshots.
const RESERVED: [&str; 3] = ["base-", "image-", "fork-"];

/// Checks a name that a user chose for a snapshot.
pub(crate) fn check_user_name(name: &str) -> Result<(), Error> {
    sm_snapshot::store::check_name(name)?;
    match RESERVED.into_iter().find(|prefix| name.starts_with(prefix)) {
        Some(prefix) => Err(OptionError::ReservedName {
            name: name.to_owned(),
            prefix,
        }
        .into()),
        None => Ok(()),
    }
}

/// Statistics of a verification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedContents {
    /// The memory of the snapshot and of its ancestors.
    pub memory: VerifiedSnapshot,
    /// The disks of the snapshot.
    pub disks: VerifiedDisks,
}

/// A snapshot in a listing.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ListedSnapshot {
    /// Its name.
    pub name: String,
    /// The image in it, by its name at the time of the snapshot.
    pub image: Option<String>,
    /// Its layer; `None` if the snapshot cannot be used.
    pub layer: Option<Layer>,
    /// Guest memory in bytes. Serialized as 0 if the snapshot cannot be used, like the next
    /// two.
    #[serde(serialize_with = "or_zero")]
    pub memory_bytes: Option<u64>,
    /// Number of vCPUs.
    #[serde(serialize_with = "or_zero")]
    pub vcpus: Option<u32>,
    /// Creation time. Serialized as `created_ms`, in milliseconds since the Unix epoch.
    #[serde(rename = "created_ms", serialize_with = "milliseconds")]
    pub created: Option<SystemTime>,
    /// Bytes on disk.
    pub disk_bytes: u64,
    /// The snapshot on which it builds.
    pub parent: Option<String>,
    /// The cause, if it cannot be used.
    pub problem: Option<String>,
}

#[expect(clippy::ref_option, reason = "the signature that serde expects")]
fn or_zero<T, S>(number: &Option<T>, to: S) -> Result<S::Ok, S::Error>
where
    T: Copy + Default + Serialize,
    S: Serializer,
{
    number.unwrap_or_default().serialize(to)
}

#[expect(clippy::ref_option, reason = "the signature that serde expects")]
fn milliseconds<S: Serializer>(time: &Option<SystemTime>, to: S) -> Result<S::Ok, S::Error> {
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let milliseconds = since.and_then(|since| u64::try_from(since.as_millis()).ok());
    to.serialize_u64(milliseconds.unwrap_or(0))
}

/// The store of snapshots; see [`Sm::snapshots`].
#[derive(Clone, Debug)]
pub struct Snapshots {
    sm: Sm,
}

impl Sm {
    /// Returns the store of snapshots.
    #[must_use]
    pub fn snapshots(&self) -> Snapshots {
        Snapshots { sm: self.clone() }
    }
}

impl Snapshots {
    fn store(&self) -> SnapshotStore {
        SnapshotStore::read_only(&self.sm.home().snapshots())
    }

    /// Returns all snapshots, usable or not, by name.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn list(&self) -> Result<Vec<ListedSnapshot>, Error> {
        let entries = self.store().list()?;
        Ok(entries
            .into_iter()
            .map(|entry| {
                let mut listed = ListedSnapshot {
                    name: entry.name,
                    image: None,
                    layer: None,
                    memory_bytes: None,
                    vcpus: None,
                    created: None,
                    disk_bytes: entry.disk_bytes,
                    parent: None,
                    problem: None,
                };
                match entry.manifest {
                    Ok(manifest) => {
                        let created = Duration::from_millis(manifest.created_ms);
                        listed.layer = Some(manifest.layer);
                        listed.image = manifest.labels.get(IMAGE_LABEL).cloned();
                        listed.memory_bytes = Some(manifest.memory_bytes);
                        listed.vcpus = Some(manifest.vcpus);
                        listed.created = Some(UNIX_EPOCH + created);
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
    pub fn inspect(&self, name: &str) -> Result<Manifest, Error> {
        Ok(self.store().lease(name)?.manifest().clone())
    }

    /// Verifies every byte of a snapshot and of those on which it builds, and its disks: their
    /// layers have no digests, but have to be complete, readable, and of one disk.
    ///
    /// # Errors
    /// The first difference.
    pub fn verify(&self, name: &str) -> Result<VerifiedContents, Error> {
        let chain = Chain::open(&self.store(), name)?;
        Ok(VerifiedContents {
            memory: sm_snapshot::verify::verify(&chain)?,
            disks: sm_vmm::saved::verify_disks(&chain)?,
        })
    }

    /// Compares the guest memory of two snapshots.
    ///
    /// # Errors
    /// One of them does not exist or is damaged, or their sizes differ.
    pub fn diff(&self, a: &str, b: &str) -> Result<Difference, Error> {
        let store = self.store();
        let (a, b) = (Chain::open(&store, a)?, Chain::open(&store, b)?);
        Ok(contents::compare(&a, &b)?)
    }

    /// Makes a snapshot independent of its parents, in place. The machine in it is the
    /// same, and the parents can be removed.
    ///
    /// # Errors
    /// The snapshot does not exist or is in use, or the disk is full.
    pub fn flatten(&self, name: &str) -> Result<Manifest, Error> {
        let store = SnapshotStore::open(&self.sm.home().snapshots())?;
        Ok(flat::flatten(&store, name)?)
    }

    /// Like [`Self::flatten`], but as the new snapshot `copy`.
    ///
    /// # Errors
    /// The snapshot does not exist, `copy` exists or is no valid name, or the disk is full.
    pub fn flatten_to(&self, name: &str, copy: &str) -> Result<Manifest, Error> {
        let store = SnapshotStore::open(&self.sm.home().snapshots())?;
        check_user_name(copy)?;
        Ok(flat::flatten_to(&store, &Chain::open(&store, name)?, copy)?)
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// The snapshot does not exist, or is in use.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let removed = self.store().remove(name);
        removed.map_err(|error| self.with_user(error))?;
        let (subject, action) = (EventSubject::Snapshot, EventAction::Remove);
        let event = EventRecord::now(subject, action, name, name);
        EventLog::of(self.sm.home()).note(&event);
        Ok(())
    }

    /// Replaces the machine that uses a snapshot, of which the store knows no more, by the name
    /// of a VM that continues it.
    fn with_user(&self, error: sm_snapshot::Error) -> Error {
        let sm_snapshot::Error::InUse { name, user } = error else {
            return error.into();
        };
        let continues = |record: &Record| {
            let source = record.start_settings().map(|settings| &settings.source);
            let of_it = matches!(source, Some(SettingsSourceV1::Snapshot(other)) if *other == name);
            of_it && matches!(record.state(), Ok(VmState::Running))
        };
        let records = Records::open(self.sm.home()).and_then(|records| records.list());
        let records = records.unwrap_or_default();
        let user = match records.into_iter().find(continues) {
            Some(vm) if user == A_MACHINE => format!("VM \"{}\"", vm.config().name),
            _ => user,
        };
        sm_snapshot::Error::InUse { name, user }.into()
    }

    /// Starts `count` clones of a snapshot, and gets an identity report from each before
    /// any workload code runs in it. Half of the host's free memory limits the number of
    /// concurrent clones: beyond it, the oldest exits when the next one is started. Calls
    /// `progress` with the number of each clone.
    ///
    /// # Errors
    /// The snapshot cannot be used, or a clone cannot be started.
    pub fn prove_distinct(
        &self,
        name: &str,
        count: usize,
        progress: impl FnMut(usize),
    ) -> Result<Proof, Error> {
        proof::prove_distinct(&self.sm, name, count, progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_snapshot_has_zeros_in_json() {
        let listed = |created: Option<SystemTime>| ListedSnapshot {
            name: "s".to_owned(),
            image: None,
            layer: None,
            memory_bytes: None,
            vcpus: created.map(|_| 2),
            created,
            disk_bytes: 1,
            parent: None,
            problem: None,
        };
        let json = serde_json::to_value(listed(None)).unwrap();
        let expected = serde_json::json!({
            "name": "s", "image": null, "layer": null, "memory_bytes": 0, "vcpus": 0,
            "created_ms": 0, "disk_bytes": 1, "parent": null, "problem": null,
        });
        assert_eq!(json, expected);
        let created = UNIX_EPOCH + Duration::from_millis(1234);
        let json = serde_json::to_value(listed(Some(created))).unwrap();
        assert_eq!(
            (&json["created_ms"], &json["vcpus"]),
            (&1234.into(), &2.into())
        );
    }

    #[test]
    fn internal_names_are_reserved() {
        let error = check_user_name("fork-x").unwrap_err();
        let reserved = OptionError::ReservedName {
            name: "fork-x".to_owned(),
            prefix: "fork-",
        };
        assert!(matches!(error, Error::Option(option) if option == reserved));
        assert!(check_user_name("forks").is_ok());
    }
}
