//! Explanations of why a vCPU cannot continue.

#![expect(unsafe_code, reason = "reads members of a union that KVM filled")]

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::VcpuFd;

use super::slots::SlotTable;
use crate::FaultInfo;

/// The longest x86 instruction, in bytes.
const INSTRUCTION_LEN: usize = 15;

/// Returns the meaning of a `KVM_EXIT_INTERNAL_ERROR`.
pub(super) fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills
    // this member of the union.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction".to_owned(),
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception arose while another was delivered".to_owned(),
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered".to_owned(),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the processor left the guest for a reason unknown to KVM".to_owned()
        }
        other => format!("KVM internal error {other}"),
    }
}

/// Adds the program counter and the instruction.
pub(super) fn locate(fd: &mut VcpuFd, slots: &SlotTable, reason: String) -> FaultInfo {
    let (regs, sregs) = (fd.get_regs(), fd.get_sregs());
    let program_counter = regs.map_or(0, |regs| regs.rip);
    let mut instruction = reported_bytes(fd);
    if instruction.is_empty()
        && let Ok(sregs) = sregs
    {
        let linear = if sregs.efer & 1 << 10 == 0 || sregs.cs.l == 0 {
            sregs.cs.base.wrapping_add(program_counter) & 0xffff_ffff
        } else {
            program_counter
        };
        instruction = bytes_in_memory(fd, slots, linear);
    }
    FaultInfo {
        reason,
        program_counter,
        instruction,
    }
}

/// Returns the instruction as KVM fetched it, if KVM reports it; otherwise nothing.
fn reported_bytes(fd: &mut VcpuFd) -> Vec<u8> {
    let run = fd.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return Vec::new();
    }
    // SAFETY: the member for this exit reason; any bit pattern is valid.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION
        || failure.ndata < 3
        || failure.flags & flag == 0
    {
        return Vec::new();
    }
    // SAFETY: the flag says that KVM filled this member; it is plain bytes.
    let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = usize::from(bytes.insn_size).min(INSTRUCTION_LEN);
    bytes.insn_bytes[..len].to_vec()
}

/// Returns the bytes at a linear address, as far as they are in one page of RAM.
fn bytes_in_memory(fd: &VcpuFd, slots: &SlotTable, linear: u64) -> Vec<u8> {
    let Ok(translation) = fd.translate_gva(linear) else {
        return Vec::new();
    };
    if translation.valid == 0 {
        return Vec::new();
    }
    let in_page = usize::try_from(4096 - (linear & 4095)).unwrap_or(0);
    let mut bytes = vec![0; INSTRUCTION_LEN.min(in_page)];
    let len = slots.lock().read(translation.physical_address, &mut bytes);
    bytes.truncate(len);
    bytes
}
