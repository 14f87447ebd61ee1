//! How much an image may ask for.

use std::io;

/// Limits of one layer. They are far above what real images need; they stop
/// decompression bombs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of a decompressed layer, and of its file contents.
    pub layer_bytes: u64,
    /// Most entries of a layer.
    pub entries: usize,
    /// Most bytes that a byte of the stored layer may become, once it has
    /// become more than [`Self::ratio_floor`] bytes. (Gzip cannot exceed 1032.)
    pub ratio: u64,
    /// Decompressed bytes from which on the ratio counts.
    pub ratio_floor: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layer_bytes: 64 << 30,
            entries: 4 << 20,
            ratio: 1500,
            ratio_floor: 1 << 30,
        }
    }
}

impl Limits {
    /// Checks the length of a decompressed stream so far against that of what
    /// it was decompressed from.
    pub(crate) fn check_stream(self, plain: u64, stored: u64) -> io::Result<()> {
        if plain > self.layer_bytes {
            return Err(self.too_large());
        }
        if plain > self.ratio_floor && plain / self.ratio.max(1) > stored {
            return Err(io::Error::other(format!(
                "it decompresses to more than {} times its size",
                self.ratio
            )));
        }
        Ok(())
    }

    /// Checks the length of file contents so far.
    pub(crate) fn check_contents(self, len: u64) -> io::Result<()> {
        match len > self.layer_bytes {
            true => Err(self.too_large()),
            false => Ok(()),
        }
    }

    fn too_large(self) -> io::Error {
        io::Error::other(format!("it has more than {} bytes", self.layer_bytes))
    }
}
