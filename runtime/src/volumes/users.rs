//! The VMs that refer to volumes, and what that permits.
//!
//! **Invariant: a volume that the record of a VM names is not removed**, whether the VM runs
//! or not. The lock of all records is held between the look at them and the removal, so no VM
//! appears meanwhile that names the volume and finds it.

use std::collections::BTreeMap;

use sm_control::config::MountSourceV1;

use super::store::{RemovedVolume, VolumeStore};
use super::{Volume, VolumeError, Volumes, tree};
use crate::record::{Record, Records};
use crate::system::DiskUsage;
use crate::{Error, ErrorKind};

/// Maximum number of volumes whose locks are held at a time.
const BATCH: usize = 64;

/// The names of VMs that refer to volumes, by the names of these.
pub(super) type Users = BTreeMap<String, Vec<String>>;

/// The result of [`Volumes::prune`].
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct PrunedVolumes {
    /// The names of volumes that were removed.
    pub names: Vec<String>,
    /// Space on the host that was freed, in bytes.
    pub bytes: u64,
}

impl Record {
    /// Returns the names of the volumes that the VM mounts, with whether they were created for
    /// it.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = (&str, bool)> {
        let mounts = self.start_settings().into_iter();
        let mounts = mounts.flat_map(|settings| &settings.mounts);
        mounts.filter_map(|mount| match &mount.source {
            MountSourceV1::Volume {
                name: Some(name),
                anonymous,
                ..
            } => Some((name.as_str(), *anonymous)),
            _ => None,
        })
    }
}

fn users_in(records: &[Record]) -> Users {
    let mut users = Users::new();
    for record in records {
        for (volume, _) in record.volumes() {
            let vms = users.entry(volume.to_owned()).or_default();
            vms.push(record.config().name.clone());
        }
    }
    users
}

/// Removes the name of a volume unless a VM refers to it. The caller holds the lock of all
/// records, but not while the files are removed: there may be any number.
fn remove(store: &VolumeStore, users: &Users, name: &str) -> Result<RemovedVolume, VolumeError> {
    match users.get(name).and_then(|vms| vms.first()) {
        Some(vm) => Err(VolumeError::InUse {
            name: name.to_owned(),
            by: Some(vm.clone()),
        }),
        None => store.remove(name),
    }
}

/// Returns the space on the host that a volume's removal frees, in bytes.
fn space_of(volume: &Volume) -> u64 {
    let measured = || tree::space_of(volume.path());
    volume.disk_bytes().unwrap_or_else(measured)
}

fn not_removed(volume: &str, error: &VolumeError) {
    let error = sm_control::with_causes(error);
    tracing::warn!(volume, error, "a volume is not removed");
}

/// Removes what an earlier removal left; the next one tries again.
fn sweep(store: &VolumeStore) {
    if let Err(error) = store.sweep() {
        let error = sm_control::with_causes(&error);
        tracing::warn!(error, "the rest of a volume is not removed");
    }
}

impl Volumes {
    /// Returns the names of the VMs that refer to each volume, running or not. Volumes without
    /// any are absent.
    ///
    /// # Errors
    /// The VMs cannot be listed.
    pub fn users(&self) -> Result<BTreeMap<String, Vec<String>>, Error> {
        Ok(users_in(&Records::open(self.sm.home())?.list()?))
    }

    /// Removes a volume with its content.
    ///
    /// # Errors
    /// There is none of this name, a VM refers to it, or its files cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let store = self.store()?;
        let removed = {
            let records = Records::open(self.sm.home())?;
            let _registry = records.lock()?;
            remove(&store, &users_in(&records.list()?), name)?
        };
        removed.remove()?;
        sweep(&store);
        Ok(())
    }

    /// Removes the volumes to which no VM refers and for which `select` returns true. Volumes
    /// that cannot be removed stay.
    ///
    /// # Errors
    /// The volumes or VMs cannot be listed; a VM's record cannot be read, so that it is unknown
    /// which volumes it needs.
    pub fn prune(&self, select: impl Fn(&Volume) -> bool) -> Result<PrunedVolumes, Error> {
        let store = self.store()?;
        let mut pruned = PrunedVolumes::default();
        for names in store.names()?.chunks(BATCH) {
            for (volume, removed) in self.remove_unused(&store, names, &select)? {
                let measured = || tree::space_of(&removed.data());
                let bytes = volume.disk_bytes().unwrap_or_else(measured);
                match removed.remove() {
                    Ok(()) => {
                        pruned.bytes = pruned.bytes.saturating_add(bytes);
                        pruned.names.push(volume.name);
                    }
                    Err(error) => not_removed(&volume.name, &error),
                }
            }
        }
        sweep(&store);
        Ok(pruned)
    }

    /// Removes those of `names` that [`Self::prune`] removes.
    fn remove_unused(
        &self,
        store: &VolumeStore,
        names: &[String],
        select: impl Fn(&Volume) -> bool,
    ) -> Result<Vec<(Volume, RemovedVolume)>, Error> {
        let records = Records::open(self.sm.home())?;
        let _registry = records.lock()?;
        let (readable, damaged) = records.read_all(false)?;
        if let Some(damaged) = damaged.into_iter().next() {
            return Err(crate::record::RecordError::from(damaged).into());
        }
        let users = users_in(&readable);
        let mut unused = Vec::new();
        for name in names {
            if users.contains_key(name) {
                continue;
            }
            let Ok(volume) = store.get(name) else {
                continue;
            };
            if !select(&volume) {
                continue;
            }
            match remove(store, &users, name) {
                Ok(removed) => unused.push((volume, removed)),
                // The process of a VM that was removed has not ended yet, or has this moment.
                Err(VolumeError::InUse { .. } | VolumeError::NotFound(_)) => {}
                Err(error) => not_removed(name, &error),
            }
        }
        Ok(unused)
    }

    /// Returns the disk space of all volumes; those are in use to which a VM refers.
    ///
    /// # Errors
    /// The volumes or VMs cannot be listed.
    pub fn disk_usage(&self) -> Result<DiskUsage, Error> {
        let users = self.users()?;
        let mut usage = DiskUsage::default();
        for volume in self.list()?.0 {
            let bytes = space_of(&volume);
            usage.total += 1;
            usage.bytes = usage.bytes.saturating_add(bytes);
            match users.contains_key(volume.name()) {
                true => usage.active += 1,
                false => usage.reclaimable_bytes = usage.reclaimable_bytes.saturating_add(bytes),
            }
        }
        Ok(usage)
    }

    /// Removes the volumes that were created for a VM, which is gone, and that no other VM
    /// refers to.
    ///
    /// # Errors
    /// As for [`Self::remove`]; all are tried.
    pub(crate) fn remove_anonymous_of(&self, record: &Record) -> Result<(), Error> {
        let mut result = Ok(());
        for (name, anonymous) in record.volumes() {
            if !anonymous {
                continue;
            }
            match self.remove(name) {
                // It was never started, or another VM uses the volume as well.
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Busy) => {}
                other => result = result.and(other),
            }
        }
        result
    }
}
