//! How much an image may ask for.

use std::io;

/// What an image may come to. The defaults are above what real images need; they
/// stop decompression bombs, and bound the memory that converting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of a decompressed layer, and of its file contents.
    pub layer_bytes: u64,
    /// Most entries of a layer, and most files and most names of an image.
    pub entries: usize,
    /// Most bytes of a layer's index: paths, link targets, extended attributes.
    pub index_bytes: u64,
    /// Most bytes of an image's names and link targets, and most of its extended
    /// attributes (equal ones count once).
    pub names_bytes: usize,
    /// Most bytes that a byte of the stored layer may become, once it has
    /// become more than [`Self::ratio_floor`] bytes. (Gzip makes 1029 zeros of
    /// one.)
    pub ratio: u64,
    /// Decompressed bytes from which on the ratio counts.
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
    /// None: for what has been taken in already.
    pub(crate) const NONE: Self = Self {
        layer_bytes: u64::MAX,
        entries: usize::MAX,
        index_bytes: u64::MAX,
        names_bytes: usize::MAX,
        ratio: u64::MAX,
        ratio_floor: u64::MAX,
    };

    /// Most bytes of a layer as it is stored: what does not compress becomes a bit
    /// longer, and an archive has its own headers.
    pub(crate) fn stored_bytes(self) -> u64 {
        let more = self.layer_bytes / 64 + (1 << 20);
        self.layer_bytes.saturating_add(more)
    }

    /// Checks the length of what a stream is decompressed from, which may become
    /// nothing at all (RFC 8878 section 3.1.2, "Skippable Frames").
    pub(crate) fn check_stored(self, stored: u64) -> io::Result<()> {
        match stored > self.stored_bytes() {
            true => Err(self.too_large()),
            false => Ok(()),
        }
    }

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

    /// Checks how much a layer's index holds before one more entry.
    pub(crate) fn check_entries(self, entries: u64, bytes: u64) -> Result<(), String> {
        if usize::try_from(entries).is_ok_and(|entries| entries >= self.entries) {
            return Err(format!("it has more than {} entries", self.entries));
        }
        if bytes > self.index_bytes {
            return Err(format!(
                "it has more than {} bytes of names and attributes",
                self.index_bytes
            ));
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
