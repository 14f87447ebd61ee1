//! Model-specific registers: all that KVM lists and that can be read.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::os;
use crate::Error;

/// Time-stamp counter: restored first, because others are relative to it.
pub(super) const TSC: u32 = 0x10;
/// Local APIC timer deadline: accepted only once the local APIC is in its mode.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// Returns true for registers that describe the host's microcode, for Hyper-V's, which are
/// not offered, and for performance counters: reading them costs time and restoring them is
/// meaningless.
fn is_skipped(index: u32) -> bool {
    matches!(index,
        // IA32_BIOS_SIGN_ID: the host's microcode revision.
        0x8b
        // Hyper-V synthetic registers.
        | 0x4000_0000..=0x4000_01ff
        // Performance counters, which the guest's CPUID does not offer.
        | 0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x329 | 0x38d..=0x391 | 0x3f1..=0x3f2
        | 0x4c1..=0x4c8 | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b
        | 0xc000_0300..=0xc000_0302)
}

/// Selects the registers worth saving from those that KVM lists.
pub(super) fn to_save(listed: &[u32]) -> Vec<u32> {
    let listed = listed.iter().copied();
    listed.filter(|&index| !is_skipped(index)).collect()
}

/// Reads all of `indices` that can be read.
pub(super) fn save(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut wanted = indices;
    let mut saved = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let entries: Vec<kvm_msr_entry> = wanted
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..kvm_msr_entry::default()
            })
            .collect();
        let mut msrs = from_entries(&entries)?;
        let read = fd.get_msrs(&mut msrs).map_err(os("read MSRs"))?;
        saved.extend(
            msrs.as_slice()
                .iter()
                .take(read)
                .map(|entry| (entry.index, entry.data)),
        );
        // The entry after the last one read cannot be read: listed, but not on this CPU.
        wanted = wanted.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

/// Writes registers in the given order. A register that cannot be written is accepted if it
/// has the value already, or if it cannot be read and the value is zero.
pub(super) fn restore(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), Error> {
    let entries: Vec<kvm_msr_entry> = values
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        })
        .collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let written = fd
            .set_msrs(&from_entries(rest)?)
            .map_err(os("write MSRs"))?;
        let Some(refused) = rest.get(written) else {
            break;
        };
        let current = save(fd, &[refused.index])?;
        let same = match current.first() {
            Some((_, value)) => *value == refused.data,
            None => refused.data == 0,
        };
        if !same {
            return Err(Error::State {
                reason: format!(
                    "this host does not accept {:#x} in MSR {:#x}",
                    refused.data, refused.index
                ),
            });
        }
        rest = &rest[written + 1..];
    }
    Ok(())
}

/// Returns the value of one register, if it is among `values`.
pub(super) fn value(values: &[(u32, u64)], index: u32) -> Option<u64> {
    values
        .iter()
        .find(|(other, _)| *other == index)
        .map(|(_, value)| *value)
}

fn from_entries(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| Error::Unsupported {
        what: format!("a list of {} MSRs", entries.len()),
    })
}
