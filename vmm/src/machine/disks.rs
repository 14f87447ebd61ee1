//! The disks of a machine that starts as planned.

use sm_control::launch::{DiskSegment, LaunchRequest, MountSource};
use sm_snapshot::manifest::Layer;
use sm_vmm_core::layout::{SLOT_DATA_DISK, SLOTS_VOLUMES};
use sm_vmm_core::virtio::disk::{Disk, FileSegment};

use super::failed;
use super::writable::{self, DiskEnd, Insertion, VolumeMount, WritableDisk};
use crate::disks::{DiskDirectory, Templates};
use crate::environment::{VmRecord, VmmEnvironment};
use crate::failure::StartFailure;
use crate::guest::{EventSender, SupervisorEvent};
use crate::source::{ResolvedSource, StartPlan};

/// Returns the disk for changes to the root, for a machine that starts as planned.
pub(super) fn changes(
    request: &LaunchRequest,
    record: &dyn VmRecord,
    plan: &StartPlan,
    events: EventSender,
) -> Result<WritableDisk, String> {
    let directory = DiskDirectory::of_root(record.directory());
    let insertion = match (&plan.source, plan.restored()) {
        (ResolvedSource::Snapshot { saved, .. }, Some(Layer::Image | Layer::App)) => {
            match saved.disk(SLOT_DATA_DISK) {
                Some(layers) => {
                    // A VM that continues the snapshot once more has the disk of its last run.
                    let disk = directory.remove().and_then(|()| directory.create(&layers));
                    let disk = disk.map_err(failed("use the disk of the snapshot"))?;
                    Insertion::Now(disk)
                }
                None => Insertion::Never,
            }
        }
        _ => match request.root_disk {
            Some(bytes) if !request.config.read_only => {
                let template = || Templates::new(&request.data).get(bytes);
                let disk = writable::open_or_create(&directory, template);
                Insertion::Later(disk.map_err(failed("use the VM's disk"))?)
            }
            _ => Insertion::Never,
        },
    };
    let no_space = move || events.send(SupervisorEvent::NoSpace);
    let slot = SLOT_DATA_DISK;
    let end = DiskEnd::of_record(&request.config);
    Ok(WritableDisk::new(slot, directory, insertion, end, no_space))
}

/// Returns the disks of volumes, in the order of the request's mounts, and those without a
/// volume.
///
/// # Errors
/// A volume is in use or cannot be opened, or there are too many; a sentence.
pub(super) fn volumes(
    request: &LaunchRequest,
    record: &dyn VmRecord,
    plan: &StartPlan,
    events: &EventSender,
) -> Result<Vec<WritableDisk>, StartFailure> {
    let mut wanted = request
        .mounts
        .iter()
        .filter_map(|mount| match &mount.source {
            MountSource::Volume {
                name, directory, ..
            } => Some(VolumeMount {
                name,
                directory: directory.as_deref(),
                read_only: mount.read_only,
            }),
            MountSource::Host { .. } | MountSource::Tmpfs { .. } => None,
        });
    let templates = Templates::new(&request.data);
    let end = DiskEnd::of_record(&request.config);
    let mut disks = Vec::new();
    for slot in SLOTS_VOLUMES {
        let events = events.clone();
        let no_space = move || events.send(SupervisorEvent::NoSpace);
        let directory = DiskDirectory::new(record.directory(), slot);
        let saved = match &plan.source {
            ResolvedSource::Snapshot { saved, .. } => saved.disk(slot),
            ResolvedSource::Kernel { .. } => None,
        };
        disks.push(match (saved, wanted.next()) {
            // A clone has a copy of the volume of its original.
            (Some(layers), _) => {
                let disk = directory.remove().and_then(|()| directory.create(&layers));
                let disk = disk.map_err(failed("use a disk of the snapshot"))?;
                WritableDisk::new(slot, directory, Insertion::Now(disk), end, no_space)
            }
            (None, Some(volume)) => {
                let config = &request.config;
                WritableDisk::of_volume(slot, &volume, record, config, &templates, no_space)?
            }
            (None, None) => WritableDisk::new(slot, directory, Insertion::Never, end, no_space),
        });
    }
    if wanted.next().is_some() {
        let most = SLOTS_VOLUMES.count();
        return Err(format!("a VM has at most {most} volumes").into());
    }
    Ok(disks)
}

/// Returns the read-only disk of the image.
pub(super) fn root(
    environment: &dyn VmmEnvironment,
    segments: &[DiskSegment],
) -> Result<Disk, String> {
    let mut opened = Vec::with_capacity(segments.len());
    for segment in segments {
        let file = environment
            .open_segment(segment)
            .map_err(failed("open a part of the image"))?;
        opened.push(FileSegment {
            file,
            offset: segment.offset,
            len: segment.len,
        });
    }
    Disk::composite(opened).map_err(failed("assemble the root disk"))
}
