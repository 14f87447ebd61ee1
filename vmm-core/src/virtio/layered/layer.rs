//! One layer: a header, the index of its clusters, and the clusters, in one sparse file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::index::{Index, LEAF_BYTES};
use crate::virtio::storage::Storage;

/// Length of a cluster in bytes: the unit in which a layer has data or not. That of the
/// guest's file systems, so that most writes fill whole clusters.
pub const CLUSTER: u64 = CLUSTER_BYTES as u64;

pub(super) const CLUSTER_BYTES: usize = 4096;

/// Largest capacity in bytes. ext4 has files of 16 TiB at most.
pub const MAX_CAPACITY: u64 = 8 << 40;

const MAGIC: [u8; 8] = *b"SMLAYER\0";
/// In version 1, clusters followed the index at once.
const VERSION: u32 = 2;
pub(super) const HEADER_BYTES: u64 = 4096;
/// The clusters begin at a multiple of it: Linux keeps a file in its page cache in naturally
/// aligned units of up to this size, so requests touch as few of them as those to a raw file.
const ALIGNMENT: u64 = 2 << 20;

/// Names a layer, so that only the layers that belong together are stacked. Random, and not
/// zeros.
pub type LayerId = [u8; 16];

/// Failure to use a layer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LayerError {
    /// A capacity of zero, of a part of a cluster, or over [`MAX_CAPACITY`].
    #[error("a disk has whole pages of {CLUSTER} bytes, and {MAX_CAPACITY} bytes at most, not {0}")]
    Capacity(u64),
    /// The file is no layer, or a damaged one.
    #[error("it is no layer of a disk: {0}")]
    Format(&'static str),
    /// A layer of a later version of this program.
    #[error("it is a layer of version {0}, this program supports {VERSION}")]
    Version(u32),
    /// The file has a content already.
    #[error("a new layer needs an empty file, this one has {0} bytes")]
    NotEmpty(u64),
    /// The merge was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The layers do not lie upon each other in this order.
    #[error("layer {0} does not belong upon the one below it")]
    Order(usize),
    /// No layer at all, or more than [`MAX_LAYERS`](super::MAX_LAYERS).
    #[error("a disk has 1 to {max} layers, not {0}", max = super::MAX_LAYERS)]
    Count(usize),
    /// The operating system's error.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The first bytes of the file. The rest of its page is zero.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    cluster: U32,
    capacity: U64,
    id: LayerId,
    /// Zeros for the lowest layer.
    parent: LayerId,
}

/// A layer of a disk.
#[derive(Debug)]
pub struct DiskLayer {
    pub(super) storage: Box<dyn Storage>,
    pub(super) index: Index,
    pub(super) capacity: u64,
    /// The first byte of the clusters in the file.
    data: u64,
    pub(super) id: LayerId,
    pub(super) parent: LayerId,
    /// Held during a flush: two disks may have a layer that was just frozen. True if the
    /// file could not be written back.
    flushing: Mutex<bool>,
}

/// The description of a layer in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerHeader {
    /// The name of the layer.
    pub id: LayerId,
    /// The name of the one below it; zeros for the lowest layer.
    pub parent: LayerId,
    /// The capacity in bytes.
    pub capacity: u64,
}

impl LayerHeader {
    /// Reads the header of a layer, but not its index.
    ///
    /// # Errors
    /// As [`DiskLayer::open`].
    pub fn read(file: &File) -> Result<Self, LayerError> {
        read_header(file).map(|(header, _)| header)
    }
}

/// Returns also the first byte of the clusters.
fn read_header(storage: &dyn Storage) -> Result<(LayerHeader, u64), LayerError> {
    let len = storage.len()?;
    if len < HEADER_BYTES {
        return Err(LayerError::Format("it is shorter than a header"));
    }
    let mut header = [0; size_of::<Header>()];
    storage.load(&mut header, 0)?;
    let header: Header = zerocopy::transmute!(header);
    if header.magic != MAGIC {
        return Err(LayerError::Format("it does not begin as one"));
    }
    let version = header.version.get();
    if !(1..=VERSION).contains(&version) {
        return Err(LayerError::Version(version));
    }
    if u64::from(header.cluster.get()) != CLUSTER {
        return Err(LayerError::Format("its clusters have another size"));
    }
    if header.id == LayerId::default() {
        return Err(LayerError::Format("its name is zeros"));
    }
    let capacity = header.capacity.get();
    check_capacity(capacity)?;
    let data = match version {
        1 => index_end(capacity),
        _ => data_start(capacity),
    };
    if len < data + capacity {
        return Err(LayerError::Format("it is shorter than its header says"));
    }
    let header = LayerHeader {
        id: header.id,
        parent: header.parent,
        capacity,
    };
    Ok((header, data))
}

/// Checks a capacity, which is a caller's or a file's.
fn check_capacity(capacity: u64) -> Result<(), LayerError> {
    if capacity == 0 || !capacity.is_multiple_of(CLUSTER) || capacity > MAX_CAPACITY {
        return Err(LayerError::Capacity(capacity));
    }
    Ok(())
}

