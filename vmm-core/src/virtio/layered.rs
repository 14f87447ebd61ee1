//! A disk of sparse layers: read-only ones, and a writable one on top.
//!
//! A layer has some of the disk's clusters of [`CLUSTER`] bytes; the topmost layer that has
//! a cluster provides it, and a cluster that no layer has is zeros. A new, empty top
//! *freezes* the layer below it, at the same cost for every size: this makes a snapshot of
//! a disk on any file system.
//!
//! # Crashes
//! A flush makes the clusters durable first and the index of the top, which says what the
//! layer has, after it. Of what was not flushed, any part may be lost, as by a disk with a
//! volatile cache (virtio 1.3, section 5.2.6.2). The file may then have bytes in clusters
//! that the index lacks; they are never read, and a write to a part of such a cluster
//! writes the rest of it, too.
//!
//! A write to a cluster that no layer has also gives the top the holes after it (as many as
//! fit in a group), so that the index changes once for many writes with flushes.
//!
//! Layers that an earlier process wrote may be in the page cache only, so the first flush of
//! a disk is one of all its layers.
//!
//! # Concurrency
//! Any thread may call everything. A write that gives the top a new cluster holds the lock
//! of the cluster's `GROUP` of clusters, because a write to a part of it copies the rest
//! from below: without the lock, the copy could overwrite what another thread wrote.

mod index;
mod layer;
mod merge;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test disks are small")]
mod tests;
mod verify;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;

use super::storage::{Storage, saturated};

use layer::CLUSTER_BYTES;
pub use layer::{CLUSTER, DiskLayer, LayerError, LayerHeader, LayerId, MAX_CAPACITY};

/// Largest number of layers of one disk: each costs every read a look into its index.
pub const MAX_LAYERS: usize = 64;

/// Clusters that one lock is for: 1 MiB.
const GROUP: u64 = 256;
const LOCKS: usize = 32;

/// A disk of layers.
///
/// ```
/// use sm_vmm_core::virtio::layered::{DiskLayer, LayeredDisk};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let file = || tempfile::tempfile();
/// let base = DiskLayer::create(file()?, [1; 16], None, 64 << 30)?;
/// let disk = LayeredDisk::new(vec![base])?;
/// assert_eq!(disk.capacity(), 64 << 30);
///
/// // What was written so far belongs to a layer that does not change any more.
/// let disk = disk.freeze(file()?, [2; 16], 64 << 30)?;
/// assert_eq!(disk.layers(), 2);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LayeredDisk {
    top: Arc<DiskLayer>,
    /// From the topmost one down.
    below: Vec<Arc<DiskLayer>>,
    groups: Arc<[Mutex<()>; LOCKS]>,
    /// Layers below the top that may not be durable, the lowest one first.
    unflushed: Arc<Mutex<Vec<Arc<DiskLayer>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The clusters that `bytes` touches.
fn touched(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / CLUSTER..bytes.end.div_ceil(CLUSTER)
}

/// The bytes of `clusters`.
fn bytes_of(clusters: &Range<u64>) -> Range<u64> {
    clusters.start * CLUSTER..clusters.end * CLUSTER
}

/// The clusters that lie in `bytes` as a whole, and the rest before and after them.
fn split(bytes: &Range<u64>) -> (Range<u64>, [Range<u64>; 2]) {
    let whole = bytes.start.div_ceil(CLUSTER)..bytes.end / CLUSTER;
    if whole.is_empty() {
        // In one cluster, or on both sides of a border.
        let border = bytes.end.min(bytes.start.next_multiple_of(CLUSTER));
        return (0..0, [bytes.start..border, border..bytes.end]);
    }
    let middle = bytes_of(&whole);
    (whole, [bytes.start..middle.start, middle.end..bytes.end])
}

/// The first of `layers` that has `cluster`, and for how many clusters, `most` at most.
fn find_in(layers: &[Arc<DiskLayer>], cluster: u64, most: u64) -> (Option<&DiskLayer>, u64) {
    let mut most = most;
    for layer in layers {
        let (has, len) = layer.index.run(cluster, most);
        most = len;
        if has {
            return (Some(layer), most);
        }
    }
    (None, most)
}

