//! Loads a Linux kernel, its initramfs and command line into guest memory and returns the
//! boot processor's start registers. x86_64: uncompressed ELF by PVH, bzImage by the 64-bit
//! boot protocol.
//!
//! Kernel and initramfs files are not trusted: every number in them is checked before use,
//! and allocations whose size depends on one are limited.

mod bzimage;
mod elf_pvh;
mod initramfs;
mod memory_map;
mod registers;
mod vmlinux_extract;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use sm_hypervisor::state::x86_64::BootRegisters;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::{Immutable, IntoBytes};

pub use initramfs::InitramfsPart;
pub use memory_map::{MapEntry, MapKind, memory_map};
pub use vmlinux_extract::{ExtractError, extract_vmlinux};

use crate::memory::MachineMemory;
use sm_virtio::GuestMemory;

/// Longest kernel command line in bytes (Linux: `COMMAND_LINE_SIZE` minus the final zero).
pub const MAX_COMMAND_LINE: usize = 2047;

/// Arguments for every Linux guest of this machine, stock kernels too:
///
/// - `console=ttyS0 quiet`: the console is COM1; every line there costs the guest time, so
///   only errors appear;
/// - `panic=-1`: a panic ends the machine immediately, as [`MachineExit::Reset`];
/// - `pci=off 8250.nr_uarts=1`: no probing for absent devices;
/// - `tsc=reliable`: no watchdog for the clock that the hypervisor guarantees;
/// - `swiotlb=noforce`: no bounce buffers (64 MiB in guests with memory above the hole):
///   every device reaches all memory;
/// - `dummy.numdummies=0`: a kernel with this driver built in makes no interface `dummy0`, so
///   that a guest without a network has the loopback interface only.
///
/// [`MachineExit::Reset`]: crate::exit::MachineExit::Reset
pub const BASE_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 pci=off 8250.nr_uarts=1 \
     tsc=reliable swiotlb=noforce dummy.numdummies=0";

/// Lowest load address of kernels: boot data, tables and the legacy hole are below.
const HIGH_MEMORY: u64 = 0x10_0000;

/// Addresses of boot data below 640 KiB. The kernel needs none of it after early boot.
mod at {
    /// Global descriptor table.
    pub(super) const GDT: u64 = 0x500;
    /// PVH start info.
    pub(super) const START_INFO: u64 = 0x6000;
    /// PVH module list.
    pub(super) const MODULES: u64 = 0x6100;
    /// PVH memory map.
    pub(super) const MEMORY_MAP: u64 = 0x6200;
    /// `boot_params` of the Linux boot protocol.
    pub(super) const ZERO_PAGE: u64 = 0x7000;
    /// Top of the stack of the Linux boot protocol.
    pub(super) const STACK: u64 = 0x8ff0;
    /// First of six page tables that map the first 4 GiB.
    pub(super) const PAGE_TABLES: u64 = 0x9000;
    /// Command line.
    pub(super) const COMMAND_LINE: u64 = 0x2_0000;
}

/// Reason why a kernel cannot be loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Reading the kernel failed.
    #[error("cannot read the kernel")]
    ReadKernel(#[source] io::Error),
    /// Reading a part of the initramfs failed.
    #[error("cannot read the initramfs ({part})")]
    ReadInitramfs {
        /// The part: a path in quotes, or a length.
        part: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The file is not a bootable kernel.
    #[error("this file is not a bootable kernel: {reason}")]
    Format {
        /// The fault.
        reason: String,
    },
    /// A part of the boot data does not fit into guest memory.
    #[error(
        "{what} needs {bytes} bytes at {address:#x}, which this machine's memory does not have: \
         give it more memory"
    )]
    NoRoom {
        /// The part.
        what: &'static str,
        /// First address that it needs.
        address: u64,
        /// Bytes that it needs.
        bytes: u64,
    },
    /// The command line cannot be passed to the kernel.
    #[error("the kernel command line is not valid: {reason}")]
    CommandLine {
        /// The fault.
        reason: String,
    },
    /// Writing to guest memory failed.
    #[error("cannot write {what} to guest memory")]
    Memory {
        /// The data.
        what: &'static str,
        /// The failed access.
        #[source]
        source: GuestMemoryError,
    },
}

