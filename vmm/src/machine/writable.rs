//! The writable disks of a machine: for changes to its root, and of volumes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sm_control::config::LaunchConfig;
use sm_control::with_causes;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::SLOT_DATA_DISK;
use sm_vmm_core::virtio::blk::{Access, Block, NotLayered};
use sm_vmm_core::virtio::disk::Disk;
use sm_vmm_core::virtio::layered::{DiskLayer, LayerId, LayeredDisk};
use thiserror::Error;

use super::merging::MergePlan;
use crate::capturing::FrozenDisk;
use crate::disks::merging;
use crate::disks::volume::{self, VolumeUse, VolumeWriter};
use crate::disks::{DiskDirectory, DiskError, Templates};
use crate::environment::VmRecord;

/// Size of the queues of the two kinds. Linux allocates requests for the whole queue, also
/// of a device without a disk.
const CHANGES_QUEUE: u16 = 256;
const VOLUME_QUEUE: u16 = 64;

/// Capacity in bytes of a volume without a name.
const ANONYMOUS_BYTES: u64 = 64 << 30;

/// Free space in bytes with which requests that had none are executed again: some of the
/// largest requests.
const ENOUGH: u64 = 16 << 20;

/// Free space in bytes that a merge leaves.
const SPARE: u64 = 256 << 20;

/// Failure to replace the layers of the disk.
#[derive(Debug, Error)]
enum ReplaceError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    NotLayered(#[from] NotLayered),
}

/// The device in the slot of a writable disk, with or without a disk.
pub(super) struct WritableDisk {
    slot: u32,
    block: Arc<Mutex<Block>>,
    directory: DiskDirectory,
    /// The highest layer of the snapshot that the machine continues.
    restored: Option<LayerId>,
    /// The disk to insert after the base snapshot was captured.
    waiting: Option<LayeredDisk>,
    /// Keeps other VMs from a volume, exclusively if it is written to.
    lock: Option<(File, VolumeAccess)>,
}

/// Access of a VM to its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum VolumeAccess {
    Read,
    Write,
}

/// A volume that a VM mounts.
pub(super) struct VolumeMount<'a> {
    pub(super) name: &'a str,
    /// `None` for a disk in the record of the VM.
    pub(super) directory: Option<&'a Path>,
    pub(super) read_only: bool,
}

/// The end of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskEnd {
    /// It stays when the VM has ended.
    Kept,
    /// It is removed with the VM, so the guest's flushes need not reach the device: a host
    /// that crashes ends the VM, too. (Snapshots make their layers durable themselves.)
    Removed,
}

impl DiskEnd {
    /// Returns the end of the disks in the record of a VM.
    pub(super) fn of_record(config: &LaunchConfig) -> Self {
        match config.auto_remove {
            true => Self::Removed,
            false => Self::Kept,
        }
    }
}

/// A disk from the start on, one that is inserted later, or none.
pub(super) enum Insertion {
    Never,
    Later(LayeredDisk),
    /// The disk consists of the layers of a snapshot, and a top.
    Now(LayeredDisk),
}

impl WritableDisk {
    pub(super) fn new(
        slot: u32,
        directory: DiskDirectory,
        insertion: Insertion,
        end: DiskEnd,
        no_space: impl Fn() + Send + 'static,
    ) -> Self {
        let is_empty = matches!(insertion, Insertion::Never);
        let (now, waiting, restored) = match insertion {
            Insertion::Never => (Disk::empty(), None, None),
            Insertion::Later(disk) => (Disk::empty(), Some(disk), None),
            Insertion::Now(disk) => {
                let restored = disk.ids().iter().rev().nth(1).copied();
                (Disk::layered(disk), None, restored)
            }
        };
        let (name, queue) = match slot {
            SLOT_DATA_DISK => ("changes".to_owned(), CHANGES_QUEUE),
            _ => (format!("volume-{slot}"), VOLUME_QUEUE),
        };
        let block = Block::new(now, Access::ReadWrite, &name)
            .queue_size(queue)
            .ignore_flushes(end == DiskEnd::Removed)
            .hold_without_space(no_space);
        let block = match is_empty {
            true => block.without_doorbells(),
            false => block,
        };
        Self {
            slot,
            block: Arc::new(Mutex::new(block)),
            directory,
            restored,
            waiting,
            lock: None,
        }
    }

    /// Creates the device of the volume that `mount` names, which is inserted later.
    ///
    /// # Errors
    /// Another VM uses the volume, or it cannot be opened; a sentence.
    pub(super) fn of_volume(
        slot: u32,
        mount: &VolumeMount<'_>,
        record: &dyn VmRecord,
        config: &LaunchConfig,
        templates: &Templates,
        no_space: impl Fn() + Send + 'static,
    ) -> Result<Self, String> {
        let own = DiskDirectory::new(record.directory(), slot);
        let Some(directory) = mount.directory else {
            let template = || templates.get(ANONYMOUS_BYTES);
            let disk = open_or_create(&own, template)
                .map_err(|error| format!("cannot use the VM's disk: {}", with_causes(&error)))?;
            let end = DiskEnd::of_record(config);
            return Ok(Self::new(slot, own, Insertion::Later(disk), end, no_space));
        };
        let writer = VolumeWriter {
            name: &config.name,
            id: config.id.as_str(),
        };
        let (how, access) = match mount.read_only {
            true => (VolumeUse::Read(&own), VolumeAccess::Read),
            false => (VolumeUse::Write(&writer), VolumeAccess::Write),
        };
        let name = mount.name;
        let used = volume::open(directory, how)
            .map_err(|error| format!("cannot use volume \"{name}\": {}", with_causes(&error)))?;
        let Some(used) = used else {
            let by = volume::writer(&directory.join("lock")).map(|(name, id)| {
                // It may have another name by now.
                let now = id.and_then(|id| record.name_of(&id));
                format!(" by VM \"{}\"", now.unwrap_or(name))
            });
            let by = by.unwrap_or_default();
            return Err(format!(
                "volume \"{name}\" is in use{by}: one VM at a time can write to a volume, \
                 and nobody can read it meanwhile"
            ));
        };
        let later = Insertion::Later(used.disk);
        Ok(Self {
            lock: Some((used.lock, access)),
            ..Self::new(slot, used.directory, later, DiskEnd::Kept, no_space)
        })
    }

