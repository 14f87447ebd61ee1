//! Operations on everything that a user has.

use std::path::Path;

use crate::record::{Records, VmState};
use crate::sm::Sm;
use crate::vm::{Force, Vm};
use crate::{Error, StartOptions};

/// A VM that [`Sm::resume`] has started, or could not.
#[derive(Debug)]
#[non_exhaustive]
pub struct Resumed {
    /// The VM.
    pub vm: Vm,
    /// The failure, if it does not run.
    pub error: Option<Error>,
}

/// Disk space of a kind of data; see [`Sm::disk_usage`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct DiskUsage {
    /// Number of objects.
    pub total: usize,
    /// Number of those that are in use.
    pub active: usize,
    /// Bytes on disk.
    pub bytes: u64,
    /// Bytes that a removal of all unused objects would free.
    pub reclaimable_bytes: u64,
}

impl Sm {
    /// Starts the VMs that should run by their restart policies and have no process: after a
    /// reboot, or when processes were killed. A failure does not affect the others.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn resume(&self) -> Result<Vec<Resumed>, Error> {
        let records = Records::open(self.home())?;
        records.sweep()?;
        let mut resumed = Vec::new();
        // Oldest first, as they were created.
        for record in records.list()?.into_iter().rev() {
            let should_run = match record.state() {
                Ok(VmState::Exited(exit)) => record.config().restart.resumes_after(&exit),
                Ok(_) | Err(_) => false,
            };
            if should_run {
                let mut vm = Vm::from_record(self, record);
                let error = vm.start(StartOptions::new()).err();
                resumed.push(Resumed { vm, error });
            }
        }
        Ok(resumed)
    }

    /// Returns the disk space of the VMs' records with their logs.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn disk_usage(&self) -> Result<DiskUsage, Error> {
        let mut usage = DiskUsage::default();
        for record in Records::open(self.home())?.list()? {
            let bytes = space_of(record.directory());
            usage.total += 1;
            usage.bytes = usage.bytes.saturating_add(bytes);
            match record.state() {
                Ok(VmState::Running | VmState::Restarting(_)) => usage.active += 1,
                _ => usage.reclaimable_bytes = usage.reclaimable_bytes.saturating_add(bytes),
            }
        }
        Ok(usage)
    }

    /// Removes all VMs without a process, and returns their names and the space that was
    /// freed, in bytes. VMs that cannot be removed stay.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn prune_vms(&self) -> Result<(Vec<String>, u64), Error> {
        let (mut names, mut freed) = (Vec::new(), 0_u64);
        let records = Records::open(self.home())?;
        records.sweep()?;
        for record in records.list()? {
            match record.state() {
                Ok(VmState::Exited(_) | VmState::Created) => {}
                Ok(VmState::Running | VmState::Restarting(_)) => continue,
                Err(error) => {
                    let vm = &record.config().name;
                    let error = sm_control::with_causes(&error);
                    tracing::warn!(vm, error, "a VM is not removed");
                    continue;
                }
            }
            let bytes = space_of(record.directory());
            let mut vm = Vm::from_record(self, record);
            match vm.remove(Force::No) {
                Ok(()) => {
                    names.push(vm.name().to_owned());
                    freed = freed.saturating_add(bytes);
                }
                Err(error) => tracing::warn!(vm = vm.name(), %error, "a VM is not removed"),
            }
        }
        Ok((names, freed))
    }
}

/// Returns the bytes on disk of the files in a directory and those below it. What
/// disappears meanwhile counts nothing.
fn space_of(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => space_of(&entry.path()),
        Ok(metadata) => metadata.blocks().saturating_mul(512),
        Err(_) => 0,
    });
    sizes.fold(0, u64::saturating_add)
}
