//! CPU features that a snapshot requires of a host.
//!
//! A restored guest continues to use the features that it detected at boot. The manifest
//! therefore records the CPUID that the *guest* saw, and a host whose hypervisor does not
//! offer all of it to guests is refused with the names of the missing features. All
//! leaves are compared, including leaves that are not defined yet, except those that
//! `rule` lists. Additional features of the host do no harm, because the guest's own
//! CPUID is part of the saved state.
//!
//! Manifests of format 1 contain only twelve of these words. For these the CPUID in the
//! saved state of a vCPU is compared (`restore::check_vcpu`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sm_hypervisor::state::x86_64::CpuidEntry;
use sm_hypervisor::{Arch as _, X86_64};

/// Vendor and feature words of a processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuFeatures {
    /// Architecture, such as `x86_64`.
    pub arch: String,
    /// Vendor identification string.
    pub vendor: String,
    /// Compared parts of the CPUID registers, by `leaf.subleaf.register`. Zeros are left
    /// out.
    pub words: BTreeMap<String, u32>,
}

const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// Comparison of a register of the guest's CPUID with the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Feature bits. The host must offer each bit of the guest, except those in
    /// `ignored`.
    Bits { ignored: u32 },
    /// Numbers in the fields with these masks. None of the host's may be lower. Other
    /// bits are ignored.
    AtLeast(&'static [u32]),
    /// The host's value must be equal.
    Same,
    /// The register is not compared.
    Ignored,
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Returns the comparison rule of a register. The default is a comparison by bits (Intel
/// SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux
/// `Documentation/virt/kvm/x86/cpuid.rst`).
fn rule(leaf: u32, subleaf: u32, register: usize) -> Rule {
    match (leaf, subleaf, register) {
        // Number of leaves; the vendor, which is compared separately.
        (0 | 0x8000_0000 | 0xc000_0000, ..)
        // Family, model, stepping; brand, CLFLUSH size, number of threads, APIC id.
        | (1 | 0x8000_0001, _, EAX | EBX)
        // Caches and TLBs; the serial number; MONITOR sizes, which are not offered.
        | (2..=5 | 0x18 | 0x8000_0005 | 0x8000_0006 | 0x8000_0019 | 0x8000_001d, ..)
        // Number of interrupt thresholds; numbers of subleaves.
        | (6, _, EBX)
        | (7 | 0x24, 0, EAX)
        // Topology, which is set for each VM; the type of a core.
        | (0xb | 0x1a | 0x1f | 0x8000_001e | 0x8000_0026, ..)
        | (0x8000_0008, _, ECX)
        // Sizes of the XSAVE area for all features of the host, or for the current XCR0.
        | (0xd, 0, EBX | ECX)
        | (0xd, 1, EBX)
        // Frequencies. Restoring the time-stamp counter checks its frequency separately.
        | (0x15 | 0x16, ..)
        // Brand string and vendor; performance hints.
        | (0x17 | 0x8000_0002..=0x8000_0004 | 0x8000_001a, ..)
        // Numbers of error reporting and power sampling.
        | (0x8000_0007, _, EAX | ECX)
        // Memory encryption, which no VM uses.
        | (0x8000_001f, ..)
        // Sizes of microcode patches and of the return stack.
        | (0x8000_0021, _, EBX) => Rule::Ignored,
        // OSXSAVE and the hypervisor bit are not features of the processor.
        (1, _, ECX) => Rule::Bits { ignored: 1 << 27 | 1 << 31 },
        // OSPKE.
        (7, 0, ECX) => Rule::Bits { ignored: 1 << 4 },
        // Speculation-control bits change with microcode updates.
        (7, 0, EDX) => Rule::Bits { ignored: 0xfc00_0000 | 1 << 10 | 1 << 9 },
        (0x8000_0008, _, EBX) => Rule::Bits { ignored: 0xffff_f000 },
        // Size and offset of an XSAVE component, which determine the layout of areas in
        // guest memory.
        (0xd, 2.., EAX | EBX) => Rule::Same,
        // Version of AVX10, and the vector lengths.
        (0x24, 0, EBX) => Rule::AtLeast(&[0xff, 1 << 16, 1 << 17, 1 << 18]),
        // The hypervisor's number of leaves, and its signature.
        (0x4000_0000, _, EAX) => Rule::AtLeast(&[u32::MAX]),
        (0x4000_0000, ..) => Rule::Same,
        // Widths of physical and linear addresses.
        (0x8000_0008, _, EAX) => Rule::AtLeast(&[0xff, 0xff00]),
        _ => Rule::Bits { ignored: 0 },
    }
}

impl Rule {
    /// Returns the part of a value that is compared.
    fn apply(self, value: u32) -> u32 {
        match self {
            Self::Bits { ignored } => value & !ignored,
            Self::AtLeast(fields) => value & fields.iter().fold(0, |all, field| all | field),
            Self::Same => value,
            Self::Ignored => 0,
        }
    }

    /// Returns the names of the features that a host lacks.
    fn lacking(self, key: &str, needed: u32, offered: u32) -> Vec<String> {
        match self {
            Self::Bits { .. } => (0..32)
                .filter(|bit| needed & !offered & (1 << bit) != 0)
                .map(|bit| feature_name(key, bit))
                .collect(),
            Self::AtLeast(fields) => fields
                .iter()
                .filter(|&field| needed & field > offered & field)
                .map(|field| {
                    let number = |value| (value & field) >> field.trailing_zeros();
                    let (needed, offered) = (number(needed), number(offered));
                    match (key, field) {
                        ("80000008.0.eax", 0xff) => {
                            format!("{needed}-bit physical addresses (but {offered}-bit ones)")
                        }
                        _ => format!("{needed} in CPUID {key} (but {offered})"),
                    }
                })
                .collect(),
            Self::Same if needed != offered => {
                vec![format!("{needed:#x} in CPUID {key} (but {offered:#x})")]
            }
            Self::Same | Self::Ignored => Vec::new(),
        }
    }
}

/// Returns the rule for a word of a manifest. A key that cannot be parsed is compared by
/// bits.
fn rule_of(key: &str) -> Rule {
    let mut parts = key.splitn(3, '.');
    let mut next = || parts.next();
    let parsed = (|| {
        let leaf = u32::from_str_radix(next()?, 16).ok()?;
        let subleaf = next()?.parse().ok()?;
        let register = next()?;
        let register = REGISTERS.iter().position(|name| *name == register)?;
        Some(rule(leaf, subleaf, register))
    })();
    parsed.unwrap_or(Rule::Bits { ignored: 0 })
}

/// Names of common feature bits; others are reported by position.
const NAMES: [(&str, u32, &str); 28] = [
    ("00000001.0.ecx", 0, "sse3"),
    ("00000001.0.ecx", 9, "ssse3"),
    ("00000001.0.ecx", 12, "fma"),
    ("00000001.0.ecx", 13, "cmpxchg16b"),
    ("00000001.0.ecx", 19, "sse4.1"),
    ("00000001.0.ecx", 20, "sse4.2"),
    ("00000001.0.ecx", 21, "x2apic"),
    ("00000001.0.ecx", 23, "popcnt"),
    ("00000001.0.ecx", 25, "aes"),
    ("00000001.0.ecx", 26, "xsave"),
    ("00000001.0.ecx", 28, "avx"),
    ("00000001.0.ecx", 30, "rdrand"),
    ("00000007.0.ebx", 3, "bmi1"),
    ("00000007.0.ebx", 5, "avx2"),
    ("00000007.0.ebx", 8, "bmi2"),
    ("00000007.0.ebx", 16, "avx512f"),
    ("00000007.0.ebx", 17, "avx512dq"),
    ("00000007.0.ebx", 18, "rdseed"),
    ("00000007.0.ebx", 29, "sha"),
    ("00000007.0.ebx", 30, "avx512bw"),
    ("00000007.0.ebx", 31, "avx512vl"),
    ("00000007.0.ecx", 11, "avx512vnni"),
    ("40000001.0.eax", 3, "kvmclock"),
    ("40000001.0.eax", 5, "kvm-steal-time"),
    ("40000001.0.eax", 6, "kvm-pv-eoi"),
    ("40000001.0.eax", 9, "kvm-pv-tlb-flush"),
    ("40000001.0.eax", 11, "kvm-pv-ipi"),
    ("40000001.0.eax", 13, "kvm-pv-sched-yield"),
];

impl CpuFeatures {
    /// Extracts the features from the CPUID entries of a guest: those of a saved vCPU, or
    /// those that the hypervisor offers.
    #[must_use]
    pub fn of(cpuid: &[CpuidEntry]) -> Self {
        let find = |leaf, subleaf| {
            let mut entries = cpuid.iter();
            entries.find(|entry| (entry.function, entry.index) == (leaf, subleaf))
        };
        let vendor: Vec<u8> = find(0, 0)
            .into_iter()
            .flat_map(|root| [root.ebx, root.edx, root.ecx])
            .flat_map(u32::to_le_bytes)
            .collect();
        let mut words = BTreeMap::new();
        for entry in cpuid {
            let (leaf, subleaf) = (entry.function, entry.index);
            let values = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            for (register, (name, value)) in REGISTERS.iter().zip(values).enumerate() {
                let value = rule(leaf, subleaf, register).apply(value);
                if value != 0 {
                    words.insert(format!("{leaf:08x}.{subleaf}.{name}"), value);
                }
            }
        }
        Self {
            arch: X86_64::NAME.to_owned(),
            vendor: String::from_utf8_lossy(&vendor).into_owned(),
            words,
        }
    }

    /// Checks that `self` and `host` are of one architecture.
    ///
    /// # Errors
    /// A sentence that names both.
    pub(crate) fn check_arch(&self, host: &Self) -> Result<(), String> {
        if self.arch == host.arch {
            return Ok(());
        }
        Err(format!(
            "it was created on {}, and this host is {}",
            self.arch, host.arch
        ))
    }

    /// Checks that a guest that was created with `self` can run on a host that offers
    /// `host`.
    ///
    /// # Errors
    /// A sentence that names the features that `host` lacks.
    pub fn check(&self, host: &Self) -> Result<(), String> {
        self.check_arch(host)?;
        if self.vendor != host.vendor {
            return Err(format!(
                "it was created on a processor by {}, and this one is by {}",
                self.vendor, host.vendor
            ));
        }
        let mut missing = Vec::new();
        for (key, &needed) in &self.words {
            let offered = host.words.get(key).copied().unwrap_or(0);
            missing.extend(rule_of(key).lacking(key, needed, offered));
        }
        if missing.is_empty() {
            return Ok(());
        }
        Err(format!(
            "this host does not offer {} to guests, which the snapshot may use",
            missing.join(", ")
        ))
    }
}

fn feature_name(register: &str, bit: u32) -> String {
    NAMES
        .iter()
        .find(|(r, b, _)| *r == register && *b == bit)
        .map_or_else(
            || format!("CPUID {register} bit {bit}"),
            |(_, _, name)| (*name).to_owned(),
        )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A processor with SSE3, AVX2 and other features.
    pub(crate) fn sample() -> CpuFeatures {
        let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..CpuidEntry::default()
        };
        CpuFeatures::of(&[
            leaf(0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            leaf(1, [0, 0, 1 | 1 << 27 | 1 << 31, 0x178b_fbff]),
            leaf(7, [1, 1 << 5, 0, 0]),
            leaf(0xd, [7, 0, 0, 0]),
        ])
    }

    #[test]
    fn feature_words_are_those_that_the_guest_sees() {
        let cpu = sample();
        assert_eq!(cpu.vendor, "AuthenticAMD");
        assert_eq!(
            cpu.words["00000001.0.ecx"], 1,
            "not OSXSAVE, nor hypervisor"
        );
        assert_eq!(cpu.words["00000007.0.ebx"], 1 << 5);
        assert!(
            !cpu.words.contains_key("80000008.0.ebx"),
            "the guest does not see it"
        );
        assert_eq!(cpu.check(&cpu), Ok(()));
    }

    #[test]
    fn a_missing_feature_is_named() {
        let mut newer = sample();
        newer
            .words
            .insert("00000007.0.ebx".into(), 1 << 16 | 1 << 2);
        let mut older = newer.clone();
        older.words.insert("00000007.0.ebx".into(), 0);
        let reason = newer.check(&older).unwrap_err();
        assert!(reason.contains("avx512f"), "{reason}");
        assert!(reason.contains("CPUID 00000007.0.ebx bit 2"), "{reason}");
        assert_eq!(older.check(&newer), Ok(()), "more features do no harm");
    }

    /// The features of a CPUID with a single register set.
    fn with(function: u32, index: u32, register: usize, value: u32) -> CpuFeatures {
        let mut values = [0; 4];
        values[register] = value;
        let [eax, ebx, ecx, edx] = values;
        CpuFeatures::of(&[CpuidEntry {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..CpuidEntry::default()
        }])
    }

    #[test]
    fn every_leaf_is_compared_by_its_bits() {
        // Leaves that are not defined yet are included.
        let leaves = [
            (7, 1, EDX),
            (7, 2, EDX),
            (7, 9, EBX),
            (0x29, 0, EAX),
            (0x4000_0001, 0, EAX),
            (0x8000_0021, 0, EAX),
            (0x8000_0030, 3, ECX),
        ];
        for (leaf, subleaf, register) in leaves {
            let guest = with(leaf, subleaf, register, 0b110);
            let reason = guest.check(&with(leaf, subleaf, register, 0b1011));
            assert!(reason.unwrap_err().contains("bit 2"), "{leaf:#x}");
            assert!(guest.check(&with(0, 0, EAX, 0)).is_err(), "{leaf:#x}");
            assert_eq!(guest.check(&with(leaf, subleaf, register, 0b1110)), Ok(()));
        }
    }

    #[test]
    fn an_older_kvm_does_not_lose_the_guests_interrupts() {
        let guest = with(0x4000_0001, 0, EAX, 1 << 11 | 1 << 3);
        let reason = guest.check(&with(0x4000_0001, 0, EAX, 1 << 3)).unwrap_err();
        assert!(reason.contains("kvm-pv-ipi"), "{reason}");
        assert!(!reason.contains("kvmclock"), "{reason}");
    }

    #[test]
    fn numbers_are_compared_as_numbers() {
        let bits = |physical: u32, linear: u32| with(0x8000_0008, 0, EAX, linear << 8 | physical);
        assert_eq!(bits(48, 48).check(&bits(52, 57)), Ok(()));
        assert_eq!(bits(52, 48).check(&bits(52, 48)), Ok(()));
        let reason = bits(52, 48).check(&bits(48, 48)).unwrap_err();
        assert!(reason.contains("52-bit physical"), "{reason}");
        assert!(bits(48, 57).check(&bits(52, 48)).is_err());
        // The width of the host's guest physical addresses is not compared.
        assert_eq!(with(0x8000_0008, 0, EAX, 52 << 16).words.len(), 0);
    }

    /// PKRU is at offset 2688 on Intel and at 2432 on later AMD processors.
    #[test]
    fn areas_in_a_guests_memory_keep_their_layout() {
        let guest = with(0xd, 9, EBX, 2688);
        assert_eq!(guest.check(&with(0xd, 9, EBX, 2688)), Ok(()));
        assert!(guest.check(&with(0xd, 9, EBX, 2432)).is_err());
        let fewer = with(0xd, 9, ECX, 0);
        assert_eq!(fewer.check(&guest), Ok(()), "one more does no harm");
    }

    #[test]
    fn topology_and_identification_are_not_compared() {
        let ignored = [
            (0, 0, EAX),
            (1, 0, EBX),
            (4, 1, EAX),
            (0xb, 1, EBX),
            (0xd, 0, EBX),
            (0x16, 0, EAX),
            (0x8000_0003, 0, EDX),
            (0x8000_0008, 0, ECX),
            (0x8000_001e, 0, EAX),
        ];
        for (leaf, subleaf, register) in ignored {
            assert!(with(leaf, subleaf, register, u32::MAX).words.is_empty());
        }
    }

    /// Words of a manifest are compared by the rule of their register; words of an
    /// unknown register are compared by bits.
    #[test]
    fn a_word_finds_its_rule() {
        assert_eq!(rule_of("80000008.0.eax"), rule(0x8000_0008, 0, EAX));
        assert_eq!(rule_of("0000000d.12.ebx"), Rule::Same);
        for odd in ["", "x.0.eax", "1.0", "00000001.0.rax"] {
            assert_eq!(rule_of(odd), Rule::Bits { ignored: 0 });
        }
    }

    #[test]
    fn another_vendor_is_refused() {
        let other = CpuFeatures {
            vendor: "Elsewhere".into(),
            ..sample()
        };
        assert!(other.check(&sample()).is_err());
    }
}
