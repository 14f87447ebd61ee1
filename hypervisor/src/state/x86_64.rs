//! Plain-data state of an x86_64 vCPU.

use serde::{Deserialize, Serialize};

use super::Blob;

/// An x86 segment register, of [`BootRegisters`] and of [`VcpuStateV1`], whose version fixes
/// its layout.
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

/// A descriptor table register, of [`BootRegisters`] and of [`VcpuStateV1`], whose version
/// fixes its layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Registers that a boot protocol sets on the boot processor; all others are at their reset
/// values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRegisters {
    /// Entry point.
    pub rip: u64,
    /// RBX, in which some boot protocols pass data.
    pub rbx: u64,
    /// RSI: guest physical address of the boot parameters in the 64-bit Linux boot
    /// protocol.
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

/// One entry of the guest's CPUID, of [`Features`] and of [`VcpuStateV1`], whose version
/// fixes its layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// Leaf.
    pub function: u32,
    /// Subleaf, for leaves that have subleaves.
    pub index: u32,
    /// Bit 0 is set if `index` is significant, as in the KVM API.
    pub flags: u32,
    /// Register values.
    pub eax: u32,
    /// See `eax`.
    pub ebx: u32,
    /// See `eax`.
    pub ecx: u32,
    /// See `eax`.
    pub edx: u32,
}

/// Processor features that the guest sees.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// CPUID, leaf by leaf.
    pub cpuid: Vec<CpuidEntry>,
}

/// General registers, instruction pointer and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneralRegisters {
    /// RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, then R8 to R15.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// Segments, tables and control registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemRegisters {
    /// CS, DS, ES, FS, GS, SS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: Table,
    /// Interrupt descriptor table.
    pub idt: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8 (task priority).
    pub cr8: u64,
    /// EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// External interrupt being delivered: one bit for each vector.
    pub interrupt_bitmap: [u64; 4],
}

/// Debug registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugRegisters {
    /// DR0 to DR3.
    pub address: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// Multiprocessor state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MpState {
    /// Executes.
    #[default]
    Runnable,
    /// A secondary processor that has received no INIT yet.
    Uninitialized,
    /// Waits for a start-up signal (SIPI).
    InitReceived,
    /// In HLT.
    Halted,
    /// Has received a start-up signal and has not started.
    SipiReceived,
}

/// The newest version of a vCPU's state, which backends save and restore.
pub type VcpuState = VcpuStateV1;

