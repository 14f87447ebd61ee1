//! Initial RAM file systems: a cpio archive in the `newc` format (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_755;
const DEVICE: u32 = 0o020_600;
const FILE: u32 = 0o100_000;

/// An archive being written.
#[derive(Default)]
pub(crate) struct CpioArchive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl CpioArchive {
    pub(crate) fn directory(&mut self, path: &str) -> Result<()> {
        self.entry(path, DIRECTORY, (0, 0), &[])
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entry(path, FILE | mode, (0, 0), data)
    }

    pub(crate) fn character_device(&mut self, path: &str, number: (u32, u32)) -> Result<()> {
        self.entry(path, DEVICE, number, &[])
    }

    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let size = u32::try_from(data.len()).context("too long for an initramfs")?;
        let name_size = u32::try_from(path.len() + 1).context("too long a name")?;
        self.inodes += 1;
        self.bytes.extend_from_slice(b"070701");
        let fields = [
            self.inodes,
            mode,
            0, // owner
            0, // group
            1, // links
            0, // modification time
            size,
            0, // device the file is on
            0,
            device.0,
            device.1,
            name_size,
            0, // checksum, unused in this format
        ];
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::CpioArchive;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = CpioArchive::default();
        archive.directory("d").unwrap();
        archive.file("d/f", 0o755, b"12345").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<_> = (0..bytes.len())
            .filter(|at| bytes[*at..].starts_with(b"070701"))
            .collect();
        assert_eq!(starts.len(), 3);
        assert!(starts.iter().all(|at| at % 4 == 0));
        assert!(bytes[starts[2]..].windows(10).any(|w| w == b"TRAILER!!!"));
    }
}
