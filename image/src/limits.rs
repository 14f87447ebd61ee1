//! Resource limits of images.

use std::io;

use crate::error::{Cause, ErrorKind};

/// Resource limits of images. The defaults exceed the needs of real images; they stop
/// decompression bombs, and bound the memory of conversions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Maximum size of a decompressed layer, and of its file contents, in bytes.
    pub layer_bytes: u64,
    /// Maximum number of entries of a layer, and of files and of names of an image.
    pub entries: usize,
    /// Maximum size of a layer's index in bytes: paths, link targets, extended
    /// attributes.
    pub index_bytes: u64,
    /// Maximum size of an image's names and link targets in bytes, and of its extended
    /// attributes (equal ones count once).
    pub names_bytes: usize,
    /// Maximum ratio between decompressed and stored bytes of a layer, which applies
    /// above [`Self::ratio_floor`] bytes. (Gzip compresses up to 1029 zeros to a byte.)
    pub ratio: u64,
    /// Number of decompressed bytes above which the ratio applies.
    pub ratio_floor: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layer_bytes: 64 << 30,
            entries: 768 << 10,
            index_bytes: 1 << 30,
            names_bytes: 32 << 20,
            ratio: 1000,
            ratio_floor: 1 << 30,
        }
    }
}

impl Limits {
    /// No limits, for data that has been accepted before.
    pub(crate) const NONE: Self = Self {
        layer_bytes: u64::MAX,
        entries: usize::MAX,
        index_bytes: u64::MAX,
        names_bytes: usize::MAX,
        ratio: u64::MAX,
        ratio_floor: u64::MAX,
    };

    /// Returns the maximum size of a stored layer in bytes. Incompressible data grows
    /// slightly, and an archive has headers.
    pub(crate) fn stored_bytes(self) -> u64 {
        let more = self.layer_bytes / 64 + (1 << 20);
        self.layer_bytes.saturating_add(more)
    }

    /// Checks the length of a stored stream, which may decompress to nothing (RFC 8878
    /// section 3.1.2, "Skippable Frames").
    pub(crate) fn check_stored(self, stored: u64) -> io::Result<()> {
        match stored > self.stored_bytes() {
            true => Err(self.too_large()),
            false => Ok(()),
        }
    }

    /// Checks the length of a decompressed stream so far against the number of stored
    /// bytes read.
    pub(crate) fn check_stream(self, plain: u64, stored: u64) -> io::Result<()> {
        if plain > self.layer_bytes {
            return Err(self.too_large());
        }
        if plain > self.ratio_floor && plain / self.ratio.max(1) > stored {
            return Err(io::Error::other(exceeded(format!(
                "it decompresses to more than {} times its size",
                self.ratio
            ))));
        }
        Ok(())
    }

    /// Checks the size of a layer's index before another entry is added.
    pub(crate) fn check_entries(self, entries: u64, bytes: u64) -> Result<(), Cause> {
        if usize::try_from(entries).is_ok_and(|entries| entries >= self.entries) {
            return Err(exceeded(format!(
                "it has more than {} entries",
                self.entries
            )));
        }
        if bytes > self.index_bytes {
            return Err(exceeded(format!(
                "it has more than {} bytes of names and attributes",
                self.index_bytes
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
        io::Error::other(exceeded(format!(
            "it has more than {} bytes",
            self.layer_bytes
        )))
    }
}

fn exceeded(text: String) -> Cause {
    Cause::new(ErrorKind::LimitExceeded, text)
}
