//! Uncompressed ELF kernels by the PVH boot protocol (Xen's
//! `docs/misc/pvh.pandoc`, `public/arch-x86/hvm/start_info.h`).

use std::fs::File;

use object::elf::{FileHeader64, PT_LOAD, PT_NOTE, ProgramHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, ReadCache};
use sm_hypervisor::state::x86_64::BootRegisters;
use zerocopy::{Immutable, IntoBytes};

use super::{
    BootSource, HIGH_MEMORY, LoadError, at, copy_from_file, initramfs, low_memory_end, memory_map,
    registers, widen, write,
};
use crate::memory::MachineMemory;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: 32-bit entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Limit on notes, against hostile files; kernels have less.
const MAX_NOTES: u64 = 1 << 20;
/// Limit on program headers, against hostile files; kernels have fewer.
const MAX_PROGRAM_HEADERS: usize = 64;

const START_MAGIC: u32 = 0x336e_c578;

/// `struct hvm_start_info`, version 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `struct hvm_modlist_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    address: u64,
    size: u64,
    command_line: u64,
    reserved: u64,
}

/// `struct hvm_memmap_table_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapRecord {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

fn format_error(reason: impl Into<String>) -> LoadError {
    LoadError::Format {
        reason: reason.into(),
    }
}

/// A part of the file that is loaded into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    file_offset: u64,
    file_len: u64,
    address: u64,
    memory_len: u64,
}

/// The contents of the file's headers.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    segments: Vec<Segment>,
    entry: u32,
}

impl Plan {
    fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.address + segment.memory_len)
            .max()
            .unwrap_or(0)
    }
}

type Header = ProgramHeader64<LittleEndian>;

/// Reads headers and notes; checks every segment against `memory_end`.
fn plan(file: &mut File, memory_end: u64) -> Result<Plan, LoadError> {
    let file_len = file.metadata().map_err(LoadError::ReadKernel)?.len();
    let data = &ReadCache::new(file);
    let invalid = |error: object::read::Error| format_error(error.to_string());
    let header = FileHeader64::<LittleEndian>::parse(data).map_err(invalid)?;
    let endian = header.endian().map_err(invalid)?;
    if header.e_machine(endian) != object::elf::EM_X86_64 {
        return Err(format_error("it is for another processor than x86_64"));
    }
    if usize::from(header.e_phnum(endian)) > MAX_PROGRAM_HEADERS {
        return Err(format_error("it has too many program headers"));
    }
    let headers = header.program_headers(endian, data).map_err(invalid)?;

    let mut segments = Vec::new();
    let mut entry = None;
    for header in headers {
        match header.p_type(endian) {
            PT_LOAD => segments.extend(segment(header, file_len, memory_end)?),
            PT_NOTE if entry.is_none() => entry = entry_note(header, data)?,
            _ => {}
        }
    }
    let entry = entry
        .ok_or_else(|| format_error("it has no PVH entry point: build it with CONFIG_PVH=y"))?;
    let inside = segments.iter().any(|segment| {
        (segment.address..segment.address + segment.memory_len).contains(&entry.into())
    });
    if !inside {
        return Err(format_error(format!(
            "its entry point {entry:#x} is in no segment"
        )));
    }
    Ok(Plan { segments, entry })
}

fn segment(header: &Header, file_len: u64, memory_end: u64) -> Result<Option<Segment>, LoadError> {
    let endian = LittleEndian;
    let segment = Segment {
        file_offset: header.p_offset(endian),
        file_len: header.p_filesz(endian),
        address: header.p_paddr(endian),
        memory_len: header.p_memsz(endian),
    };
    if segment.memory_len == 0 {
        return Ok(None);
    }
    let in_file = segment
        .file_offset
        .checked_add(segment.file_len)
        .is_some_and(|end| end <= file_len);
    if !in_file || segment.file_len > segment.memory_len {
        return Err(format_error(format!(
            "its segment for {:#x} is not whole",
            segment.address
        )));
    }
    let end = segment
        .address
        .checked_add(segment.memory_len)
        .ok_or_else(|| format_error("a segment ends past the address space"))?;
    if segment.address < HIGH_MEMORY {
        return Err(format_error(format!(
            "its segment for {:#x} starts below 1 MiB",
            segment.address
        )));
    }
    if end > memory_end {
        return Err(LoadError::NoRoom {
            what: "the kernel",
            address: segment.address,
            bytes: segment.memory_len,
        });
    }
    Ok(Some(segment))
}

