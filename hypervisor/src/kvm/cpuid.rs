//! CPUID of the guest: KVM's supported CPUID with the topology of the VM, without features
//! that cannot be saved or are not set up.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::Error;

/// KVM's own feature leaf (Linux `Documentation/virt/kvm/x86/cpuid.rst`).
const KVM_FEATURES: u32 = 0x4000_0001;
/// Asynchronous page faults: a fault in flight cannot be saved.
const KVM_ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// XSAVE components of AMX: the tile configuration, and the tile data, for which Linux
/// demands a permission and allocates 8 KiB for each task (Linux
/// `Documentation/arch/x86/xstate.rst`).
const AMX: u32 = 1 << 17 | 1 << 18;

/// Returns the CPUID of vCPU `index` of `count`, each a core of its own in one package.
pub(super) fn for_vcpu(
    supported: &CpuId,
    index: u32,
    count: u32,
    tsc_deadline: bool,
) -> Result<CpuId, Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !is_dropped(entry))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, index, count, tsc_deadline);
    }
    let leaf0 = entries.iter_mut().find(|entry| entry.function == 0);
    // Leaf 0x1f would need a description as well: end before it.
    if let Some(leaf0) = leaf0 {
        leaf0.eax = leaf0.eax.clamp(0xb, 0x1e);
    }
    entries.extend(topology(index, count));
    CpuId::from_entries(&entries).map_err(|_| Error::Unsupported {
        what: format!("a CPUID of {} entries", entries.len()),
    })
}

/// Returns everything that a vCPU's CPUID could contain: the result of [`for_vcpu`] for one
/// of several vCPUs, and KVM's other features.
pub(super) fn offered(
    supported: &CpuId,
    tsc_deadline: bool,
) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    let mut entries = for_vcpu(supported, 0, 2, tsc_deadline)?.as_slice().to_vec();
    for more in supported.as_slice() {
        let same = |entry: &&mut kvm_cpuid_entry2| {
            (entry.function, entry.index) == (more.function, more.index)
        };
        match entries.iter_mut().find(same) {
            Some(entry) => {
                entry.eax |= more.eax;
                entry.ebx |= more.ebx;
                entry.ecx |= more.ecx;
                entry.edx |= more.edx;
            }
            None => entries.push(*more),
        }
    }
    Ok(entries)
}

/// Returns true for leaves that are written here or that describe features the guest does
/// not have: performance counters, SGX, processor trace, last branch records, AMX, nested
/// virtualisation; XSAVE components of AMX and of supervisor state.
fn is_dropped(entry: &kvm_cpuid_entry2) -> bool {
    match entry.function {
        0xa | 0xb | 0x12 | 0x14 | 0x1c | 0x1d | 0x1e | 0x1f | 0x8000_000a | 0x8000_0022 => true,
        0xd => entry.index >= 2 && (AMX >> entry.index & 1 != 0 || entry.ecx & 1 != 0),
        _ => false,
    }
}

