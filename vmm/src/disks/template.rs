//! Empty file systems, made once for each size and shared by all disks of that size.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};

use mkext4::{FsBuilder, Meta, Options, ROOT, RegionSink};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sm_vmm_core::virtio::layered::{DiskLayer, LayerError, LayeredDisk};

use super::{DiskError, create, io_error, layer_error, new_id};

/// Version of the content of templates, in their names. That of `mkext4` is fixed, as its
/// releases differ in bytes.
const VERSION: u32 = 1;

/// Directory in the file system below which everything is stored: `lost+found` is not in it,
/// which programs that expect an empty directory refuse.
const DATA: &str = "data";

/// 2026-01-01, the time of everything in a template.
const EPOCH: i64 = 1_767_225_600;

const BLOCK: u64 = 4096;

/// Largest journal in blocks. A journal is a ring, all of which is written to in the course
/// of time, so this is disk space of each VM.
const JOURNAL_BLOCKS: u64 = 8192;

/// The templates of a user.
#[derive(Clone, Debug)]
pub struct Templates {
    directory: PathBuf,
}

impl Templates {
    /// Returns the templates in the directory for data of a user.
    #[must_use]
    pub fn new(data: &Path) -> Self {
        Self {
            directory: data.join("disks"),
        }
    }

    /// Returns the layer with an empty file system of `bytes`, and creates it if it is
    /// missing.
    ///
    /// # Errors
    /// No file system has this size, or the file cannot be written.
    pub fn get(&self, bytes: u64) -> Result<PathBuf, DiskError> {
        let path = self
            .directory
            .join(format!("ext4-v{VERSION}-{}k.layer", bytes >> 10));
        if path.try_exists().map_err(io_error("examine", &path))? {
            return Ok(path);
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(io_error("create directory", &self.directory))?;
        let fresh = tempfile::Builder::new()
            .prefix("tmp-")
            .tempfile_in(&self.directory)
            .map_err(io_error("create a file in", &self.directory))?;
        let file = fresh
            .as_file()
            .try_clone()
            .map_err(io_error("create a file in", &self.directory))?;
        format(file, bytes, fresh.path())?;
        match fresh.persist_noclobber(&path) {
            // Another process may have been first, with the same file system.
            Err(failed) if failed.error.kind() != io::ErrorKind::AlreadyExists => {
                Err(io_error("create", &path)(failed.error))
            }
            _ => Ok(path),
        }
    }
}

/// Makes `file` a layer with an empty ext4 file system, durably.
fn format(file: File, bytes: u64, path: &Path) -> Result<(), DiskError> {
    let failed = |source: mkext4::Error| DiskError::Format {
        bytes,
        source: source.into(),
    };
    let mut options = Options::new(bytes, [0x5a; 16], EPOCH);
    // The guest's root may use everything: there is no other user to keep space for.
    options.reserved_percent = 0;
    options.label = Some("sm".to_owned());
    let journal = (bytes / BLOCK / 8).clamp(1024, JOURNAL_BLOCKS);
    options.journal_blocks = u32::try_from(journal).ok();
    let mut builder = FsBuilder::new(options).map_err(failed)?;
    let meta = Meta::new(0o755, 0, 0, (EPOCH, 0));
    builder.mkdir(ROOT, DATA, meta).map_err(failed)?;
    let layout = builder.seal().map_err(failed)?;
    let layer = DiskLayer::create(file, new_id(), None, bytes).map_err(layer_error(path))?;
    let disk = LayeredDisk::new(vec![layer]).map_err(layer_error(path))?;
    let mut sink = LayerSink(&disk);
    let written = layout.writer(&mut sink).and_then(|writer| writer.finish());
    written.map(drop).map_err(failed)?;
    disk.flush()
        .map_err(LayerError::from)
        .map_err(layer_error(path))
}

struct LayerSink<'a>(&'a LayeredDisk);

impl RegionSink for LayerSink<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.store(bytes, offset)
    }

    fn zeros(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        // A layer without a cluster reads as zeros.
        Ok(())
    }
}

/// Copies a file without its holes.
pub(super) fn copy_sparse(source: &Path, target: &Path) -> Result<(), DiskError> {
    let from = File::open(source).map_err(io_error("open", source))?;
    let to = create(target)?;
    let copied = copy_data(&from, &to).map_err(io_error("copy", source));
    if copied.is_err() {
        let _ = fs::remove_file(target);
    }
    copied
}

fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    to.set_len(len)?;
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    loop {
        at = match seek(from, SeekFrom::Data(at)) {
            Ok(at) => at,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(at))?;
        // Not copy_file_range(2), which some file systems refuse between two of them.
        while at < end {
            let most = (end - at).min(buffer.len() as u64);
            let part = buffer.get_mut(..usize::try_from(most).unwrap_or(0));
            let part = part.unwrap_or_default();
            from.read_exact_at(part, at)?;
            to.write_all_at(part, at)?;
            at += most;
        }
    }
    to.sync_data()
}
