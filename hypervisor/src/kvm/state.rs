//! Saving and restoring a vCPU.
//!
//! Order matters in both directions:
//!
//! - Saving: the multiprocessor state first, because reading it makes KVM process pending
//!   INIT and start-up signals; events next, because reading these makes KVM write the
//!   address of a pending page fault into CR2, and the cause of a pending debug exception
//!   into DR6.
//! - Restoring: CPUID first (it determines which other state is accepted), TSC frequency,
//!   system registers (they set the local APIC's base and mode), XCR0 before the XSAVE
//!   area, the TSC before all other MSRs (see `tsc.rs`), the local APIC, then the deadline
//!   of its timer, events, and the multiprocessor state last.
//!
//! Not saved, because the guest's CPUID does not offer it (see `cpuid.rs`): nested
//! virtualisation, performance counters, AMX tiles, shadow stacks, SGX, processor trace,
//! asynchronous page faults. KVM reads the PDPTRs of a 32-bit PAE guest from memory again
//! when CR3 is set.

use kvm_bindings::{
    CpuId, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Xsave, kvm_lapic_state, kvm_vcpu_events, kvm_xcr,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::vm_shared::VmShared;
use super::{BACKEND, convert, msrs, os};
use crate::Error;
use crate::state::Blob;
use crate::state::x86_64::{CpuidEntry, VcpuState};

/// Layout version of the events blob: `kvm_vcpu_events` as the kernel has it.
pub(super) const EVENTS_VERSION: u32 = 1;

fn unfit(reason: impl Into<String>) -> Error {
    Error::State {
        reason: reason.into(),
    }
}

/// Saves vCPU `index`, whose CPUID is `cpuid`. `xsave_len` is the size of its XSAVE area in
/// bytes.
pub(super) fn save(
    fd: &VcpuFd,
    index: u32,
    cpuid: Vec<CpuidEntry>,
    xsave_len: usize,
    msr_indices: &[u32],
) -> Result<VcpuState, Error> {
    let mp_state = fd.get_mp_state().map_err(os("read the MP state"))?;
    let mp_state = convert::from_mp_state(mp_state)
        .ok_or_else(|| unfit(format!("MP state {} is unknown", mp_state.mp_state)))?;
    let events = fd.get_vcpu_events().map_err(os("read events"))?;
    let general = convert::from_regs(&fd.get_regs().map_err(os("read registers"))?);
    let system = convert::from_sregs(&fd.get_sregs().map_err(os("read system registers"))?);
    let xsave = save_xsave(fd, xsave_len)?;
    let xcrs = fd.get_xcrs().map_err(os("read XCRs"))?;
    let debug = convert::from_debug(&fd.get_debug_regs().map_err(os("read debug registers"))?);
    let lapic = fd.get_lapic().map_err(os("read the local APIC"))?;
    let mut values = msrs::save(fd, msr_indices)?;
    arm_expired_deadline(&mut values);
    // Not every KVM reports it; the frequency is then the host's.
    let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
    let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0);
    Ok(VcpuState {
        index,
        cpuid,
        tsc_khz,
        general,
        system,
        debug,
        xcrs: xcrs
            .xcrs
            .iter()
            .take(count)
            .map(|xcr| (xcr.xcr, xcr.value))
            .collect(),
        xsave,
        msrs: values,
        lapic: lapic.as_bytes().to_vec(),
        mp_state,
        events: Blob {
            backend: BACKEND.to_owned(),
            version: EVENTS_VERSION,
            bytes: portable(events).as_bytes().to_vec(),
        },
    })
}

/// Replaces an expired deadline with the current counter. It reads as zero, which means
/// "disarmed" on restoring: if its interrupt had not arrived yet, the timer would never
/// fire again. A deadline of now makes it fire once too often at worst.
fn arm_expired_deadline(values: &mut [(u32, u64)]) {
    let Some(tsc) = msrs::value(values, msrs::TSC) else {
        return;
    };
    for (index, value) in values {
        if *index == msrs::TSC_DEADLINE && *value == 0 {
            *value = tsc;
        }
    }
}

/// Restores a vCPU of `vm`. A `fresh` one has no CPUID yet; one that has run cannot change
/// its CPUID.
pub(super) fn restore(
    fd: &VcpuFd,
    state: &VcpuState,
    fresh: bool,
    vm: &VmShared,
) -> Result<(), Error> {
    if fresh {
        restore_cpuid(fd, state)?;
        restore_frequency(fd, state.tsc_khz, vm)?;
    }
    fd.set_sregs(&convert::to_sregs(&state.system))
        .map_err(os("write system registers"))?;
    fd.set_regs(&convert::to_regs(&state.general))
        .map_err(os("write registers"))?;
    restore_xcrs(fd, state)?;
    restore_xsave(fd, &state.xsave, vm.xsave_len)?;
    fd.set_debug_regs(&convert::to_debug(&state.debug))
        .map_err(os("write debug registers"))?;
    restore_msrs(fd, state, vm)?;
    restore_events(fd, &state.events, vm.triple_faults)?;
    fd.set_mp_state(convert::to_mp_state(state.mp_state))
        .map_err(os("write the MP state"))
}