/// State of one x86_64 vCPU, version 1: everything that the architecture defines,
/// independent of the hypervisor, and one [`Blob`] for backend-specific state.
///
/// Its fields, those of the types in them, and their order are those of snapshots and do
/// not change; another state is another type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStateV1 {
    /// The vCPU's index.
    pub index: u32,
    /// The guest's CPUID.
    pub cpuid: Vec<CpuidEntry>,
    /// TSC frequency in kHz; 0 if the backend does not report it.
    pub tsc_khz: u32,
    /// General registers.
    pub general: GeneralRegisters,
    /// System registers.
    pub system: SystemRegisters,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// Extended control registers: number and value.
    pub xcrs: Vec<(u32, u64)>,
    /// XSAVE area in the standard (not compacted) format: x87, SSE, AVX, AVX-512, PKRU and
    /// other components that XCR0 enables.
    pub xsave: Vec<u8>,
    /// Model-specific registers: index and value, in no particular order.
    pub msrs: Vec<(u32, u64)>,
    /// Local APIC register page, 1024 bytes.
    pub lapic: Vec<u8>,
    /// Multiprocessor state.
    pub mp_state: MpState,
    /// Pending and injected events (KVM: `kvm_vcpu_events`).
    pub events: Blob,
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::tests::blob;
    use super::*;

    fn segment() -> impl Strategy<Value = Segment> {
        let fields = (any::<u64>(), any::<u32>(), any::<[u16; 2]>(), any::<bool>());
        fields.prop_map(|(base, limit, [selector, attributes], unusable)| Segment {
            base,
            limit,
            selector,
            attributes,
            unusable,
        })
    }

    fn system() -> impl Strategy<Value = SystemRegisters> {
        let segments = vec(segment(), 8);
        let tables = any::<[(u64, u16); 2]>();
        (segments, tables, any::<[u64; 11]>()).prop_map(|(segments, tables, words)| {
            let [gdt, idt] = tables.map(|(base, limit)| Table { base, limit });
            let [cr0, cr2, cr3, cr4, cr8, efer, apic_base, bitmap @ ..] = words;
            SystemRegisters {
                segments: std::array::from_fn(|i| segments[i]),
                tr: segments[6],
                ldt: segments[7],
                gdt,
                idt,
                cr0,
                cr2,
                cr3,
                cr4,
                cr8,
                efer,
                apic_base,
                interrupt_bitmap: bitmap,
            }
        })
    }

    fn mp_state() -> impl Strategy<Value = MpState> {
        prop_oneof![
            Just(MpState::Runnable),
            Just(MpState::Uninitialized),
            Just(MpState::InitReceived),
            Just(MpState::Halted),
            Just(MpState::SipiReceived),
        ]
    }

    fn cpuid() -> impl Strategy<Value = Vec<CpuidEntry>> {
        let entry =
            any::<[u32; 7]>().prop_map(|[function, index, flags, eax, ebx, ecx, edx]| CpuidEntry {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
            });
        vec(entry, 0..20)
    }

    fn vcpu() -> impl Strategy<Value = VcpuState> {
        let registers = (
            any::<[u64; 16]>(),
            any::<[u64; 2]>(),
            system(),
            any::<[u64; 6]>(),
        );
        let lists = (
            vec(any::<(u32, u64)>(), 0..4),
            vec(any::<u8>(), 0..600),
            vec(any::<(u32, u64)>(), 0..60),
            vec(any::<u8>(), 0..200),
        );
        let rest = (any::<[u32; 2]>(), cpuid(), mp_state(), blob());
        (registers, lists, rest).prop_map(|(registers, lists, rest)| {
            let (gpr, [rip, rflags], system, [a, b, c, d, dr6, dr7]) = registers;
            let (xcrs, xsave, msrs, lapic) = lists;
            let ([index, tsc_khz], cpuid, mp_state, events) = rest;
            VcpuState {
                index,
                cpuid,
                tsc_khz,
                general: GeneralRegisters { gpr, rip, rflags },
                system,
                debug: DebugRegisters {
                    address: [a, b, c, d],
                    dr6,
                    dr7,
                },
                xcrs,
                xsave,
                msrs,
                lapic,
                mp_state,
                events,
            }
        })
    }

    proptest! {
        #[test]
        fn a_vcpu_survives_encoding(state in vcpu()) {
            let bytes = postcard::to_stdvec(&state).unwrap();
            let (decoded, rest) = postcard::take_from_bytes::<VcpuState>(&bytes).unwrap();
            prop_assert_eq!(decoded, state);
            prop_assert!(rest.is_empty());
        }

        /// A state file has a checksum, but a decoder must not depend on it.
        #[test]
        fn a_cut_vcpu_is_an_error(state in vcpu(), cut in any::<prop::sample::Index>()) {
            let bytes = postcard::to_stdvec(&state).unwrap();
            let cut = &bytes[..cut.index(bytes.len())];
            prop_assert!(postcard::from_bytes::<VcpuState>(cut).is_err());
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes in vec(any::<u8>(), 0..400)) {
            let _ = postcard::from_bytes::<VcpuState>(&bytes);
        }
    }

    /// Returns a state in which every field has a value of its own.
    fn sample() -> VcpuState {
        let segment = |n: u16| Segment {
            base: 0x1000 * u64::from(n) + 1,
            limit: 0x10_0000 + u32::from(n),
            selector: n * 8,
            attributes: 0xa09b + n,
            unusable: n % 2 == 1,
        };
        let table = |n: u16| Table {
            base: 0xffff_8000_0000_0000 + u64::from(n),
            limit: 0x7f + n,
        };
        VcpuState {
            index: 3,
            cpuid: vec![CpuidEntry {
                function: 0xd,
                index: 1,
                flags: 1,
                eax: 0xf,
                ebx: 0x340,
                ecx: 0x100,
                edx: 0x8000_0000,
            }],
            tsc_khz: 2_995_200,
            general: GeneralRegisters {
                gpr: std::array::from_fn(|n| 0x0101_0101_0101_0101 * n as u64),
                rip: 0xffff_ffff_8100_0000,
                rflags: 0x246,
            },
            system: SystemRegisters {
                segments: [1, 2, 3, 4, 5, 6].map(segment),
                tr: segment(7),
                ldt: segment(8),
                gdt: table(1),
                idt: table(2),
                cr0: 0x8005_0033,
                cr2: 0x7fff_0000_1230,
                cr3: 0x10_a000,
                cr4: 0x37_06b0,
                cr8: 2,
                efer: 0xd01,
                apic_base: 0xfee0_0d00,
                interrupt_bitmap: [1, 2, 4, 8],
            },
            debug: DebugRegisters {
                address: [0x11, 0x22, 0x33, 0x44],
                dr6: 0xffff_0ff0,
                dr7: 0x400,
            },
            xcrs: vec![(0, 7)],
            xsave: (0..16).collect(),
            msrs: vec![(0x10, 0x1234_5678_9abc), (0xc000_0080, 0xd01)],
            lapic: vec![0xa5; 8],
            mp_state: MpState::Halted,
            events: Blob {
                backend: "kvm".to_owned(),
                version: 1,
                bytes: vec![9, 8, 7],
            },
        }
    }

    /// Snapshots have these bytes: the file does not change. A new version of the state is
    /// a new type with a file of its own, written by a test that is run once.
    #[test]
    fn the_encoding_of_a_vcpu_is_fixed() {
        let golden = include_bytes!("../../tests/golden/vcpu-x86_64.bin");
        let encoded = postcard::to_stdvec(&sample()).unwrap();
        assert_eq!(encoded, golden);
        assert_eq!(postcard::from_bytes::<VcpuState>(golden).unwrap(), sample());
    }
}