/// Kinds of kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelFormat {
    /// Uncompressed 64-bit ELF (`vmlinux`).
    Elf,
    /// Compressed kernel with boot header (`vmlinuz`, `bzImage`).
    BzImage,
}

/// Detects the kernel format of `file` by its first bytes.
///
/// # Errors
/// Neither kind, or the file cannot be read.
pub fn detect(file: &mut File) -> Result<KernelFormat, LoadError> {
    let mut head = [0u8; 0x206];
    file.seek(SeekFrom::Start(0))
        .map_err(LoadError::ReadKernel)?;
    let mut len = 0;
    while len < head.len() {
        match file.read(&mut head[len..]).map_err(LoadError::ReadKernel)? {
            0 => break,
            n => len += n,
        }
    }
    if head.starts_with(b"\x7fELF") {
        Ok(KernelFormat::Elf)
    } else if bzimage::has_magic(&head[..len]) {
        Ok(KernelFormat::BzImage)
    } else {
        Err(LoadError::Format {
            reason: "it is neither an ELF file nor a bzImage".into(),
        })
    }
}

/// The files and parameters of a boot.
#[derive(Debug)]
pub struct BootSource<'a> {
    /// The kernel.
    pub kernel: &'a mut File,
    /// Parts of the initramfs in order; empty for none.
    pub initramfs: &'a [InitramfsPart],
    /// Kernel command line, at most [`MAX_COMMAND_LINE`] bytes.
    pub cmdline: &'a str,
    /// Guest physical address of the ACPI RSDP.
    pub rsdp: u64,
}

/// Loads everything and returns the boot processor's registers.
///
/// # Errors
/// Files that cannot be read, are malformed, or do not fit into memory.
pub fn load(
    memory: &MachineMemory,
    source: &mut BootSource<'_>,
) -> Result<BootRegisters, LoadError> {
    let format = detect(source.kernel)?;
    write_command_line(&memory.guest, source.cmdline)?;
    match format {
        KernelFormat::Elf => elf_pvh::load(memory, source),
        KernelFormat::BzImage => bzimage::load(memory, source),
    }
}

fn write_command_line(guest: &GuestMemory, cmdline: &str) -> Result<(), LoadError> {
    if cmdline.len() > MAX_COMMAND_LINE {
        return Err(LoadError::CommandLine {
            reason: format!(
                "it is {} bytes long, and the limit is {MAX_COMMAND_LINE}",
                cmdline.len()
            ),
        });
    }
    if cmdline.bytes().any(|byte| byte == 0 || byte == b'\n') {
        return Err(LoadError::CommandLine {
            reason: "it contains a zero byte or a line break".into(),
        });
    }
    write(guest, "the command line", at::COMMAND_LINE, cmdline)?;
    let end = at::COMMAND_LINE + widen(cmdline.len());
    write(guest, "the command line", end, &[0u8][..])
}

fn write<T: IntoBytes + Immutable + ?Sized>(
    guest: &GuestMemory,
    what: &'static str,
    address: u64,
    value: &T,
) -> Result<(), LoadError> {
    guest
        .write_slice(value.as_bytes(), GuestAddress(address))
        .map_err(|source| LoadError::Memory { what, source })
}

/// Copies `len` bytes at `offset` of `file` to guest `address`.
fn copy_from_file(
    guest: &GuestMemory,
    file: &mut File,
    offset: u64,
    address: u64,
    len: u64,
) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let len = usize::try_from(len).map_err(io::Error::other)?;
    guest
        .read_exact_volatile_from(GuestAddress(address), file, len)
        .map_err(|error| match error {
            GuestMemoryError::IOError(error) => error,
            other => io::Error::other(other),
        })
}

/// Converts a length to a number of guest bytes.
fn widen(len: usize) -> u64 {
    // usize has at most 64 bits on every supported host.
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// Returns the end of the RAM below the hole.
fn low_memory_end(memory: &MachineMemory) -> u64 {
    memory.regions.first().map_or(0, |region| region.len)
}