impl LayeredDisk {
    /// Stacks layers, the lowest one first. The last one is written to.
    ///
    /// # Errors
    /// No layer, too many, or layers that do not belong upon each other.
    pub fn new(layers: Vec<DiskLayer>) -> Result<Self, LayerError> {
        let count = layers.len();
        let mut stack: Vec<_> = layers.into_iter().rev().map(Arc::new).collect();
        if stack.is_empty() {
            return Err(LayerError::Count(count));
        }
        let top = stack.remove(0);
        let disk = Self::stacked(top, stack)?;
        let below = disk.below.iter().rev().cloned();
        lock(&disk.unflushed).extend(below);
        Ok(disk)
    }

    fn stacked(top: Arc<DiskLayer>, below: Vec<Arc<DiskLayer>>) -> Result<Self, LayerError> {
        let count = below.len() + 1;
        if count > MAX_LAYERS {
            return Err(LayerError::Count(count));
        }
        let mut upper = &top;
        for (depth, lower) in below.iter().enumerate() {
            if upper.parent != lower.id || lower.capacity > upper.capacity {
                return Err(LayerError::Order(count - depth));
            }
            upper = lower;
        }
        if upper.parent != LayerId::default() {
            return Err(LayerError::Order(1));
        }
        Ok(Self {
            top,
            below,
            groups: Arc::new([const { Mutex::new(()) }; LOCKS]),
            unflushed: Arc::default(),
        })
    }

