//! Compressed kernels by the 64-bit Linux boot protocol
//! (`Documentation/arch/x86/boot.rst` and `zero-page.rst`).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use sm_hypervisor::state::x86_64::BootRegisters;

use super::{
    BootSource, HIGH_MEMORY, LoadError, MapEntry, at, copy_from_file, initramfs, low_memory_end,
    memory_map, registers, write,
};
use crate::memory::MachineMemory;

/// Length of the file's first part that contains the whole setup header, in bytes.
const HEAD_LEN: usize = 0x290;
/// First byte of the setup header, in the file and in the zero page.
const HEADER_START: usize = 0x1f1;
/// Oldest protocol with 64-bit entry, `init_size` and payload fields.
const OLDEST_VERSION: u16 = 0x20c;
/// `XLF_KERNEL_64`.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry point from the kernel's load address.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// Offsets in the zero page outside the setup header.
mod zero_page {
    pub(super) const ACPI_RSDP: usize = 0x70;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const VIDEO_MODE: usize = 0x1fa;
    pub(super) const BOOT_LOADER: usize = 0x210;
    pub(super) const RAMDISK_ADDRESS: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const COMMAND_LINE: usize = 0x228;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// Returns true if `head` (at least 0x206 bytes, if the file has them) starts a bzImage.
pub(super) fn has_magic(head: &[u8]) -> bool {
    head.get(0x1fe..0x200) == Some(b"\x55\xaa") && head.get(0x202..0x206) == Some(b"HdrS")
}

/// The fields of the setup header that loading uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetupHeader {
    /// The header as it is in the file, for the kernel.
    raw: Vec<u8>,
    /// Offset in the file of the code to load.
    pub(super) code_offset: u64,
    /// Offset of the compressed kernel from `code_offset`.
    pub(super) payload_offset: u64,
    /// Length of the compressed kernel.
    pub(super) payload_len: u64,
    /// Memory needed from the load address, until the kernel has its own map.
    pub(super) init_size: u64,
    version: u16,
    load_flags: u16,
    preferred: u64,
    alignment: u64,
    relocatable: bool,
    ramdisk_max: u64,
    command_line_max: u64,
}

fn format_error(reason: &str) -> LoadError {
    LoadError::Format {
        reason: reason.into(),
    }
}

impl SetupHeader {
    /// Parses the first bytes of a bzImage.
    pub(super) fn parse(head: &[u8]) -> Result<Self, LoadError> {
        if !has_magic(head) {
            return Err(format_error("it has no boot header"));
        }
        let field = |at: usize, len: usize| -> u64 {
            head.get(at..at + len).map_or(0, |bytes| {
                bytes
                    .iter()
                    .rev()
                    .fold(0, |value, &byte| value << 8 | u64::from(byte))
            })
        };
        // The offset in the jump over the header gives its length.
        let end = usize::from(head[0x201]) + 0x202;
        let raw = head
            .get(HEADER_START..end.min(HEAD_LEN))
            .ok_or_else(|| format_error("its boot header is cut off"))?;
        let sectors = match field(0x1f1, 1) {
            0 => 4,
            sectors => sectors,
        };
        let small = |at| u16::try_from(field(at, 2)).unwrap_or(0);
        Ok(Self {
            raw: raw.to_vec(),
            code_offset: (sectors + 1) * SECTOR,
            payload_offset: field(0x248, 4),
            payload_len: field(0x24c, 4),
            init_size: field(0x260, 4),
            version: small(0x206),
            load_flags: small(0x236),
            preferred: field(0x258, 8),
            alignment: field(0x230, 4),
            relocatable: field(0x234, 1) != 0,
            ramdisk_max: field(0x22c, 4),
            command_line_max: field(0x238, 4),
        })
    }

