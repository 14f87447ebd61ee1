//! The files of a disk that belong to it: those that lie upon each other, by their headers.
//!
//! A merge gives a new file the name of the highest layer that it replaces, at once; the
//! files of the others stay for a moment, or, if the process is killed, until the disk is
//! opened. So numbers have gaps, and a file may be of no use: **the layer with the highest
//! number is the topmost one, and each names the one below it.**

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sm_vmm_core::virtio::layered::{LayerError, LayerHeader, LayerId};

use super::{DiskDirectory, DiskError, io_error, layer_error};

/// Name of the file that a merge writes to.
pub(super) const MERGING: &str = "merging";

/// A layer in the directory.
#[derive(Clone, Debug)]
pub(super) struct LayerFile {
    pub(super) number: usize,
    pub(super) path: PathBuf,
}

pub(super) fn header(path: &Path) -> Result<LayerHeader, DiskError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    LayerHeader::read(&file).map_err(layer_error(path))
}

impl DiskDirectory {
    /// All files with a number, the highest one first.
    pub(super) fn numbered(&self) -> Result<Vec<LayerFile>, DiskError> {
        let failed = || io_error("list", &self.path);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            let number = name.to_str().and_then(|name| {
                let number: usize = name.parse().ok()?;
                (number.to_string() == name).then_some(number)
            });
            if let Some(number) = number {
                let path = self.layer(number);
                files.push(LayerFile { number, path });
            }
        }
        files.sort_by_key(|file| std::cmp::Reverse(file.number));
        Ok(files)
    }

    /// Those of `files`, the highest one first, that lie upon each other; the lowest one
    /// first. A host that crashed may have lost the content of a new layer. Nothing of it was
    /// flushed then, nor of those above it, which a flush makes durable after it: they are
    /// none of them.
    pub(super) fn chain(&self, files: &[LayerFile]) -> Result<Vec<LayerFile>, DiskError> {
        let mut chain = Vec::new();
        let mut wanted: Option<LayerId> = None;
        for (place, file) in files.iter().enumerate() {
            if place + 1 < files.len() && is_empty_layer(&file.path)? {
                chain.clear();
                wanted = None;
                continue;
            }
            let header = header(&file.path)?;
            if wanted.is_none_or(|wanted| wanted == header.id) {
                chain.push(file.clone());
                wanted = Some(header.parent);
            }
        }
        match wanted {
            Some(below) if below == LayerId::default() => {}
            None => return Err(layer_error(&self.path)(LayerError::Count(0))),
            Some(_) => return Err(layer_error(&self.path)(LayerError::Order(1))),
        }
        chain.reverse();
        Ok(chain)
    }

    /// The files of the layers with these names, the lowest one first. Others may lie above
    /// them or between them.
    pub(super) fn files_of(&self, ids: &[LayerId]) -> Result<Vec<LayerFile>, DiskError> {
        let mut wanted = ids.iter().rev().peekable();
        let mut found = Vec::with_capacity(ids.len());
        for file in self.numbered()? {
            // One above them may be the rest of a failure.
            let id = match header(&file.path) {
                Ok(header) => header.id,
                Err(_) if found.is_empty() => continue,
                Err(error) => return Err(error),
            };
            if wanted.next_if(|wanted| **wanted == id).is_some() {
                found.push(file);
            }
        }
        if wanted.peek().is_some() {
            return Err(layer_error(&self.path)(LayerError::Order(1)));
        }
        found.reverse();
        Ok(found)
    }

    /// Removes all files but those of `chain`.
    pub(super) fn sweep(&self, chain: &[LayerFile]) -> Result<(), DiskError> {
        let unused = self.numbered()?.into_iter().filter(|file| {
            let is_used = |layer: &LayerFile| layer.number == file.number;
            !chain.iter().any(is_used)
        });
        for file in unused {
            remove_file(&file.path)?;
        }
        remove_file(&self.path.join(MERGING))
    }
}

/// Removes a file, if there is one.
pub(super) fn remove_file(path: &Path) -> Result<(), DiskError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Returns true if the file begins with zeros: it was created, and its header is not on the
/// disk.
fn is_empty_layer(path: &Path) -> Result<bool, DiskError> {
    use io::Read as _;

    let mut start = Vec::new();
    File::open(path)
        .and_then(|file| file.take(64).read_to_end(&mut start))
        .map_err(io_error("read", path))?;
    Ok(start.iter().all(|byte| *byte == 0))
}
