//! Verification of layers that do not change any more.

use std::path::PathBuf;

use sm_vmm_core::virtio::layered::LayeredDisk;

use super::{DiskError, layer_error, open_layer};

/// Statistics of verified disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedDisks {
    /// Number of files with layers.
    pub layers: usize,
    /// Bytes of their contents that were read.
    pub bytes: u64,
}

impl VerifiedDisks {
    /// Verifies the layers of one more disk, the lowest one first: headers, indexes, the
    /// order of the layers, and that all contents can be read.
    ///
    /// # Errors
    /// The first problem.
    pub(crate) fn add(&mut self, layers: &[PathBuf]) -> Result<(), DiskError> {
        let mut opened = Vec::with_capacity(layers.len());
        for path in layers {
            let layer = open_layer(path, false)?;
            self.bytes += layer.verify().map_err(layer_error(path))?;
            self.layers += 1;
            opened.push(layer);
        }
        let highest = layers.last().cloned().unwrap_or_default();
        LayeredDisk::new(opened).map_err(layer_error(&highest))?;
        Ok(())
    }
}
