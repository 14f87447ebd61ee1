//! Plain-data state of an AArch64 vCPU (Arm Architecture Reference Manual, DDI 0487).
//!
//! System registers are lists of identifier and value: a backend saves the registers that
//! its hypervisor lists, and restores them in the order of the list. Guests run AArch64 at
//! EL1 and EL0; a backend that also has AArch32 or other state stores it in
//! [`VcpuState::extra`].

use serde::{Deserialize, Serialize};

use super::Blob;

/// Registers that a boot protocol sets on the boot processor. All others are at their reset
/// values: EL1 with SP_EL1, interrupts masked, MMU and caches off (Linux
/// `Documentation/arch/arm64/booting.rst`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRegisters {
    /// Entry point.
    pub pc: u64,
    /// Guest physical address of the device tree. X1 to X3 are zero.
    pub x0: u64,
}

/// Identifies a system register by its encoding in `MRS` and `MSR`: two bits of op0, three
/// of op1, four of CRn, four of CRm and three of op2, from the most significant bit down.
///
/// These are the numbers of Linux (the lower half of a `KVM_REG_ARM64_SYSREG` identifier)
/// and of macOS (`hv_sys_reg_t`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct SystemRegister(pub u16);

impl SystemRegister {
    /// Composes an identifier; only the lowest bits of each argument count.
    #[must_use]
    pub const fn new(op0: u8, op1: u8, crn: u8, crm: u8, op2: u8) -> Self {
        Self(
            (op0 as u16 & 3) << 14
                | (op1 as u16 & 7) << 11
                | (crn as u16 & 15) << 7
                | (crm as u16 & 15) << 3
                | (op2 as u16 & 7),
        )
    }
}

/// Registers and their values, in the order in which they are written.
pub type SystemRegisters = Vec<(SystemRegister, u64)>;

/// Processor features that the guest sees.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Identification registers (MIDR_EL1, CTR_EL0, ID_AA64*_EL1 and their like), by
    /// ascending identifier.
    pub id_registers: SystemRegisters,
    /// Width of guest physical addresses in bits.
    pub physical_address_bits: u8,
    /// Frequency of the generic timer (CNTFRQ_EL0) in Hz.
    pub counter_hz: u64,
    /// SVE vector lengths: bit `n` stands for `(n + 1) * 128` bits. Zero without SVE.
    pub sve_vector_lengths: u16,
}

/// General registers, program counter and processor state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GeneralRegisters {
    /// X0 to X30.
    pub x: [u64; 31],
    /// Program counter.
    pub pc: u64,
    /// Processor state, in the layout of SPSR_EL1.
    pub pstate: u64,
    /// Stack pointer of EL0.
    pub sp_el0: u64,
    /// Stack pointer of EL1.
    pub sp_el1: u64,
    /// Exception link register of EL1.
    pub elr_el1: u64,
    /// Saved processor state of EL1.
    pub spsr_el1: u64,
}

/// Floating-point and Advanced SIMD registers. With SVE, V0 to V31 are the lowest 128 bits
/// of Z0 to Z31, and the rest of these is in [`VcpuState::extra`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorRegisters {
    /// V0 to V31.
    pub v: [u128; 32],
    /// Floating-point control register.
    pub fpcr: u64,
    /// Floating-point status register.
    pub fpsr: u64,
}

/// Power state of a vCPU (Arm Power State Coordination Interface, DEN0022).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerState {
    /// Executes, or waits for an interrupt.
    #[default]
    On,
    /// Waits for a `CPU_ON`.
    Off,
    /// A `CPU_ON` was accepted, and the vCPU has not started.
    OnPending {
        /// Entry point.
        entry: u64,
        /// Value of X0 at the entry point.
        context: u64,
    },
    /// Waits in `CPU_SUSPEND` for an interrupt.
    Suspended,
}

/// The newest version of a vCPU's state, which backends save and restore.
pub type VcpuState = VcpuStateV1;