fn restore_cpuid(fd: &VcpuFd, state: &VcpuState) -> Result<(), Error> {
    let entries: Vec<_> = state.cpuid.iter().map(convert::to_cpuid).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| unfit("its CPUID is too long"))?;
    fd.set_cpuid2(&cpuid).map_err(os("write CPUID"))
}

/// Makes the time-stamp counter run at `saved` kHz (0: not known).
fn restore_frequency(fd: &VcpuFd, saved: u32, vm: &VmShared) -> Result<(), Error> {
    let host = fd.get_tsc_khz().unwrap_or(0);
    if saved == 0 || host == 0 || tolerable(host, saved) {
        return Ok(());
    }
    vm.tsc_offset.disable();
    fd.set_tsc_khz(saved).map_err(|_| {
        unfit(format!(
            "its time-stamp counter runs at {saved} kHz, this host's at {host} kHz, \
             and this host cannot scale it"
        ))
    })
}

/// Returns true within 250 parts per million: the range that NTP corrects and that KVM
/// itself accepts.
fn tolerable(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a) * 250
}

fn restore_xcrs(fd: &VcpuFd, state: &VcpuState) -> Result<(), Error> {
    let mut xcrs = kvm_xcrs::default();
    if state.xcrs.len() > xcrs.xcrs.len() {
        return Err(unfit("it has too many extended control registers"));
    }
    for (slot, &(xcr, value)) in xcrs.xcrs.iter_mut().zip(&state.xcrs) {
        *slot = kvm_xcr {
            xcr,
            value,
            ..kvm_xcr::default()
        };
    }
    xcrs.nr_xcrs = u32::try_from(state.xcrs.len()).unwrap_or(0);
    fd.set_xcrs(&xcrs).map_err(os("write XCRs"))
}

fn restore_msrs(fd: &VcpuFd, state: &VcpuState, vm: &VmShared) -> Result<(), Error> {
    let mut values = Vec::with_capacity(state.msrs.len());
    if let Some(tsc) = msrs::value(&state.msrs, msrs::TSC)
        && !vm.tsc_offset.restore(fd, tsc)
    {
        values.push((msrs::TSC, tsc));
    }
    let others = state.msrs.iter().copied();
    values.extend(others.filter(|(index, _)| !matches!(*index, msrs::TSC | msrs::TSC_DEADLINE)));
    msrs::restore(fd, &values)?;
    let mut lapic = kvm_lapic_state::default();
    let len = lapic.regs.len();
    if state.lapic.len() != len {
        return Err(unfit(format!("its local APIC page is not {len} bytes")));
    }
    lapic.as_mut_bytes().copy_from_slice(&state.lapic);
    fd.set_lapic(&lapic).map_err(os("write the local APIC"))?;
    match msrs::value(&state.msrs, msrs::TSC_DEADLINE) {
        Some(deadline) => msrs::restore(fd, &[(msrs::TSC_DEADLINE, deadline)]),
        None => Ok(()),
    }
}

fn restore_events(fd: &VcpuFd, blob: &Blob, triple_faults: bool) -> Result<(), Error> {
    let events = for_this_kernel(decode_events(blob)?, triple_faults)?;
    fd.set_vcpu_events(&events).map_err(os("write events"))
}

fn decode_events(blob: &Blob) -> Result<kvm_vcpu_events, Error> {
    if blob.backend != BACKEND || blob.version != EVENTS_VERSION {
        return Err(unfit(format!(
            "its events were saved by {} version {}",
            blob.backend, blob.version
        )));
    }
    kvm_vcpu_events::read_from_bytes(&blob.bytes).map_err(|_| unfit("its events have another size"))
}