/// The end of the index in the file.
fn index_end(capacity: u64) -> u64 {
    HEADER_BYTES + Index::file_len(capacity / CLUSTER)
}

/// The first byte of the clusters in a new file.
fn data_start(capacity: u64) -> u64 {
    index_end(capacity).next_multiple_of(ALIGNMENT)
}

impl DiskLayer {
    /// Makes `file`, which must be empty, a layer without clusters. It lies upon `below`, or
    /// is the lowest one. The capacity may be larger than that of `below`; what is past the
    /// end of that reads as zeros.
    ///
    /// Writes one page. The layer is durable after the first
    /// [`flush`](super::LayeredDisk::flush).
    ///
    /// # Errors
    /// An unsuitable capacity, a file that is not empty, or the file's error.
    pub fn create(
        file: File,
        id: LayerId,
        below: Option<LayerId>,
        capacity: u64,
    ) -> Result<Self, LayerError> {
        Self::create_on(Box::new(file), id, below.unwrap_or_default(), capacity)
    }

    pub(super) fn create_on(
        storage: Box<dyn Storage>,
        id: LayerId,
        parent: LayerId,
        capacity: u64,
    ) -> Result<Self, LayerError> {
        check_capacity(capacity)?;
        if id == LayerId::default() {
            return Err(LayerError::Format("its name is zeros"));
        }
        match storage.len()? {
            0 => {}
            len => return Err(LayerError::NotEmpty(len)),
        }
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            // 4,096.
            cluster: U32::new(u32::try_from(CLUSTER).unwrap_or(0)),
            capacity: capacity.into(),
            id,
            parent,
        };
        let data = data_start(capacity);
        storage.extend(data + capacity)?;
        storage.store(header.as_bytes(), 0)?;
        Ok(Self {
            storage,
            index: Index::new(capacity / CLUSTER),
            capacity,
            data,
            id,
            parent,
            flushing: Mutex::new(false),
        })
    }

    /// Reads the header and the index of a layer. Parts of the index that have no clusters
    /// are not read.
    ///
    /// # Errors
    /// The file is no layer, is of a later version, is shorter than its header says, or
    /// cannot be read.
    pub fn open(file: File) -> Result<Self, LayerError> {
        Self::open_on(Box::new(file))
    }

    pub(super) fn open_on(storage: Box<dyn Storage>) -> Result<Self, LayerError> {
        let (header, data) = read_header(&*storage)?;
        let LayerHeader {
            id,
            parent,
            capacity,
        } = header;
        let index = Index::new(capacity / CLUSTER);
        load_index(&*storage, &index, index_end(capacity))?;
        Ok(Self {
            storage,
            index,
            capacity,
            data,
            id,
            parent,
            flushing: Mutex::new(false),
        })
    }

    /// Returns the capacity in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Returns the name of the layer.
    #[must_use]
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The place of a byte of the disk in the file.
    pub(super) fn at(&self, offset: u64) -> u64 {
        self.data + offset
    }

    /// The place of a range of the disk in the file.
    pub(super) fn range(&self, bytes: &Range<u64>) -> Range<u64> {
        self.at(bytes.start)..self.at(bytes.end)
    }

    /// Makes the data durable, and after it the index: what the index has is never older
    /// than the data. The bits of the index in the file only ever change from 0 to 1, so a
    /// page of it that a crash leaves half written is an older index.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut failed = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        if *failed {
            return Err(io::Error::other("an earlier write-back failed"));
        }
        let dirty = self.index.take_dirty();
        let written = self.write_index(&dirty, &mut failed);
        if written.is_err() {
            self.index.mark_dirty(dirty.iter().map(|(leaf, _)| *leaf));
        }
        written
    }

    fn write_index(
        &self,
        dirty: &[(usize, Box<[u8; LEAF_BYTES]>)],
        failed: &mut bool,
    ) -> io::Result<()> {
        let mut sync = || self.storage.sync().inspect_err(|_| *failed = true);
        sync()?;
        if dirty.is_empty() {
            return Ok(());
        }
        for (leaf, bytes) in dirty {
            let at = HEADER_BYTES + (leaf * LEAF_BYTES) as u64;
            self.storage.store(&bytes[..], at)?;
        }
        sync()
    }
}

/// Reads the leaves of the index that the file has.
fn load_index(storage: &dyn Storage, index: &Index, end: u64) -> io::Result<()> {
    let mut at = HEADER_BYTES;
    while at < end {
        let Some(data) = storage.next_data(at..end)? else {
            break;
        };
        // Down and up to whole leaves, as holes need not be.
        let first = (data.start - HEADER_BYTES) / LEAF_BYTES as u64;
        let last = (data.end - HEADER_BYTES).div_ceil(LEAF_BYTES as u64);
        for leaf in first..last {
            let mut bytes = [0; LEAF_BYTES];
            storage.load(&mut bytes, HEADER_BYTES + leaf * LEAF_BYTES as u64)?;
            index.load(usize::try_from(leaf).unwrap_or(usize::MAX), &bytes);
        }
        at = HEADER_BYTES + last * LEAF_BYTES as u64;
    }
    Ok(())
}
