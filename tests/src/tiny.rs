//! Hand-written guests of a few instructions.

use std::path::{Path, PathBuf};

/// Load address and entry point of the kernel, in 32-bit mode.
const ENTRY: u32 = 0x10_0000;

/// Writes a kernel to `directory` that prints `words` on its console and then triple
/// faults, and returns its path.
///
/// # Panics
/// The file cannot be written.
#[must_use]
pub fn triple_faulting_kernel(directory: &Path, words: &str) -> PathBuf {
    let mut code = Vec::new();
    for byte in words.bytes() {
        // mov dx, 0x3f8; mov al, BYTE; out dx, al
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, byte, 0xee]);
    }
    // lidt [0x200000], which contains zeroes: an empty table; ud2.
    code.extend([0x0f, 0x01, 0x1d, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x0b]);
    let path = directory.join("triple-faults");
    std::fs::write(&path, pvh_kernel(&code)).expect("a kernel can be written");
    path
}

/// Returns an ELF file with a PVH note (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`) whose only
/// segment is `code`.
fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    const CODE_AT: usize = 0x1000;
    const NOTE_AT: usize = 0x300;
    let mut elf = vec![0u8; CODE_AT];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01"); // 64-bit, little-endian, version 1
    put(16, &2u16.to_le_bytes()); // an executable
    put(18, &62u16.to_le_bytes()); // for x86-64
    put(20, &1u32.to_le_bytes());
    put(32, &64u64.to_le_bytes()); // program headers follow the header
    put(52, &64u16.to_le_bytes()); // size of the header
    put(54, &56u16.to_le_bytes()); // size of a program header
    put(56, &2u16.to_le_bytes()); // their number
    let (code_at, note_at) = (CODE_AT as u64, NOTE_AT as u64);
    let len = code.len() as u64;
    // Type; offset, virtual and physical address, size in file and memory, alignment.
    for (at, kind, values) in [
        (64, 1u32, [code_at, 0, u64::from(ENTRY), len, len, 0x1000]),
        (120, 4, [note_at, 0, 0, 20, 20, 4]),
    ] {
        put(at, &kind.to_le_bytes());
        for (index, value) in values.into_iter().enumerate() {
            put(at + 8 + index * 8, &u64::to_le_bytes(value));
        }
    }
    put(NOTE_AT, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(NOTE_AT + 12, b"Xen\0");
    put(NOTE_AT + 16, &ENTRY.to_le_bytes());
    elf.extend_from_slice(code);
    elf
}