fn adjust(entry: &mut kvm_cpuid_entry2, index: u32, count: u32, tsc_deadline: bool) {
    match (entry.function, entry.index) {
        (1, _) => {
            let logical = count.min(255);
            entry.ebx = entry.ebx & 0x0000_ffff | logical << 16 | (index & 0xff) << 24;
            // VMX and performance capabilities are not saved.
            entry.ecx &= !(1 << 5 | 1 << 15);
            entry.ecx |= 1 << 31; // a hypervisor is present
            if tsc_deadline {
                entry.ecx |= 1 << 24;
            }
            entry.edx = entry.edx & !(1 << 28) | u32::from(count > 1) << 28;
        }
        // Intel's cache topology: one core for each L1 and L2 cache, `count` cores for
        // larger ones and in the package.
        (4, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count } else { 1 };
            entry.eax =
                entry.eax & 0x3fff | (sharing.min(4096) - 1) << 14 | (count.min(64) - 1) << 26;
        }
        // CET is not set up, AMX is not requested; SGX, processor trace and last branch
        // records are not saved.
        (7, 0) => {
            entry.ebx &= !(1 << 2 | 1 << 25);
            entry.ecx &= !(1 << 7 | 1 << 30);
            entry.edx &= !(1 << 19 | 1 << 20 | 1 << 22 | 1 << 24 | 1 << 25);
        }
        (7, 1) => {
            entry.eax &= !(1 << 21);
            entry.edx &= !(1 << 8 | 1 << 18);
        }
        (0xd, 0) => entry.eax &= !AMX,
        // No dynamic features, no supervisor components.
        (0xd, 1) => {
            entry.eax &= !(1 << 4);
            entry.ecx = 0;
            entry.edx = 0;
        }
        (KVM_FEATURES, _) => entry.eax &= !KVM_ASYNC_PF,
        // AMD: SVM, extended performance counters.
        (0x8000_0001, _) => entry.ecx &= !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28),
        // AMD: number of threads minus one, and bits of the APIC id.
        (0x8000_0008, _) => {
            entry.ecx = (count.min(256) - 1) | id_bits(count) << 12;
        }
        // AMD: extended APIC id, core id with one thread in each core, one node.
        (0x8000_001e, _) => {
            entry.eax = index;
            entry.ebx = index & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Returns the number of bits that hold the numbers 0 to `count` - 1.
fn id_bits(count: u32) -> u32 {
    u32::BITS - (count.max(1) - 1).leading_zeros()
}

/// Returns leaf 0xb: a thread level with one thread, a core level with all (Intel SDM
/// volume 2A).
fn topology(index: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |number: u32, shift: u32, cpus: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: cpus,
        ecx: number | kind << 8,
        edx: index,
        ..kvm_cpuid_entry2::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, id_bits(count), count, 2),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        };
        let leaves = [
            leaf(0, 0),
            leaf(1, 0),
            leaf(7, 0),
            leaf(0xa, 0),
            leaf(0xd, 0),
            leaf(0xd, 2),
            leaf(0xd, 17),
            leaf(0x8000_0001, 0),
            leaf(0x1f, 0),
        ];
        CpuId::from_entries(&leaves).unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        let mut entries = cpuid.as_slice().iter();
        entries
            .find(|e| e.function == function && e.index == index)
            .copied()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for index in 0..4 {
            let cpuid = for_vcpu(&supported(), index, 4, true).unwrap();
            assert_eq!(find(&cpuid, 1, 0).unwrap().ebx >> 24, index);
            for level in 0..3 {
                assert_eq!(find(&cpuid, 0xb, level).unwrap().edx, index);
            }
            assert_eq!(
                find(&cpuid, 0xb, 1).unwrap().eax,
                2,
                "two bits for four cores"
            );
            assert!(find(&cpuid, 0x1f, 0).is_none());
        }
    }

    #[test]
    fn features_that_cannot_be_saved_are_hidden() {
        let cpuid = for_vcpu(&supported(), 0, 1, false).unwrap();
        let leaf7 = find(&cpuid, 7, 0).unwrap();
        assert_eq!(leaf7.ecx & 1 << 7, 0, "shadow stacks");
        assert_eq!(leaf7.edx & 1 << 24, 0, "AMX");
        assert!(find(&cpuid, 0xa, 0).is_none(), "performance counters");
        assert!(find(&cpuid, 0xd, 17).is_none(), "AMX tiles");
        assert_eq!(find(&cpuid, 1, 0).unwrap().ecx & 1 << 5, 0, "VMX");
        assert_eq!(find(&cpuid, 0x8000_0001, 0).unwrap().ecx & 1 << 2, 0, "SVM");
        assert_ne!(leaf7.ebx & 1 << 5, 0, "AVX2 stays");
    }

    #[test]
    fn identifiers_need_just_enough_bits() {
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6)] {
            assert_eq!(id_bits(count), bits, "{count}");
        }
    }
}