fn entry_note(header: &Header, data: &ReadCache<&mut File>) -> Result<Option<u32>, LoadError> {
    let endian = LittleEndian;
    if header.p_filesz(endian) > MAX_NOTES {
        return Err(format_error("its notes are too long"));
    }
    let invalid = |error: object::read::Error| format_error(error.to_string());
    let Some(mut notes) = header.notes(endian, data).map_err(invalid)? else {
        return Ok(None);
    };
    while let Some(note) = notes.next().map_err(invalid)? {
        if note.name() == b"Xen" && note.n_type(endian) == NOTE_PHYS32_ENTRY {
            // 4 or 8 bytes, little-endian; the upper half must be zero.
            let (low, high) = note
                .desc()
                .split_first_chunk::<4>()
                .ok_or_else(|| format_error("its PVH note is too short"))?;
            if high.iter().any(|&byte| byte != 0) {
                return Err(format_error("its PVH entry point is above 4 GiB"));
            }
            return Ok(Some(u32::from_le_bytes(*low)));
        }
    }
    Ok(None)
}

/// Loads the kernel and writes the start info.
pub(super) fn load(
    memory: &MachineMemory,
    source: &mut BootSource<'_>,
) -> Result<BootRegisters, LoadError> {
    let guest = &memory.guest;
    let plan = plan(source.kernel, low_memory_end(memory))?;
    for segment in &plan.segments {
        copy_from_file(
            guest,
            source.kernel,
            segment.file_offset,
            segment.address,
            segment.file_len,
        )
        .map_err(LoadError::ReadKernel)?;
    }
    let initramfs = initramfs::load(memory, source.initramfs, plan.end(), u64::MAX)?;

    if let Some(placed) = initramfs {
        let module = Module {
            address: placed.address,
            size: placed.len,
            command_line: 0,
            reserved: 0,
        };
        write(guest, "boot data", at::MODULES, &module)?;
    }
    let map: Vec<MapRecord> = memory_map(memory.bytes())
        .iter()
        .map(|entry| MapRecord {
            address: entry.start,
            size: entry.len,
            kind: entry.kind.code(),
            reserved: 0,
        })
        .collect();
    write(guest, "boot data", at::MEMORY_MAP, map.as_slice())?;
    let info = StartInfo {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        modules: initramfs.is_some().into(),
        module_list: at::MODULES,
        command_line: at::COMMAND_LINE,
        rsdp: source.rsdp,
        memory_map: at::MEMORY_MAP,
        memory_map_entries: u32::try_from(widen(map.len())).unwrap_or(0),
        reserved: 0,
    };
    write(guest, "boot data", at::START_INFO, &info)?;

    let mut registers = registers::protected_mode(guest)?;
    registers.rip = plan.entry.into();
    registers.rbx = at::START_INFO;
    Ok(registers)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::loader::{InitramfsPart, detect};
    use crate::memory::MemoryConfig;

    const ENTRY: u32 = 0x100_0040;

    /// Returns a kernel with one PVH note and one segment of 0x200 bytes, 0x1000 in memory,
    /// at 16 MiB.
    fn kernel() -> Vec<u8> {
        let mut elf = vec![0u8; 0x600];
        let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &2u16.to_le_bytes()); // ET_EXEC
        put(18, &62u16.to_le_bytes()); // EM_X86_64
        put(20, &1u32.to_le_bytes());
        put(32, &64u64.to_le_bytes()); // program headers
        put(52, &64u16.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &2u16.to_le_bytes());
        let mut header = |at: usize, kind: u32, values: [u64; 6]| {
            put(at, &kind.to_le_bytes());
            for (index, value) in values.iter().enumerate() {
                put(at + 8 + index * 8, &value.to_le_bytes());
            }
        };
        // offset, vaddr, paddr, filesz, memsz, align
        header(64, 1, [0x400, 0, 0x100_0000, 0x200, 0x1000, 0x1000]);
        header(120, 4, [0x300, 0, 0, 40, 40, 4]);
        // Another vendor's note first, then Xen's.
        put(0x300, &[4, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0]);
        put(0x30c, b"GNU\0abcd");
        put(0x314, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        put(0x320, b"Xen\0");
        put(0x324, &ENTRY.to_le_bytes());
        put(0x400, &[0xab; 0x200]);
        elf
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn try_load(bytes: &[u8]) -> Result<(MachineMemory, BootRegisters), LoadError> {
        let memory = MachineMemory::anonymous(&MemoryConfig::new(64 << 20)).unwrap();
        let registers = crate::loader::load(
            &memory,
            &mut BootSource {
                kernel: &mut file(bytes),
                initramfs: &[InitramfsPart::Bytes([7; 100].into())],
                cmdline: "console=ttyS0",
                rsdp: 0xe_0000,
            },
        )?;
        Ok((memory, registers))
    }

    #[test]
    fn segments_start_info_and_registers_are_correct() {
        let (memory, registers) = try_load(&kernel()).unwrap();
        let u64_at = |at| memory.guest.read_obj::<u64>(GuestAddress(at)).unwrap();
        let u32_at = |at| memory.guest.read_obj::<u32>(GuestAddress(at)).unwrap();
        assert_eq!(registers.rip, u64::from(ENTRY));
        assert_eq!(registers.rbx, at::START_INFO);
        assert_eq!(registers.cr0 & 0x8000_0001, 1);
        assert_eq!(u64_at(0x100_01f8), 0xabab_abab_abab_abab);
        assert_eq!(u64_at(0x100_0200), 0);
        assert_eq!(u32_at(at::START_INFO), START_MAGIC);
        assert_eq!(u32_at(at::START_INFO + 12), 1);
        assert_eq!(u64_at(at::START_INFO + 32), 0xe_0000);
        let initramfs = u64_at(at::MODULES);
        assert_eq!(u64_at(at::MODULES + 8), 100);
        assert_eq!(u32_at(initramfs), 0x0707_0707);
        assert_eq!(u64_at(at::COMMAND_LINE).to_le_bytes(), *b"console=");
    }

    #[test]
    fn each_malformed_kernel_has_its_error() {
        let mutate = |at: usize, bytes: &[u8]| {
            let mut elf = kernel();
            elf[at..at + bytes.len()].copy_from_slice(bytes);
            elf
        };
        let cases: [(&str, Vec<u8>); 9] = [
            ("neither", mutate(0, b"\x7fELG")),
            ("another processor", mutate(18, &183u16.to_le_bytes())),
            ("too many program", mutate(56, &65u16.to_le_bytes())),
            ("not whole", mutate(64 + 8, &u64::MAX.to_le_bytes())),
            ("not whole", mutate(64 + 40, &0x10u64.to_le_bytes())),
            ("below 1 MiB", mutate(64 + 24, &0x1000u64.to_le_bytes())),
            (
                "past the address space",
                mutate(64 + 24, &u64::MAX.to_le_bytes()),
            ),
            ("no PVH entry", mutate(0x320, b"Xem\0")),
            ("in no segment", mutate(0x324, &0x200_0000u32.to_le_bytes())),
        ];
        for (expected, elf) in cases {
            let error = try_load(&elf).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let huge = mutate(64 + 40, &(1u64 << 40).to_le_bytes());
        assert!(matches!(try_load(&huge), Err(LoadError::NoRoom { .. })));
        for len in 0..kernel().len() {
            assert!(try_load(&kernel()[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn command_lines_are_checked() {
        let memory = MachineMemory::anonymous(&MemoryConfig::new(64 << 20)).unwrap();
        for cmdline in ["a\0b", "a\nb", &"x".repeat(2048)] {
            let result = crate::loader::load(
                &memory,
                &mut BootSource {
                    kernel: &mut file(&kernel()),
                    initramfs: &[],
                    cmdline,
                    rsdp: 0,
                },
            );
            assert!(matches!(result, Err(LoadError::CommandLine { .. })));
        }
    }

    proptest! {
        #[test]
        fn no_mutation_causes_a_panic(changes in proptest::collection::vec((0usize..0x330, any::<u8>()), 1..12)) {
            let mut elf = kernel();
            for (at, byte) in changes {
                elf[at] = byte;
            }
            let mut elf = file(&elf);
            if detect(&mut elf).is_ok() {
                let _ = plan(&mut elf, 64 << 20);
            }
        }
    }
}