    pub(super) fn device(&self) -> DeviceConfig {
        DeviceConfig::new(self.slot, self.block.clone())
    }

    pub(super) fn slot(&self) -> u32 {
        self.slot
    }

    fn block(&self) -> MutexGuard<'_, Block> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells other VMs that want the volume that it will soon be free.
    pub(super) fn is_ending(&self) {
        if let Some((lock, VolumeAccess::Write)) = &self.lock
            && let Err(error) = volume::mark_as_ending(lock)
        {
            tracing::warn!(%error, "the next user of a volume does not wait for it");
        }
    }

    /// Inserts the disk, if one waits for it.
    pub(super) fn insert(&mut self) {
        if let Some(disk) = self.waiting.take() {
            self.block().set_disk(Disk::layered(disk));
        }
    }

    /// Returns true if the host has some space for it, or cannot tell.
    pub(super) fn has_space(&self) -> bool {
        self.directory
            .free_bytes()
            .is_none_or(|free| free >= ENOUGH)
    }

    /// Returns true if layers have to be merged before the disk is frozen.
    pub(super) fn is_full(&self) -> bool {
        let backing = self.block().disk().clone();
        backing
            .layers()
            .is_some_and(|disk| disk.layers() >= merging::MOST && self.to_merge(true).is_some())
    }

    /// Returns the layers to merge, if there are many, or, in need, if there are more than
    /// a few: with the directory, and the disk of which they are.
    pub(super) fn to_merge(&self, in_need: bool) -> Option<MergePlan> {
        let disk = self.block().disk().clone();
        let layers = merging::layers_to_merge(disk.layers()?, in_need, self.restored)?;
        // Without space for the copy, and for what the guest writes meanwhile.
        let needed = disk.layers()?.bytes_of_layers(layers.clone());
        let free = self.directory.free_bytes();
        if free.is_some_and(|free| free < needed.saturating_add(SPARE)) {
            tracing::warn!(needed, "no space to merge layers of a disk");
            return None;
        }
        Some(MergePlan {
            slot: self.slot,
            directory: self.directory.clone(),
            disk,
            layers,
        })
    }

    /// Puts a merged layer in its place, beside requests.
    ///
    /// # Errors
    /// The disk was reset meanwhile, or the file cannot be renamed; nothing is changed then.
    pub(super) fn adopt(&self, merged: DiskLayer) -> Result<(), String> {
        let mut block = self.block();
        let replaced: Result<(), ReplaceError> =
            block.replace_layers(|disk| Ok(self.directory.adopt_merged(disk, merged)?));
        replaced.map_err(|error| with_causes(&error))
    }

    /// Removes the layers that were merged.
    pub(super) fn remove_merged(&self) {
        let backing = self.block().disk().clone();
        let Some(disk) = backing.layers() else { return };
        if let Err(error) = self.directory.remove_merged(disk) {
            tracing::warn!(error = with_causes(&error), "merged layers are not removed");
        }
    }

    /// Freezes the layers of a paused machine; `None` if it has no disk.
    ///
    /// # Errors
    /// A new layer cannot be created; a clause. Nothing is changed then.
    pub(super) fn freeze(&self) -> Result<Option<FrozenDisk>, String> {
        let mut block = self.block();
        let backing = block.disk().clone();
        let Some(disk) = backing.layers() else {
            return Ok(None);
        };
        let mut layers = self.directory.layers_of(disk).map_err(cannot_freeze)?;
        if disk.is_unchanged() {
            layers.pop();
        } else {
            let replaced: Result<(), ReplaceError> =
                block.replace_layers(|disk| Ok(self.directory.grow(disk)?));
            replaced.map_err(cannot_freeze)?;
        }
        Ok(Some(FrozenDisk {
            slot: self.slot,
            layers,
            backing,
        }))
    }

    /// Discards all changes since the snapshot that the machine continues. The machine is
    /// paused.
    ///
    /// # Errors
    /// The layers cannot be opened or created; a clause.
    pub(super) fn reset(&self) -> Result<(), String> {
        let mut block = self.block();
        if block.disk().layers().is_none() {
            return Ok(());
        }
        let Some(restored) = self.restored else {
            return Err("cannot reset its disk: it is of no snapshot".to_owned());
        };
        let reset: Result<(), ReplaceError> =
            block.replace_layers(|_| Ok(self.directory.truncate(restored)?));
        reset.map_err(|error| format!("cannot reset its disk: {}", with_causes(&error)))
    }
}

fn cannot_freeze(error: impl std::error::Error) -> String {
    format!("cannot freeze its disk: {}", with_causes(&error))
}

/// Returns the disk of a machine that boots or starts from a base snapshot: that of an
/// earlier run, or a new one over `template`.
///
/// # Errors
/// The disk cannot be opened or created.
pub(super) fn open_or_create(
    directory: &DiskDirectory,
    template: impl FnOnce() -> Result<PathBuf, DiskError>,
) -> Result<LayeredDisk, DiskError> {
    if directory.exists()? {
        return directory.open();
    }
    directory.create(&[template()?])
}