/// Returns the events as every kernel accepts them, without redundant fields: the valid
/// flag of a triple fault that is not pending (only Linux 6.1 and later know it), and the
/// pending flag of an exception that KVM also reports as injected.
fn portable(mut events: kvm_vcpu_events) -> kvm_vcpu_events {
    if events.triple_fault.pending == 0 {
        events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    if events.exception.injected != 0 {
        events.exception.pending = 0;
    }
    events
}

/// Returns the events as this kernel accepts them. A kernel with triple fault events always
/// gets the flag, because a vCPU that is reset in place may have one pending.
fn for_this_kernel(events: kvm_vcpu_events, triple_faults: bool) -> Result<kvm_vcpu_events, Error> {
    let mut events = portable(events);
    if triple_faults {
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    } else if events.triple_fault.pending != 0 {
        return Err(unfit(
            "it is about to be shut down by a triple fault, which this host's kernel cannot \
             restore",
        ));
    }
    Ok(events)
}

/// Returns true if two vCPUs have the same events, independent of their kernels.
#[cfg(debug_assertions)]
pub(super) fn equal_events(a: &Blob, b: &Blob) -> bool {
    let [a, b] = [a, b].map(|blob| decode_events(blob).map(portable).ok());
    a == b
}

/// Length of the part of the structure that every KVM supports, in bytes.
const LEGACY_XSAVE: usize = 4096;

fn empty_xsave(len: usize) -> Result<Xsave, Error> {
    let extra = len.saturating_sub(LEGACY_XSAVE).div_ceil(4);
    Xsave::new(extra).map_err(|_| unfit(format!("an XSAVE area of {len} bytes")))
}

#[expect(unsafe_code, reason = "KVM writes as much as it said it would")]
fn save_xsave(fd: &VcpuFd, len: usize) -> Result<Vec<u8>, Error> {
    if len <= LEGACY_XSAVE {
        let area = fd.get_xsave().map_err(os("read the XSAVE area"))?;
        return Ok(area.region.as_bytes().to_vec());
    }
    let mut xsave = empty_xsave(len)?;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave for this VM, and no
    // dynamic feature (AMX) is enabled in between.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(os("read the XSAVE area"))?;
    let area = xsave.as_fam_struct_ref();
    let mut bytes = area.xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(xsave.as_slice().as_bytes());
    Ok(bytes)
}

/// Restores an XSAVE area; `len` is the number of bytes that KVM reads. A shorter area is
/// padded with zeros (the initial state of components that the saving host did not have);
/// the excess of a longer one must be zero.
#[expect(unsafe_code, reason = "KVM reads as much as it said it would")]
fn restore_xsave(fd: &VcpuFd, bytes: &[u8], len: usize) -> Result<(), Error> {
    let Some((legacy, extra)) = bytes.split_at_checked(LEGACY_XSAVE) else {
        return Err(unfit("its XSAVE area is too short"));
    };
    let mut xsave = empty_xsave(len)?;
    let flexible = xsave.as_mut_slice().as_mut_bytes();
    let (fitting, beyond) = extra.split_at(extra.len().min(flexible.len()));
    if beyond.iter().any(|byte| *byte != 0) {
        return Err(unfit(format!(
            "its XSAVE area has {} bytes, and this host knows {len} of them",
            bytes.len()
        )));
    }
    flexible[..fitting.len()].copy_from_slice(fitting);
    // SAFETY: the length of the flexible part is not changed.
    let area = unsafe { xsave.as_mut_fam_struct() };
    area.xsave.region.as_mut_bytes().copy_from_slice(legacy);
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says that KVM reads for a
    // vCPU of this VM, and at least 4096 bytes.
    unsafe { fd.set_xsave2(&xsave) }.map_err(os("write the XSAVE area"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_deadline_is_armed_again() {
        let mut values = [(msrs::TSC, 77), (msrs::TSC_DEADLINE, 0)];
        arm_expired_deadline(&mut values);
        assert_eq!(values[1].1, 77);
        let mut values = [(msrs::TSC, 77), (msrs::TSC_DEADLINE, 99)];
        arm_expired_deadline(&mut values);
        assert_eq!(values[1].1, 99);
    }

    fn events(triple_fault: Option<u8>) -> kvm_vcpu_events {
        let mut events = kvm_vcpu_events {
            flags: 0xd,
            ..kvm_vcpu_events::default()
        };
        if let Some(pending) = triple_fault {
            events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
            events.triple_fault.pending = pending;
        }
        events
    }

    #[test]
    fn kernels_before_6_1_get_no_triple_fault_flag() {
        // Saved by this version, and by one that did not clear the flag.
        for saved in [portable(events(Some(0))), events(Some(0)), events(None)] {
            let old = for_this_kernel(saved, false).unwrap();
            assert_eq!(old, events(None), "what such a kernel knows");
            let new = for_this_kernel(saved, true).unwrap();
            assert_eq!(new, events(Some(0)), "an earlier one is cleared");
        }
        assert_eq!(portable(events(Some(0))), events(None));
    }

    #[test]
    fn a_pending_triple_fault_is_restored_or_refused() {
        let saved = portable(events(Some(1)));
        assert_eq!(saved, events(Some(1)));
        assert_eq!(for_this_kernel(saved, true).unwrap(), saved);
        let error = for_this_kernel(saved, false).unwrap_err().to_string();
        assert!(error.contains("triple fault"), "{error}");
    }

    #[test]
    fn an_exception_to_be_delivered_is_reported_once() {
        let mut reported = events(None);
        (reported.exception.injected, reported.exception.pending) = (1, 1);
        let mut wanted = reported;
        wanted.exception.pending = 0;
        assert_eq!(portable(reported), wanted);
    }

    #[test]
    fn small_differences_of_frequency_are_tolerated() {
        assert!(tolerable(2_000_000, 2_000_400));
        assert!(!tolerable(2_000_000, 2_001_000));
    }
}
