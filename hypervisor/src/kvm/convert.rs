//! Conversion of plain-data state to KVM's structures and back.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_cpuid_entry2, kvm_debugregs,
    kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
};

use crate::state::x86_64::{
    CpuidEntry, DebugRegisters, GeneralRegisters, MpState, Segment, SystemRegisters, Table,
};

/// One bit of an attribute word.
const fn bit(attributes: u16, shift: u16) -> u8 {
    // The mask leaves one bit.
    (attributes >> shift & 1) as u8
}

pub(super) fn to_segment(s: Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: bit(s.attributes, 0)
            | bit(s.attributes, 1) << 1
            | bit(s.attributes, 2) << 2
            | bit(s.attributes, 3) << 3,
        s: bit(s.attributes, 4),
        dpl: bit(s.attributes, 5) | bit(s.attributes, 6) << 1,
        present: bit(s.attributes, 7),
        avl: bit(s.attributes, 12),
        l: bit(s.attributes, 13),
        db: bit(s.attributes, 14),
        g: bit(s.attributes, 15),
        unusable: u8::from(s.unusable),
        padding: 0,
    }
}

pub(super) fn from_segment(s: &kvm_segment) -> Segment {
    let bits = [
        (s.type_ & 15, 0),
        (s.s & 1, 4),
        (s.dpl & 3, 5),
        (s.present & 1, 7),
        (s.avl & 1, 12),
        (s.l & 1, 13),
        (s.db & 1, 14),
        (s.g & 1, 15),
    ];
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        attributes: bits
            .iter()
            .fold(0, |word, (value, shift)| word | u16::from(*value) << shift),
        unusable: s.unusable != 0,
    }
}

pub(super) fn to_table(t: Table) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

fn from_table(t: &kvm_dtable) -> Table {
    Table {
        base: t.base,
        limit: t.limit,
    }
}

pub(super) fn to_regs(g: &GeneralRegisters) -> kvm_regs {
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = g.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: g.rip,
        rflags: g.rflags,
    }
}

pub(super) fn from_regs(r: &kvm_regs) -> GeneralRegisters {
    GeneralRegisters {
        gpr: [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
    }
}

pub(super) fn to_sregs(s: &SystemRegisters) -> kvm_sregs {
    let [cs, ds, es, fs, gs, ss] = s.segments.map(to_segment);
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_segment(s.tr),
        ldt: to_segment(s.ldt),
        gdt: to_table(s.gdt),
        idt: to_table(s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: s.interrupt_bitmap,
    }
}

pub(super) fn from_sregs(s: &kvm_sregs) -> SystemRegisters {
    SystemRegisters {
        segments: [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss].map(from_segment),
        tr: from_segment(&s.tr),
        ldt: from_segment(&s.ldt),
        gdt: from_table(&s.gdt),
        idt: from_table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: s.interrupt_bitmap,
    }
}

pub(super) fn to_debug(d: &DebugRegisters) -> kvm_debugregs {
    kvm_debugregs {
        db: d.address,
        dr6: d.dr6,
        dr7: d.dr7,
        ..kvm_debugregs::default()
    }
}

pub(super) fn from_debug(d: &kvm_debugregs) -> DebugRegisters {
    DebugRegisters {
        address: d.db,
        dr6: d.dr6,
        dr7: d.dr7,
    }
}

pub(super) fn to_mp_state(state: MpState) -> kvm_mp_state {
    let mp_state = match state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
        MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
        MpState::Halted => KVM_MP_STATE_HALTED,
        MpState::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

pub(super) fn from_mp_state(state: kvm_mp_state) -> Option<MpState> {
    Some(match state.mp_state {
        KVM_MP_STATE_RUNNABLE => MpState::Runnable,
        KVM_MP_STATE_UNINITIALIZED => MpState::Uninitialized,
        KVM_MP_STATE_INIT_RECEIVED => MpState::InitReceived,
        KVM_MP_STATE_HALTED => MpState::Halted,
        KVM_MP_STATE_SIPI_RECEIVED => MpState::SipiReceived,
        _ => return None,
    })
}

pub(super) fn to_cpuid(e: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
        padding: [0; 3],
    }
}

pub(super) fn from_cpuid(e: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_survive(base in any::<u64>(), limit in any::<u32>(), selector in any::<u16>(), bits in any::<u16>(), unusable in any::<bool>()) {
            // Bits 8 to 11 of the word belong to the limit, not to the attributes.
            let segment = Segment { base, limit, selector, attributes: bits & 0xf0ff, unusable };
            prop_assert_eq!(from_segment(&to_segment(segment)), segment);
        }

        #[test]
        fn general_registers_survive(gpr in any::<[u64; 16]>(), rip in any::<u64>(), rflags in any::<u64>()) {
            let general = GeneralRegisters { gpr, rip, rflags };
            prop_assert_eq!(from_regs(&to_regs(&general)), general);
        }
    }

    #[test]
    fn multiprocessor_states_survive() {
        for state in [
            MpState::Runnable,
            MpState::Uninitialized,
            MpState::InitReceived,
            MpState::Halted,
            MpState::SipiReceived,
        ] {
            assert_eq!(from_mp_state(to_mp_state(state)), Some(state));
        }
        assert_eq!(from_mp_state(kvm_mp_state { mp_state: 99 }), None);
    }
}
