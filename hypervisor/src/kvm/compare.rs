//! Comparison of a restored vCPU with its saved state, in debug builds.
//!
//! Not compared, because it changes by itself or belongs to the host: time-stamp counter
//! and timer deadline, the two registers of kvmclock's wall clock, the APIC timer's current
//! count, values that KVM computes (the APIC's processor priority), and CPUID, bits of which
//! follow CR4 and XCR0.

use crate::Error;
use crate::state::x86_64::VcpuState;

/// Registers whose value changes by itself or has a side effect: TSC; TSC_DEADLINE;
/// kvmclock's wall clock (old and new MSR), which KVM writes to guest memory when it is
/// set.
const MOVING_MSRS: [u32; 4] = [
    super::msrs::TSC,
    super::msrs::TSC_DEADLINE,
    0x11,
    0x4b56_4d00,
];
/// Local APIC: processor priority, and the timer's current count.
const MOVING_LAPIC: [usize; 2] = [0xa0, 0x390];

/// Returns an error that names the first element that differs.
pub(super) fn check_equal(wanted: &VcpuState, found: &VcpuState) -> Result<(), Error> {
    let checks = [
        ("general registers", found.general == wanted.general),
        ("system registers", found.system == wanted.system),
        ("debug registers", found.debug == wanted.debug),
        ("extended control registers", found.xcrs == wanted.xcrs),
        ("MP state", found.mp_state == wanted.mp_state),
        ("XSAVE area", equal_xsave(&wanted.xsave, &found.xsave)),
        (
            "events",
            super::state::equal_events(&wanted.events, &found.events),
        ),
    ];
    let different = checks
        .iter()
        .find(|(_, same)| !same)
        .map(|(what, _)| (*what).to_owned())
        .or_else(|| lapic(&wanted.lapic, &found.lapic))
        .or_else(|| msr(&wanted.msrs, &found.msrs));
    match different {
        Some(what) => Err(Error::State {
            reason: format!("{what} of vCPU {} read back differently", wanted.index),
        }),
        None => Ok(()),
    }
}

/// Compares areas that may differ in length: components beyond the shorter one must be in
/// their initial state, zero.
fn equal_xsave(a: &[u8], b: &[u8]) -> bool {
    let common = a.len().min(b.len());
    let rest = a[common..].iter().chain(&b[common..]);
    a[..common] == b[..common] && rest.copied().all(|byte| byte == 0)
}

fn lapic(wanted: &[u8], found: &[u8]) -> Option<String> {
    let registers = wanted.chunks(16).zip(found.chunks(16)).enumerate();
    let mut different = registers.filter(|(_, (a, b))| a != b).map(|(i, _)| i * 16);
    different
        .find(|offset| !MOVING_LAPIC.contains(offset))
        .map(|offset| format!("local APIC register {offset:#x}"))
}

fn msr(wanted: &[(u32, u64)], found: &[(u32, u64)]) -> Option<String> {
    let mut compared = wanted
        .iter()
        .filter(|(index, _)| !MOVING_MSRS.contains(index));
    compared
        .find(|&&(index, value)| {
            let found = super::msrs::value(found, index);
            // AMD processors have 32 bits of SYSENTER_ESP and SYSENTER_EIP, which
            // long mode does not use there.
            let bits = if matches!(index, 0x175 | 0x176) {
                u64::from(u32::MAX)
            } else {
                u64::MAX
            };
            found.is_none_or(|found| (found ^ value) & bits != 0)
        })
        .map(|(index, value)| {
            let found = super::msrs::value(found, *index);
            format!("MSR {index:#x} ({value:#x}, then {found:x?})")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_named() {
        let wanted = VcpuState {
            lapic: vec![0; 1024],
            msrs: vec![(0x10, 5), (0x277, 7)],
            ..VcpuState::default()
        };
        assert!(check_equal(&wanted, &wanted).is_ok());
        let mut found = wanted.clone();
        found.msrs[0].1 = 6;
        found.lapic[0x390] = 1;
        assert!(check_equal(&wanted, &found).is_ok(), "counters move");
        found.msrs[1].1 = 6;
        assert!(
            check_equal(&wanted, &found)
                .unwrap_err()
                .to_string()
                .contains("0x277")
        );
        found.lapic[0x80] = 1;
        assert!(
            check_equal(&wanted, &found)
                .unwrap_err()
                .to_string()
                .contains("0x80")
        );
        found.general.rip = 1;
        assert!(
            check_equal(&wanted, &found)
                .unwrap_err()
                .to_string()
                .contains("general")
        );
    }
}
