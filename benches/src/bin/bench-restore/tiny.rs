//! The tiny guest: it waits for a flag in its memory, reads from a device, then powers
//! off.

use std::fs::File;
use std::io::Write as _;

use anyhow::Result;
use sm_vmm_core::layout::SLOT_RNG;
use vm_memory::GuestAddress;

const ENTRY: u32 = 0x10_0000;
/// The guest powers off when this is not zero.
pub(crate) const STOP: GuestAddress = GuestAddress(0x20_0000);
/// The slot of the device that it reads.
pub(crate) const DEVICE_SLOT: u32 = SLOT_RNG;

/// 32-bit code, with the entry state of PVH.
const CODE: [u8; 27] = [
    0x83, 0x3d, 0x00, 0x00, 0x20, 0x00, 0x00, // cmp dword [STOP], 0
    0x74, 0xf7, // je back
    0xa1, 0x00, 0x11, 0x00, 0xd0, // mov eax, [configuration of the device in slot 1]
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600: the sleep control register
    0xb0, 0x34, // mov al, sleep type 5 | enable
    0xee, // out dx, al
    0xfa, 0xf4, 0xeb, 0xfc, // cli; hlt; jmp back
    0x90, 0x90,
];

/// Returns the guest as an ELF file with a PVH note.
pub(crate) fn kernel() -> Result<File> {
    let mut elf = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(slot) = elf.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    };
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    let len = CODE.len() as u64;
    let load = [0x1000, 0, u64::from(ENTRY), len, len, 0x1000];
    for (at, kind, values) in [(64, 1u32, load), (120, 4, [0x300, 0, 0, 20, 20, 4])] {
        put(at, &kind.to_le_bytes());
        for (index, value) in values.into_iter().enumerate() {
            put(at + 8 + index * 8, &u64::to_le_bytes(value));
        }
    }
    put(0x300, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x30c, b"Xen\0");
    put(0x310, &ENTRY.to_le_bytes());
    elf.extend_from_slice(&CODE);
    let mut file = tempfile::tempfile()?;
    file.write_all(&elf)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use sm_vmm_core::layout::virtio_window;

    use super::*;

    #[test]
    fn it_looks_at_the_configuration_of_the_device() {
        assert_eq!(CODE[9], 0xa1);
        let address = CODE[10..14].try_into().unwrap();
        let configuration = virtio_window(DEVICE_SLOT) + 0x100;
        assert_eq!(u64::from(u32::from_le_bytes(address)), configuration);
    }
}
