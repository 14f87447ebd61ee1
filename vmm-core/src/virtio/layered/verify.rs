//! Verification of a layer's file.

use super::index::{LEAF_BYTES, LEAF_CLUSTERS};
use super::layer::{CLUSTER, DiskLayer, HEADER_BYTES, LayerError};

/// Bytes that are read at a time.
const PIECE: u64 = 1 << 20;

impl DiskLayer {
    /// Reads all clusters of the layer, without its holes; returns the bytes that were read.
    /// Their contents have no digests, so this finds what cannot be read, and an index that
    /// does not fit.
    ///
    /// # Errors
    /// The index has clusters past the end of the disk, or the file cannot be read.
    pub fn verify(&self) -> Result<u64, LayerError> {
        let clusters = self.capacity / CLUSTER;
        self.verify_end_of_index(clusters)?;
        let mut buffer = Vec::new();
        let mut bytes = 0;
        let mut at = 0;
        while at < clusters {
            let (has, count) = self.index.run(at, clusters - at);
            if has {
                let run = self.at(at * CLUSTER)..self.at((at + count) * CLUSTER);
                let mut start = run.start;
                while start < run.end
                    && let Some(data) = self.storage.next_data(start..run.end)?
                {
                    start = (data.start + PIECE).min(data.end);
                    let len = start - data.start;
                    buffer.resize(usize::try_from(len).unwrap_or(0), 0);
                    self.storage.load(&mut buffer, data.start)?;
                    bytes += len;
                }
            }
            at += count;
        }
        Ok(bytes)
    }

    fn verify_end_of_index(&self, clusters: u64) -> Result<(), LayerError> {
        let beyond = clusters % LEAF_CLUSTERS;
        if beyond == 0 {
            return Ok(());
        }
        let mut leaf = [0; LEAF_BYTES];
        let at = HEADER_BYTES + clusters / LEAF_CLUSTERS * LEAF_BYTES as u64;
        self.storage.load(&mut leaf, at)?;
        let bits = (0u64..).zip(&leaf).flat_map(|(byte, bits)| {
            let set = (0..8).filter(move |bit| bits >> bit & 1 == 1);
            set.map(move |bit| byte * 8 + bit)
        });
        match bits.last() {
            Some(last) if last >= beyond => Err(LayerError::Format(
                "its index has clusters past the end of the disk",
            )),
            _ => Ok(()),
        }
    }
}
