//! Merging of a disk's layers, so that its chain stays short however often it is frozen.
//!
//! The steps, at each of which a crash leaves the disk as it is: the merged layer is written
//! to a file of its own and made durable; it takes the name of the highest layer that it
//! replaces; the directory is made durable; the files of the others are removed. Layers are
//! hard links, so snapshots that have them keep them.

use std::fs::{self, File};
use std::ops::Range;
use std::sync::atomic::AtomicBool;

use sm_vmm_core::virtio::layered::{DiskLayer, LayerId, LayeredDisk};

use super::chain::{MERGING, remove_file};
use super::{DiskDirectory, DiskError, create, io_error, layer_error};

/// Number of layers from which on a disk is not frozen before some were merged.
pub(crate) const MOST: usize = 16;

/// Number of layers above which some are merged when there is time.
const MANY: usize = 12;

/// Number of layers of which some are merged in need, as there may be none to merge without
/// crossing a border.
const FEW: usize = 8;

/// Returns the layers to merge, if `disk` has many, or, in need, if it has more than a few.
/// The lowest layer, which all disks of its size share, is none of them, and none up to
/// `border` is merged with one above it: a reset goes back to that.
///
/// Of all neighbours, those with the fewest bytes for the square of the number of layers
/// that are saved: many layers of about the same size, so that few bytes are copied twice.
/// In a simulation of 2,000 snapshots that write the same amount each, a byte is copied 4
/// times; with the fewest bytes for the number of layers, 27 times.
pub(crate) fn layers_to_merge(
    disk: &LayeredDisk,
    in_need: bool,
    border: Option<LayerId>,
) -> Option<Range<usize>> {
    let count = disk.layers();
    if count <= if in_need { FEW } else { MANY } {
        return None;
    }
    let top = count - 1;
    let border = border.and_then(|border| disk.ids().iter().position(|id| *id == border));
    let border = border.map_or(1, |border| border + 1).min(top);
    let windows = [1..border, border..top].into_iter().flat_map(|part| {
        let starts = part.clone();
        starts.flat_map(move |start| (start + 2..=part.end).map(move |end| start..end))
    });
    // Each layer is examined once, though it is in many windows.
    let bytes: Vec<u64> = (0..top)
        .map(|layer| disk.bytes_of_layers(layer..layer + 1))
        .collect();
    windows.min_by_key(|layers| {
        let saved = layers.len() as u64 - 1;
        let copied: u64 = bytes.iter().take(layers.end).skip(layers.start).sum();
        copied / (saved * saved)
    })
}

impl DiskDirectory {
    /// Writes the merged layer. The disk may be used and frozen meanwhile.
    ///
    /// # Errors
    /// A file cannot be written, or it is cancelled; no file is left.
    pub(crate) fn write_merged(
        &self,
        disk: &LayeredDisk,
        layers: Range<usize>,
        cancelled: &AtomicBool,
    ) -> Result<DiskLayer, DiskError> {
        let path = self.path.join(MERGING);
        remove_file(&path)?;
        let merged = disk.merge(layers, create(&path)?, cancelled);
        if merged.is_err() {
            remove_file(&path)?;
        }
        merged.map_err(layer_error(&path))
    }

    /// Puts the merged layer in the place of the layers of which it is made, and returns
    /// `disk` with it. Those are removed by [`Self::remove_merged`].
    ///
    /// # Errors
    /// The disk does not have these layers any more, or the file cannot be renamed. Nothing
    /// has changed then.
    pub(crate) fn adopt_merged(
        &self,
        disk: &LayeredDisk,
        merged: DiskLayer,
    ) -> Result<LayeredDisk, DiskError> {
        let path = self.path.join(MERGING);
        let id = merged.id();
        let fewer = disk.with_merged(merged).map_err(layer_error(&path));
        let adopted = fewer.and_then(|fewer| {
            let files = self.files_of(&disk.ids())?;
            let place = disk.ids().iter().position(|layer| *layer == id);
            let place = place.and_then(|place| files.get(place));
            let place = place.map_or(&path, |file| &file.path);
            fs::rename(&path, place).map_err(io_error("rename", &path))?;
            Ok(fewer)
        });
        if adopted.is_err() {
            remove_file(&path)?;
        }
        adopted
    }

    /// Makes the names of the layers durable.
    ///
    /// # Errors
    /// The directory cannot be written back.
    pub(crate) fn sync(&self) -> Result<(), DiskError> {
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(io_error("write back", &self.path))
    }

    /// Removes the files of layers that `disk` does not have any more, after [`Self::sync`].
    ///
    /// # Errors
    /// One cannot be removed.
    pub(crate) fn remove_merged(&self, disk: &LayeredDisk) -> Result<(), DiskError> {
        self.sweep(&self.files_of(&disk.ids())?)
    }

    /// Merges layers of a disk that has [`MOST`], and that nobody else may use meanwhile.
    ///
    /// # Errors
    /// A file cannot be written, renamed or removed.
    pub(super) fn merge_if_full(&self, disk: LayeredDisk) -> Result<LayeredDisk, DiskError> {
        let layers = layers_to_merge(&disk, true, None);
        let Some(layers) = layers.filter(|_| disk.layers() >= MOST) else {
            return Ok(disk);
        };
        let merged = self.write_merged(&disk, layers, &AtomicBool::new(false))?;
        let fewer = self.adopt_merged(&disk, merged)?;
        self.sync()?;
        self.remove_merged(&fewer)?;
        Ok(fewer)
    }
}
