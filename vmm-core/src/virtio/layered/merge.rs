//! Merging of layers, so that a disk that is frozen often does not get slow.
//!
//! Some layers in the middle of a disk become one, in a new file: they are immutable, and
//! snapshots may have them as well. It has the name of the highest of them and the parent of
//! the lowest one, so it takes their place under the layer that lies upon them. Both chains
//! of layers are the same disk, at any time.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::layer::{CLUSTER, DiskLayer, LayerError, LayerId};
use super::{LayeredDisk, bytes_of, find_in};
use crate::virtio::storage::Storage;

/// Bytes that are copied at a time; the merge can be cancelled in between.
const PIECE: u64 = 1 << 20;

/// Bytes after which the copy is written back, so that neither the end of a merge nor its
/// cancelling waits for much.
const WRITE_BACK: u64 = 64 << 20;

/// A copy in progress.
struct Merge<'a> {
    merged: DiskLayer,
    /// A layer below has what the merged one lacks.
    has_parent: bool,
    cancelled: &'a AtomicBool,
    buffer: Vec<u8>,
    /// Bytes since the last write-back.
    unwritten: u64,
}

impl LayeredDisk {
    /// Returns the bytes that merging `layers` would copy, at most: `0` is the lowest layer.
    #[must_use]
    pub fn bytes_of_layers(&self, layers: Range<usize>) -> u64 {
        let layers = self.slice(&layers).unwrap_or_default();
        let bytes = layers.iter().map(|layer| {
            let clusters = layer.index.count() * CLUSTER;
            // Holes are not copied.
            clusters.min(layer.storage.allocated().unwrap_or(clusters))
        });
        bytes.sum()
    }

    /// The layers of these numbers, of which `0` is the lowest one, from the topmost one down.
    /// The top of the disk is none of them.
    fn slice(&self, layers: &Range<usize>) -> Option<&[Arc<DiskLayer>]> {
        let count = self.below.len();
        let from = count.checked_sub(layers.end)?;
        self.below.get(from..count.checked_sub(layers.start)?)
    }

    /// Writes a layer with the content of `layers`, at least two of those below the top, to
    /// `file`, which must be empty, and makes it durable. The disk does not change and may be
    /// used meanwhile. Takes time for each byte that the layers have.
    ///
    /// # Errors
    /// [`LayerError::Cancelled`] soon after `cancelled` is set; other layers; a file's error.
    pub fn merge(
        &self,
        layers: Range<usize>,
        file: File,
        cancelled: &AtomicBool,
    ) -> Result<DiskLayer, LayerError> {
        self.merge_on(layers, Box::new(file), cancelled)
    }

    pub(super) fn merge_on(
        &self,
        layers: Range<usize>,
        storage: Box<dyn Storage>,
        cancelled: &AtomicBool,
    ) -> Result<DiskLayer, LayerError> {
        let slice = self.slice(&layers).unwrap_or_default();
        let [upper, .., lowest] = slice else {
            return Err(LayerError::Count(slice.len()));
        };
        let mut merge = Merge {
            merged: DiskLayer::create_on(storage, upper.id, lowest.parent, upper.capacity)?,
            has_parent: lowest.parent != LayerId::default(),
            cancelled,
            buffer: Vec::new(),
            unwritten: 0,
        };
        let end = upper.capacity / CLUSTER;
        let mut at = 0;
        while at < end {
            let (layer, count) = find_in(slice, at, end - at);
            if let Some(layer) = layer {
                merge.copy(layer, &(at..at + count))?;
            }
            at += count;
        }
        merge.merged.flush()?;
        Ok(merge.merged)
    }

    /// Returns this disk with `merged`, a result of [`Self::merge`], in the place of the
    /// layers of which it is made. Both disks may be used at the same time, as they are the
    /// same one.
    ///
    /// # Errors
    /// This disk has not all of these layers any more.
    pub fn with_merged(&self, merged: DiskLayer) -> Result<Self, LayerError> {
        let upper = self.below.iter().position(|layer| layer.id == merged.id);
        let lowest = self
            .below
            .iter()
            .position(|layer| layer.parent == merged.parent);
        let (Some(upper), Some(lowest)) = (upper, lowest) else {
            return Err(LayerError::Order(self.layers()));
        };
        if lowest < upper || self.below[upper].capacity != merged.capacity {
            return Err(LayerError::Order(self.layers() - 1 - upper));
        }
        let mut below = self.below.clone();
        below.splice(upper..=lowest, [Arc::new(merged)]);
        let mut disk = Self::stacked(Arc::clone(&self.top), below)?;
        // The same top is written to, by requests of both.
        disk.groups = Arc::clone(&self.groups);
        disk.unflushed = Arc::clone(&self.unflushed);
        Ok(disk)
    }
}

impl Merge<'_> {
    /// Copies clusters of `layer`, without its holes.
    fn copy(&mut self, layer: &DiskLayer, clusters: &Range<u64>) -> Result<(), LayerError> {
        let bytes = bytes_of(clusters);
        let mut at = bytes.start;
        while at < bytes.end {
            let rest = layer.range(&(at..bytes.end));
            let Some(data) = layer.storage.next_data(rest.clone())? else {
                break;
            };
            // The file has its clusters at multiples of their size, as the disk has.
            let skipped = (data.start - rest.start) / CLUSTER * CLUSTER;
            let len = (data.end - rest.start).next_multiple_of(CLUSTER) - skipped;
            let end = (at + skipped + len).min(bytes.end);
            self.copy_data(layer, at + skipped..end)?;
            at = end;
        }
        if self.has_parent {
            // Also the holes: they hide what is below.
            self.merged.index.insert(clusters.clone());
        }
        Ok(())
    }

    fn copy_data(&mut self, layer: &DiskLayer, bytes: Range<u64>) -> Result<(), LayerError> {
        let mut at = bytes.start;
        while at < bytes.end {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(LayerError::Cancelled);
            }
            let end = (at + PIECE).min(bytes.end);
            self.buffer
                .resize(usize::try_from(end - at).unwrap_or(0), 0);
            layer.storage.load(&mut self.buffer, layer.at(at))?;
            let merged = &self.merged;
            merged.storage.store(&self.buffer, merged.at(at))?;
            merged.index.insert(at / CLUSTER..end / CLUSTER);
            self.unwritten += end - at;
            if self.unwritten >= WRITE_BACK {
                self.unwritten = 0;
                merged.storage.sync()?;
            }
            at = end;
        }
        Ok(())
    }
}
