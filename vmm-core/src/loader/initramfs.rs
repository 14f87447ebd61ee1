//! The initramfs: consecutive archives at the end of low memory.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{HIGH_MEMORY, LoadError, copy_from_file, low_memory_end, widen, write};
use crate::memory::{MachineMemory, PAGE_SIZE};

/// One cpio archive, possibly compressed. The kernel unpacks all parts in order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum InitramfsPart {
    /// A file, read when the machine boots.
    File(PathBuf),
    /// Bytes in memory.
    Bytes(Arc<[u8]>),
}

impl InitramfsPart {
    fn name(&self) -> String {
        match self {
            Self::File(path) => format!("\"{}\"", path.display()),
            Self::Bytes(bytes) => format!("{} bytes in memory", bytes.len()),
        }
    }

    fn error(&self, source: io::Error) -> LoadError {
        LoadError::ReadInitramfs {
            part: self.name(),
            source,
        }
    }
}

/// Position of the initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InitramfsRange {
    pub(super) address: u64,
    pub(super) len: u64,
}

enum Opened<'a> {
    File(File, u64),
    Bytes(&'a [u8]),
}

impl Opened<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Bytes(bytes) => widen(bytes.len()),
        }
    }
}

/// Archives start at multiples of four; the kernel skips zeros between them.
fn padded(len: u64) -> Option<u64> {
    len.checked_next_multiple_of(4)
}

/// Copies all parts to the highest address below `limit` and the hole, above `kernel_end`.
/// Returns `None` if there are no parts.
pub(super) fn load(
    memory: &MachineMemory,
    parts: &[InitramfsPart],
    kernel_end: u64,
    limit: u64,
) -> Result<Option<InitramfsRange>, LoadError> {
    let mut opened = Vec::with_capacity(parts.len());
    let mut len = 0u64;
    for part in parts {
        let source = match part {
            InitramfsPart::File(path) => {
                let file = File::open(path).map_err(|error| part.error(error))?;
                let len = file.metadata().map_err(|error| part.error(error))?.len();
                Opened::File(file, len)
            }
            InitramfsPart::Bytes(bytes) => Opened::Bytes(bytes),
        };
        len = padded(source.len())
            .and_then(|part| len.checked_add(part))
            .unwrap_or(u64::MAX);
        opened.push((part, source));
    }
    if len == 0 {
        return Ok(None);
    }

    let floor = kernel_end.max(HIGH_MEMORY);
    let address = low_memory_end(memory)
        .min(limit)
        .checked_sub(len)
        .map(|start| start & !(PAGE_SIZE - 1))
        .filter(|&start| start >= floor)
        .ok_or(LoadError::NoRoom {
            what: "the initramfs",
            address: floor,
            bytes: len,
        })?;

    let mut to = address;
    for (part, source) in opened {
        let part_len = source.len();
        match source {
            Opened::File(mut file, len) => copy_from_file(&memory.guest, &mut file, 0, to, len)
                .map_err(|error| part.error(error))?,
            Opened::Bytes(bytes) => write(&memory.guest, "the initramfs", to, bytes)?,
        }
        to += padded(part_len).unwrap_or(part_len);
    }
    Ok(Some(InitramfsRange { address, len }))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::MemoryConfig;

    fn memory() -> MachineMemory {
        MachineMemory::anonymous(&MemoryConfig::new(64 << 20)).unwrap()
    }

    fn bytes(bytes: &[u8]) -> InitramfsPart {
        InitramfsPart::Bytes(bytes.into())
    }

    #[test]
    fn parts_follow_each_other_at_multiples_of_four() {
        let memory = memory();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("second");
        std::fs::write(&path, b"second").unwrap();
        let parts = [bytes(b"first"), InitramfsPart::File(path), bytes(b"x")];
        let placed = load(&memory, &parts, 0, u64::MAX).unwrap().unwrap();
        assert_eq!(placed.len, 8 + 8 + 4);
        assert_eq!(placed.address, (64 << 20) - 4096);
        let mut all = [0u8; 20];
        memory
            .guest
            .read_slice(&mut all, GuestAddress(placed.address))
            .unwrap();
        assert_eq!(&all, b"first\0\0\0second\0\0x\0\0\0");
    }

    #[test]
    fn no_parts_is_no_initramfs() {
        assert_eq!(load(&memory(), &[], 0, u64::MAX).unwrap(), None);
        assert_eq!(load(&memory(), &[bytes(b"")], 0, u64::MAX).unwrap(), None);
    }

    #[test]
    fn it_stays_above_the_kernel_and_below_the_limit() {
        let memory = memory();
        let part = bytes(&[1; 8192]);
        let limit = 0x20_0000;
        let fits = load(&memory, std::slice::from_ref(&part), limit - 8192, limit);
        assert_eq!(fits.unwrap().unwrap().address, limit - 8192);
        for kernel_end in [limit - 8191, limit, u64::MAX] {
            let result = load(&memory, std::slice::from_ref(&part), kernel_end, limit);
            assert!(matches!(result, Err(LoadError::NoRoom { .. })));
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let part = InitramfsPart::File("/nonexistent/initrd".into());
        let error = load(&memory(), &[part], 0, u64::MAX).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/initrd"), "{error}");
    }
}