/// State of one AArch64 vCPU, version 1: everything that the architecture defines, and
/// [`Blob`]s for backend-specific state.
///
/// The state of the interrupt controller is in [`VmSavedState`](super::VmSavedState), except for the
/// part that a vCPU's own thread has to write after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStateV1 {
    /// The vCPU's index.
    pub index: u32,
    /// Processor features that the guest sees.
    pub features: Features,
    /// General registers.
    pub general: GeneralRegisters,
    /// Floating-point and vector registers.
    pub vector: VectorRegisters,
    /// System registers of EL1 and EL0, except for identification registers, the virtual
    /// counter and those of the interrupt controller.
    pub system: SystemRegisters,
    /// Virtual counter (CNTVCT_EL0) when the vCPU was saved. It is the same clock on all
    /// vCPUs, so a backend computes one offset from it for the whole VM.
    pub virtual_counter: u64,
    /// The interrupt controller's CPU interface (ICC_*_EL1, and ICH_*_EL2 if the hypervisor
    /// exposes its list registers), which is written in
    /// [`finish_restore`](crate::RestoringVcpu::finish_restore). Empty if the backend saves
    /// it with the VM.
    pub cpu_interface: SystemRegisters,
    /// Power state.
    pub power: PowerState,
    /// Pending and injected events (KVM: `kvm_vcpu_events`).
    pub events: Blob,
    /// Everything else that the backend saves (KVM: SVE and firmware registers).
    pub extra: Blob,
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::tests::blob;
    use super::*;

    fn registers() -> impl Strategy<Value = SystemRegisters> {
        vec((any::<u16>().prop_map(SystemRegister), any::<u64>()), 0..80)
    }

    fn features() -> impl Strategy<Value = Features> {
        let fields = (registers(), any::<u8>(), any::<u64>(), any::<u16>());
        fields.prop_map(|(id_registers, bits, counter_hz, lengths)| Features {
            id_registers,
            physical_address_bits: bits,
            counter_hz,
            sve_vector_lengths: lengths,
        })
    }

    fn power() -> impl Strategy<Value = PowerState> {
        prop_oneof![
            Just(PowerState::On),
            Just(PowerState::Off),
            Just(PowerState::Suspended),
            any::<[u64; 2]>().prop_map(|[entry, context]| PowerState::OnPending { entry, context }),
        ]
    }

    fn general() -> impl Strategy<Value = GeneralRegisters> {
        (vec(any::<u64>(), 31), any::<[u64; 6]>()).prop_map(|(x, others)| {
            let [pc, pstate, sp_el0, sp_el1, elr_el1, spsr_el1] = others;
            GeneralRegisters {
                x: std::array::from_fn(|i| x[i]),
                pc,
                pstate,
                sp_el0,
                sp_el1,
                elr_el1,
                spsr_el1,
            }
        })
    }

    fn vector() -> impl Strategy<Value = VectorRegisters> {
        let fields = (any::<[u128; 32]>(), any::<u64>(), any::<u64>());
        fields.prop_map(|(v, fpcr, fpsr)| VectorRegisters { v, fpcr, fpsr })
    }

    fn vcpu() -> impl Strategy<Value = VcpuState> {
        let typed = (any::<u32>(), features(), general(), vector(), power());
        let lists = (registers(), any::<u64>(), registers(), blob(), blob());
        (typed, lists).prop_map(|(typed, lists)| {
            let (index, features, general, vector, power) = typed;
            let (system, virtual_counter, cpu_interface, events, extra) = lists;
            VcpuState {
                index,
                features,
                general,
                vector,
                system,
                virtual_counter,
                cpu_interface,
                power,
                events,
                extra,
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

        #[test]
        fn boot_registers_survive_encoding(pc in any::<u64>(), x0 in any::<u64>()) {
            let boot = BootRegisters { pc, x0 };
            let bytes = postcard::to_stdvec(&boot).unwrap();
            prop_assert_eq!(postcard::from_bytes::<BootRegisters>(&bytes).unwrap(), boot);
        }
    }

    /// Identifiers of three registers in Linux and macOS.
    #[test]
    fn identifiers_are_those_of_linux_and_macos() {
        let mpidr_el1 = SystemRegister::new(3, 0, 0, 0, 5);
        let tcr_el1 = SystemRegister::new(3, 0, 2, 0, 2);
        let cntv_cval_el0 = SystemRegister::new(3, 3, 14, 3, 2);
        let numbers = [mpidr_el1, tcr_el1, cntv_cval_el0].map(|register| register.0);
        assert_eq!(numbers, [0xc005, 0xc102, 0xdf1a]);
    }
}
