//! The disks that are compared: a raw file, and disks of layers.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use sm_vmm_core::virtio::disk::Disk;
use sm_vmm_core::virtio::layered::{CLUSTER, DiskLayer, LayeredDisk};
use vm_memory::GuestAddress;

/// Capacity in bytes of each disk of a comparison.
pub(crate) const CAPACITY: u64 = 128 << 20;

/// Bytes of the longest request.
const LONGEST: u32 = 1 << 20;

/// A layout of clusters among the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One file without layers.
    Raw,
    /// A template, and one layer above it that has everything.
    Fresh,
    /// Eight layers, each with an eighth of the disk or more, at any place.
    Deep,
    /// Eight layers of which no two neighbouring clusters come from the same one: the worst
    /// case.
    Scattered,
}

impl Layout {
    pub(crate) const ALL: [Self; 4] = [Self::Raw, Self::Fresh, Self::Deep, Self::Scattered];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw file",
            Self::Fresh => "fresh",
            Self::Deep => "8 layers",
            Self::Scattered => "8, scattered",
        }
    }
}

/// Numbers that are the same in each run (xorshift64).
#[derive(Debug)]
pub(crate) struct Scatter(u64);

impl Scatter {
    pub(crate) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Files for disks, and memory for requests.
pub(crate) struct Bench {
    directory: PathBuf,
    memory: GuestMemory,
    ids: u128,
}

impl Bench {
    pub(crate) fn new(directory: PathBuf) -> Result<Self> {
        let ranges = [(GuestAddress(0), usize::try_from(LONGEST)?)];
        let memory = GuestMemory::from_ranges(&ranges).context("cannot map memory")?;
        Ok(Self {
            directory,
            memory,
            ids: 0,
        })
    }

    pub(crate) fn file(&self) -> Result<File> {
        let directory = &self.directory;
        tempfile::tempfile_in(directory).with_context(|| format!("no file in {directory:?}"))
    }

    /// A name for a layer.
    pub(crate) fn id(&mut self) -> [u8; 16] {
        self.ids += 1;
        self.ids.to_le_bytes()
    }

    /// A disk without contents.
    pub(crate) fn empty(&mut self, layout: Layout) -> Result<Disk> {
        if layout == Layout::Raw {
            let file = self.file()?;
            file.set_len(CAPACITY)?;
            return Ok(Disk::raw(file, false)?);
        }
        let template = DiskLayer::create(self.file()?, self.id(), None, CAPACITY)?;
        let disk = LayeredDisk::new(vec![template])?;
        Ok(Disk::layered(self.above(&disk)?))
    }

    /// `disk` with an empty top.
    pub(crate) fn above(&mut self, disk: &LayeredDisk) -> Result<LayeredDisk> {
        let (file, id) = (self.file()?, self.id());
        Ok(disk.freeze(file, id, disk.capacity())?)
    }

    /// A disk of which every cluster was written, by the same requests for all layouts but
    /// [`Layout::Scattered`]: the page cache has units of the size of requests. First the whole
    /// disk in order, then seven times an eighth of it at any place.
    pub(crate) fn written(&mut self, layout: Layout) -> Result<Disk> {
        let mut disk = self.empty(layout)?;
        let mut scatter = Scatter::new();
        for pass in 0..8 {
            if let (Layout::Deep | Layout::Scattered, Some(layers)) = (layout, disk.layers())
                && pass > 0
            {
                disk = Disk::layered(self.above(layers)?);
            }
            if layout == Layout::Scattered {
                let each = usize::try_from(8 * CLUSTER)?;
                for offset in (pass * CLUSTER..CAPACITY).step_by(each) {
                    self.write(&disk, offset, u32::try_from(CLUSTER)?)?;
                }
                continue;
            }
            let mut written = 0;
            while written < CAPACITY / if pass == 0 { 1 } else { 8 } {
                let offset = match pass {
                    0 => written,
                    _ => scatter.below(CAPACITY / CLUSTER) * CLUSTER,
                };
                // As many of each power of two.
                let len = (CLUSTER << scatter.below(9)).min(CAPACITY - offset);
                self.write(&disk, offset, u32::try_from(len)?)?;
                written += len;
            }
        }
        disk.flush()?;
        Ok(disk)
    }

    pub(crate) fn write(&self, disk: &Disk, offset: u64, len: u32) -> Result<()> {
        let spans = span(len);
        disk.write(&self.memory, Window::new(&spans, 0, u32::MAX), offset)?;
        Ok(())
    }

    /// Reads as the block device does: what is in the page cache, at once.
    pub(crate) fn read(&self, disk: &Disk, offset: u64, len: u32) -> Result<()> {
        let spans = span(len);
        let window = Window::new(&spans, 0, u32::MAX);
        if !disk.read_cached(&self.memory, window, offset)? {
            disk.read(&self.memory, window, offset)?;
        }
        Ok(())
    }
}

fn span(len: u32) -> [Span; 1] {
    let address = GuestAddress(0);
    [Span { address, len }]
}