    /// Selects the kernel's load address, in memory that ends at `memory_end`.
    fn load_address(&self, memory_end: u64) -> Result<u64, LoadError> {
        let fits = |address: u64| {
            address >= HIGH_MEMORY
                && address
                    .checked_add(self.init_size)
                    .is_some_and(|end| end <= memory_end)
        };
        let lowest = if self.relocatable && self.alignment.is_power_of_two() {
            HIGH_MEMORY.next_multiple_of(self.alignment)
        } else {
            self.preferred
        };
        [self.preferred, lowest]
            .into_iter()
            .find(|&address| fits(address))
            .ok_or(LoadError::NoRoom {
                what: "the kernel",
                address: self.preferred,
                bytes: self.init_size,
            })
    }
}

/// Reads the setup header of `file`.
fn read_header(file: &mut File) -> Result<SetupHeader, LoadError> {
    let mut head = [0u8; HEAD_LEN];
    let read: io::Result<()> = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.read_exact(&mut head));
    match read {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(format_error("its boot header is cut off"))
        }
        Err(error) => Err(LoadError::ReadKernel(error)),
        Ok(()) => SetupHeader::parse(&head),
    }
}

/// Loads the kernel and writes the zero page.
pub(super) fn load(
    memory: &MachineMemory,
    source: &mut BootSource<'_>,
) -> Result<BootRegisters, LoadError> {
    let guest = &memory.guest;
    let header = read_header(source.kernel)?;
    if header.version < OLDEST_VERSION || header.load_flags & XLF_KERNEL_64 == 0 {
        return Err(format_error("it is too old, or not a 64-bit kernel"));
    }
    if u64::try_from(source.cmdline.len()).unwrap_or(u64::MAX) > header.command_line_max {
        return Err(LoadError::CommandLine {
            reason: format!("this kernel takes {} bytes", header.command_line_max),
        });
    }
    let file_len = source
        .kernel
        .metadata()
        .map_err(LoadError::ReadKernel)?
        .len();
    let code_len = file_len
        .checked_sub(header.code_offset)
        .filter(|&len| len > 0 && len <= header.init_size)
        .ok_or_else(|| format_error("its boot header does not fit its length"))?;
    let address = header.load_address(low_memory_end(memory))?;
    copy_from_file(guest, source.kernel, header.code_offset, address, code_len)
        .map_err(LoadError::ReadKernel)?;
    // `ramdisk_max` is the highest address of the last byte.
    let initramfs = initramfs::load(
        memory,
        source.initramfs,
        address + header.init_size,
        header.ramdisk_max.saturating_add(1),
    )?;
    let page = zero_page(
        &header,
        &memory_map(memory.bytes()),
        source.rsdp,
        initramfs.map(|placed| (placed.address, placed.len)),
    );
    write(guest, "boot data", at::ZERO_PAGE, &page)?;

    let mut registers = registers::long_mode(guest)?;
    registers.rip = address + ENTRY_64;
    registers.rsi = at::ZERO_PAGE;
    Ok(registers)
}