    /// Returns the capacity in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.top.capacity
    }

    /// Returns true if nothing was written since the top was created.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        self.top.index.is_empty()
    }

    /// Returns the number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.below.len() + 1
    }

    /// Returns the names of the layers, the lowest one first.
    #[must_use]
    pub fn ids(&self) -> Vec<LayerId> {
        let below = self.below.iter().rev();
        below.chain([&self.top]).map(|layer| layer.id).collect()
    }

    /// Returns the disk with a new top in `file`, as [`DiskLayer::create`] makes it. Takes
    /// the same time for every size, and waits for no device: the frozen layer is durable
    /// after the next flush of either disk. This disk must not be written to any more, which
    /// the caller ensures.
    ///
    /// # Errors
    /// As [`DiskLayer::create`], a capacity below that of this disk, or too many layers;
    /// this disk can still be used then.
    pub fn freeze(&self, file: File, id: LayerId, capacity: u64) -> Result<Self, LayerError> {
        self.freeze_on(Box::new(file), id, capacity)
    }

    fn freeze_on(
        &self,
        storage: Box<dyn Storage>,
        id: LayerId,
        capacity: u64,
    ) -> Result<Self, LayerError> {
        let top = DiskLayer::create_on(storage, id, self.top.id, capacity)?;
        let mut below = Vec::with_capacity(self.layers());
        below.push(Arc::clone(&self.top));
        below.extend(self.below.iter().cloned());
        let thawed = Self::stacked(Arc::new(top), below)?;
        let mut unflushed = lock(&self.unflushed).clone();
        unflushed.push(Arc::clone(&self.top));
        *lock(&thawed.unflushed) = unflushed;
        Ok(thawed)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        match offset.checked_add(len) {
            Some(end) if end <= self.capacity() => Ok(offset..end),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "access past the end of the disk",
            )),
        }
    }

    /// The layer below the top that provides `cluster`, and for how many clusters, `most`
    /// at most.
    fn find_below(&self, cluster: u64, most: u64) -> (Option<&DiskLayer>, u64) {
        find_in(&self.below, cluster, most)
    }

    /// The layer that provides `cluster`, and for how many clusters, `most` at most.
    fn find(&self, cluster: u64, most: u64) -> (Option<&DiskLayer>, u64) {
        match self.top.index.run(cluster, most) {
            (true, len) => (Some(&self.top), len),
            (false, len) => self.find_below(cluster, len),
        }
    }

    /// Fills `window` from `offset` on.
    ///
    /// # Errors
    /// An access past the end of the disk, or a file's error.
    pub fn read(&self, memory: &GuestMemory, window: Window<'_>, offset: u64) -> io::Result<()> {
        self.for_each_run(memory, window, offset, |layer, part, at| {
            layer.storage.read(memory, part, at).map(|()| true)
        })?;
        Ok(())
    }

    /// Fills `window` from `offset` on if that is possible without waiting for a device.
    /// Returns `Ok(false)` if it is not; a part of the window may then have been filled.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_cached(
        &self,
        memory: &GuestMemory,
        window: Window<'_>,
        offset: u64,
    ) -> io::Result<bool> {
        self.for_each_run(memory, window, offset, |layer, part, at| {
            layer.storage.read_cached(memory, part, at)
        })
    }

    fn for_each_run(
        &self,
        memory: &GuestMemory,
        mut window: Window<'_>,
        offset: u64,
        mut read: impl FnMut(&DiskLayer, Window<'_>, u64) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let bytes = self.check(offset, window.len().into())?;
        let mut at = bytes.start;
        while at < bytes.end {
            let clusters = touched(&(at..bytes.end));
            let (layer, count) = self.find(clusters.start, clusters.end - clusters.start);
            let end = ((clusters.start + count) * CLUSTER).min(bytes.end);
            let part = window.take(saturated(end - at));
            match layer {
                Some(layer) if !read(layer, part, layer.at(at))? => return Ok(false),
                Some(_) => {}
                None => part.zero(memory)?,
            }
            window.advance(part.len());
            at = end;
        }
        Ok(true)
    }

    /// Writes `window` from `offset` on.
    ///
    /// # Errors
    /// An access past the end, or a file's error; the range then has a part of the new
    /// bytes, and everything around it is as before.
    pub fn write(
        &self,
        memory: &GuestMemory,
        mut window: Window<'_>,
        offset: u64,
    ) -> io::Result<()> {
        let bytes = self.check(offset, window.len().into())?;
        let mut at = bytes.start;
        while at < bytes.end {
            let group = at / CLUSTER / GROUP;
            let end = ((group + 1) * GROUP * CLUSTER).min(bytes.end);
            let part = window.take(saturated(end - at));
            self.write_group(memory, part, &(at..end))?;
            window.advance(part.len());
            at = end;
        }
        Ok(())
    }

    /// Writes bytes of this process from `offset` on, as [`Self::write`] does those of the
    /// guest.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn store(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let range = self.check(offset, bytes.len() as u64)?;
        let mut rest = bytes;
        let mut at = range.start;
        while at < range.end {
            let group = at / CLUSTER / GROUP;
            let end = ((group + 1) * GROUP * CLUSTER).min(range.end);
            let len = usize::try_from(end - at).unwrap_or(rest.len());
            let (part, after) = rest.split_at(len.min(rest.len()));
            self.put(&(at..end), || self.top.storage.store(part, self.top.at(at)))?;
            (rest, at) = (after, end);
        }
        Ok(())
    }

    fn group_lock(&self, cluster: u64) -> MutexGuard<'_, ()> {
        let group = usize::try_from(cluster / GROUP % LOCKS as u64).unwrap_or(0);
        lock(&self.groups[group])
    }

    /// Writes to clusters of one group.
    fn write_group(
        &self,
        memory: &GuestMemory,
        window: Window<'_>,
        bytes: &Range<u64>,
    ) -> io::Result<()> {
        let at = self.top.at(bytes.start);
        self.put(bytes, || self.top.storage.write(memory, window, at))
    }

    /// Calls `write`, which writes all of `bytes`, in clusters of one group.
    fn put(&self, bytes: &Range<u64>, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let clusters = touched(bytes);
        if self.top.index.has_all(&clusters) {
            return write();
        }
        let _new = self.group_lock(clusters.start);
        self.fill_ends(bytes)?;
        write()?;
        let end = self.end_of_zeros(clusters.end);
        self.top.index.insert(clusters.start..end);
        Ok(())
    }

    /// Returns the end of the clusters from `at` on, in one group, that no layer has and that
    /// are holes in the file of the top. They are zeros whether the top has them or not; if it
    /// has, a flush of what is written to them next does not have to write the index.
    fn end_of_zeros(&self, at: u64) -> u64 {
        let end = at.next_multiple_of(GROUP).min(self.capacity() / CLUSTER);
        let (layer, count) = self.find(at, end.saturating_sub(at));
        if layer.is_some() || count == 0 {
            return at;
        }
        let range = self.top.range(&bytes_of(&(at..at + count)));
        let start = range.start;
        match self.top.storage.next_data(range) {
            Ok(None) => at + count,
            // Written before a crash, and never flushed.
            Ok(Some(data)) => at + (data.start - start) / CLUSTER,
            Err(_) => at,
        }
    }

    /// Copies the first and the last cluster of `bytes` into the top, as far as `bytes`
    /// has only a part of them and the top lacks them. They are not in the index yet.
    fn fill_ends(&self, bytes: &Range<u64>) -> io::Result<()> {
        let clusters = touched(bytes);
        let (first, last) = (clusters.start, clusters.end - 1);
        let starts_within = !bytes.start.is_multiple_of(CLUSTER);
        let ends_within = !bytes.end.is_multiple_of(CLUSTER);
        if starts_within || (ends_within && first == last) {
            self.fill(first)?;
        }
        if ends_within && first != last {
            self.fill(last)?;
        }
        Ok(())
    }

    /// Copies a cluster from below into the top, if that lacks it. Zeros are copied, too:
    /// the file may have other bytes there, which were never flushed.
    fn fill(&self, cluster: u64) -> io::Result<()> {
        if self.top.index.has_all(&(cluster..cluster + 1)) {
            return Ok(());
        }
        let mut bytes = [0; CLUSTER_BYTES];
        let offset = cluster * CLUSTER;
        if let (Some(layer), _) = self.find_below(cluster, 1) {
            layer.storage.load(&mut bytes, layer.at(offset))?;
        }
        self.top.storage.store(&bytes, self.top.at(offset))
    }

    /// Makes earlier writes durable.
    ///
    /// # Errors
    /// The file's error. If it has no space, a later call may succeed. After any other error,
    /// every later call fails, too: Linux reports once that it could not write pages back,
    /// and then drops them.
    pub fn flush(&self) -> io::Result<()> {
        let mut unflushed = lock(&self.unflushed);
        while let Some(lowest) = unflushed.first() {
            lowest.flush()?;
            unflushed.remove(0);
        }
        self.top.flush()
    }

    /// Makes a range read as zero, and returns its space to the file system.
    ///
    /// # Errors
    /// `Unsupported` if the file system has no holes; a range past the end; the file's
    /// error.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let bytes = self.check(offset, len)?;
        let (whole, ends) = split(&bytes);
        if !whole.is_empty() {
            let _new = self.locks_of(&whole);
            self.top.storage.punch(self.top.range(&bytes_of(&whole)))?;
            self.hide(&whole);
        }
        ends.iter().try_for_each(|end| self.zero_part(end))
    }

    /// Makes a range read as zero; with `unmap`, also returns its space, if the file system
    /// supports it.
    ///
    /// # Errors
    /// A range past the end; the file's error.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            match self.discard(offset, len) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                other => return other,
            }
        }
        let bytes = self.check(offset, len)?;
        let (whole, ends) = split(&bytes);
        if !whole.is_empty() {
            let _new = self.locks_of(&whole);
            let range = self.top.range(&bytes_of(&whole));
            self.top.storage.make_zero(range)?;
            self.top.index.insert(whole);
        }
        ends.iter().try_for_each(|end| self.zero_part(end))
    }

    /// The locks of all groups of `clusters`, in the order of their numbers, so that two
    /// callers never wait for each other.
    fn locks_of(&self, clusters: &Range<u64>) -> Vec<MutexGuard<'_, ()>> {
        let groups = clusters.start / GROUP..clusters.end.div_ceil(GROUP);
        let count = groups.end - groups.start;
        let locks = (0u64..).zip(self.groups.iter());
        let is_of = |number: u64| {
            let first = groups.start % LOCKS as u64;
            let distance = (number + LOCKS as u64 - first) % LOCKS as u64;
            distance < count
        };
        let wanted = locks.filter(|(number, _)| is_of(*number));
        wanted.map(|(_, group)| lock(group)).collect()
    }

    /// Gives the top those of `clusters`, which are holes in it, that a layer below has.
    fn hide(&self, clusters: &Range<u64>) {
        let mut at = clusters.start;
        while at < clusters.end {
            let (layer, count) = self.find_below(at, clusters.end - at);
            if layer.is_some() {
                self.top.index.insert(at..at + count);
            }
            at += count;
        }
    }

    /// Makes a part of one cluster zeros.
    fn zero_part(&self, bytes: &Range<u64>) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let clusters = touched(bytes);
        let _new = self.group_lock(clusters.start);
        if let (None, _) = self.find(clusters.start, 1) {
            return Ok(());
        }
        self.fill(clusters.start)?;
        self.top.storage.store_zeroes(self.top.range(bytes))?;
        self.top.index.insert(clusters);
        Ok(())
    }
}
