//! Register sets that x86 boot protocols require.

use sm_hypervisor::state::x86_64::{BootRegisters, Segment, Table};

use super::{LoadError, at, write};
use sm_virtio::GuestMemory;

/// Selectors of the Linux boot protocol (`__BOOT_CS`, `__BOOT_DS`); the task register gets
/// the next one.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Segment attributes, see [`Segment::attributes`].
const CODE_32: u16 = 0xc09b;
const CODE_64: u16 = 0xa09b;
const DATA_32: u16 = 0xc093;
const TASK_BUSY: u16 = 0x008b;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

fn segment(selector: u16, attributes: u16, limit: u32) -> Segment {
    Segment {
        base: 0,
        limit,
        selector,
        attributes,
        unusable: false,
    }
}

/// Returns the descriptor that loads as [`segment`] with the same attributes.
fn descriptor(attributes: u16, limit: u32) -> u64 {
    let pages = attributes & 0x8000 != 0;
    let limit = u64::from(if pages { limit >> 12 } else { limit });
    (limit & 0xffff) | (u64::from(attributes) << 40) | ((limit & 0xf_0000) << 32)
}

fn flat(guest: &GuestMemory, code: u16) -> Result<BootRegisters, LoadError> {
    let gdt: [u64; 5] = [
        0,
        0,
        descriptor(code, u32::MAX),
        descriptor(DATA_32, u32::MAX),
        descriptor(TASK_BUSY, 0x67),
    ];
    write(guest, "the descriptor table", at::GDT, &gdt)?;
    Ok(BootRegisters {
        cs: segment(CODE, code, u32::MAX),
        ds: segment(DATA, DATA_32, u32::MAX),
        tr: segment(TASK, TASK_BUSY, 0x67),
        gdt: Table {
            base: at::GDT,
            limit: 5 * 8 - 1,
        },
        rflags: 2,
        cr0: CR0_PE | CR0_ET,
        ..BootRegisters::default()
    })
}

/// Returns the registers of flat 32-bit protected mode without paging, as PVH requires.
pub(super) fn protected_mode(guest: &GuestMemory) -> Result<BootRegisters, LoadError> {
    flat(guest, CODE_32)
}

/// Returns the registers of 64-bit mode with the first 4 GiB identity-mapped, as the 64-bit
/// Linux boot protocol requires.
pub(super) fn long_mode(guest: &GuestMemory) -> Result<BootRegisters, LoadError> {
    const PAGE: u64 = 0x1000;
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;

    let mut top = [0u64; 512];
    top[0] = (at::PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    write(guest, "page tables", at::PAGE_TABLES, &top)?;

    let mut table = [0u64; 512];
    for (slot, number) in table.iter_mut().zip(2u64..6) {
        *slot = (at::PAGE_TABLES + number * PAGE) | PRESENT_WRITABLE;
    }
    write(guest, "page tables", at::PAGE_TABLES + PAGE, &table)?;

    for gib in 0..4u64 {
        for (slot, number) in table.iter_mut().zip(gib * 512..) {
            *slot = (number << 21) | PRESENT_WRITABLE | LARGE;
        }
        write(
            guest,
            "page tables",
            at::PAGE_TABLES + (2 + gib) * PAGE,
            &table,
        )?;
    }

    let mut registers = flat(guest, CODE_64)?;
    registers.cr0 |= CR0_PG;
    registers.cr3 = at::PAGE_TABLES;
    registers.cr4 = CR4_PAE;
    registers.efer = EFER_LME | EFER_LMA;
    registers.rsp = at::STACK;
    Ok(registers)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn descriptors_have_the_processor_format() {
        assert_eq!(descriptor(CODE_32, u32::MAX), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(CODE_64, u32::MAX), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(DATA_32, u32::MAX), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(TASK_BUSY, 0x67), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn page_tables_map_addresses_to_themselves() {
        let guest = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let registers = long_mode(&guest).unwrap();
        let read = |address| guest.read_obj::<u64>(GuestAddress(address)).unwrap();
        for address in [0u64, 0x1000, 0x1234_5678, 0xbfff_ffff, 0xffff_ffff] {
            let top = read(registers.cr3);
            let table = read((top & !0xfff) + (address >> 30) * 8);
            let page = read((table & !0xfff) + ((address >> 21) & 511) * 8);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!((page & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
    }
}