fn zero_page(
    header: &SetupHeader,
    map: &[MapEntry],
    rsdp: u64,
    ramdisk: Option<(u64, u64)>,
) -> [u8; 4096] {
    let mut page = [0u8; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let low = |value: u64| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
    put(HEADER_START, &header.raw);
    put(zero_page::ACPI_RSDP, &rsdp.to_le_bytes());
    put(zero_page::VIDEO_MODE, &0xffffu16.to_le_bytes());
    put(zero_page::BOOT_LOADER, &[0xff]); // no registered id
    put(zero_page::COMMAND_LINE, &low(at::COMMAND_LINE));
    if let Some((address, len)) = ramdisk {
        put(zero_page::RAMDISK_ADDRESS, &low(address));
        put(zero_page::RAMDISK_SIZE, &low(len));
    }
    for (index, entry) in map.iter().enumerate() {
        let at = zero_page::E820_TABLE + index * 20;
        put(at, &entry.start.to_le_bytes());
        put(at + 8, &entry.len.to_le_bytes());
        put(at + 16, &entry.kind.code().to_le_bytes());
    }
    put(
        zero_page::E820_ENTRIES,
        &[u8::try_from(map.len()).unwrap_or(0)],
    );
    page
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::loader::InitramfsPart;
    use crate::memory::MemoryConfig;

    /// Returns a bzImage with one setup sector, whose code is `code` and whose payload is
    /// the code from byte 16 on.
    pub(in crate::loader) fn image(code: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 1024];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes());
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x230, &0x20_0000u32.to_le_bytes());
        put(0x234, &[1]);
        put(0x236, &XLF_KERNEL_64.to_le_bytes());
        put(0x238, &2047u32.to_le_bytes());
        put(0x248, &16u32.to_le_bytes());
        let payload = u32::try_from(code.len().saturating_sub(16)).unwrap();
        put(0x24c, &payload.to_le_bytes());
        put(0x258, &0x100_0000u64.to_le_bytes());
        put(0x260, &0x40_0000u32.to_le_bytes());
        image.extend_from_slice(code);
        image
    }

    fn try_load(image: &[u8]) -> Result<(MachineMemory, BootRegisters), LoadError> {
        let memory = MachineMemory::anonymous(&MemoryConfig::new(64 << 20)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        let registers = crate::loader::load(
            &memory,
            &mut BootSource {
                kernel: &mut file,
                initramfs: &[InitramfsPart::Bytes([7; 100].into())],
                cmdline: "quiet",
                rsdp: 0xe_0000,
            },
        )?;
        Ok((memory, registers))
    }

    #[test]
    fn code_zero_page_and_registers_are_correct() {
        let (memory, registers) = try_load(&image(&[0xcd; 64])).unwrap();
        let u64_at = |at| memory.guest.read_obj::<u64>(GuestAddress(at)).unwrap();
        let u32_at = |at| memory.guest.read_obj::<u32>(GuestAddress(at)).unwrap();
        assert_eq!(registers.rip, 0x100_0200);
        assert_eq!(registers.rsi, at::ZERO_PAGE);
        assert_eq!(u64_at(0x100_0038), 0xcdcd_cdcd_cdcd_cdcd);
        assert_eq!(u32_at(at::ZERO_PAGE + 0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(u64_at(at::ZERO_PAGE + 0x70), 0xe_0000);
        assert_eq!(u32_at(at::ZERO_PAGE + 0x21c), 100);
        let ramdisk = u32_at(at::ZERO_PAGE + 0x218);
        assert_eq!(u32_at(ramdisk.into()), 0x0707_0707);
        assert_eq!(u32_at(at::ZERO_PAGE + 0x1e8) & 0xff, 3);
        assert_eq!(u64_at(at::ZERO_PAGE + 0x2d0 + 8), 0x9_fc00);
    }

    #[test]
    fn a_relocatable_kernel_is_loaded_lower_in_small_memory() {
        let header = SetupHeader::parse(&image(&[0; 64])).unwrap();
        assert_eq!(header.load_address(0x140_0000).unwrap(), 0x100_0000);
        assert_eq!(header.load_address(0x13f_ffff).unwrap(), 0x20_0000);
        assert!(header.load_address(0x5f_ffff).is_err());
    }

    #[test]
    fn malformed_images_are_errors() {
        let mutate = |at: usize, bytes: &[u8]| {
            let mut image = image(&[0; 64]);
            image[at..at + bytes.len()].copy_from_slice(bytes);
            image
        };
        for (what, bad) in [
            ("old", mutate(0x206, &0x203u16.to_le_bytes())),
            ("32 bit", mutate(0x236, &[0, 0])),
            ("short init_size", mutate(0x260, &[1, 0, 0, 0])),
            ("huge init_size", mutate(0x260, &[0xff; 4])),
            ("many sectors", mutate(0x1f1, &[0xff])),
            ("no command line", mutate(0x238, &[0; 4])),
        ] {
            assert!(try_load(&bad).is_err(), "{what}");
        }
        for len in 0..1025 {
            assert!(try_load(&image(&[0; 64])[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_header_causes_a_panic(changes in proptest::collection::vec((0x1f1usize..0x290, any::<u8>()), 1..12)) {
            let mut image = image(&[0; 64]);
            for (at, byte) in changes {
                image[at] = byte;
            }
            let _ = try_load(&image);
        }
    }
}
