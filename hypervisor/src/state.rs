//! Plain-data state of a machine, the same on every host.
//!
//! Architectural elements are typed; what only one backend understands is an
//! opaque versioned [`Blob`].

use serde::{Deserialize, Serialize};

/// Backend-specific state that no other backend can read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Name of the backend that wrote it.
    pub backend: String,
    /// Version of the layout of `bytes`.
    pub version: u32,
    /// The payload.
    pub bytes: Vec<u8>,
}

/// State of interrupt controllers and clocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The backend's elements (KVM: PIC, IOAPIC, PIT if any, kvmclock).
    pub blob: Blob,
}

/// An x86 segment register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes (after applying granularity).
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Access rights in the layout of bits 8..=23 of a descriptor's second
    /// word, shifted right by 8: type, S, DPL, P, -, AVL, L, D/B, G.
    pub attributes: u16,
    /// The segment is unusable.
    pub unusable: bool,
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Registers that a boot protocol sets on the boot processor; everything else
/// is at its reset value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRegisters {
    /// Entry point.
    pub rip: u64,
    /// General registers a protocol passes data in.
    pub rbx: u64,
    /// Boot protocol pointer of the 64-bit Linux protocol.
    pub rsi: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags; bit 1 is always set by the backend.
    pub rflags: u64,
    /// Code segment.
    pub cs: Segment,
    /// Data, extra and stack segment (also FS and GS).
    pub ds: Segment,
    /// Task register segment.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: Table,
    /// Interrupt descriptor table.
    pub idt: Table,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// State of one vCPU. (The hypervisor helper replaces this sketch by the full
/// typed set; the name and its serde traits are what others rely on.)
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// The vCPU's index.
    pub index: u32,
}
