//! Which processor a snapshot needs.
//!
//! A restored guest keeps using the instructions it found at boot. The manifest
//! therefore records the feature words that the *guest* was given, and a host whose
//! hypervisor does not offer one of these features to guests is refused by name.
//! Extra features of the new host do no harm: the guest's own CPUID is part of the
//! saved state.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sm_hypervisor::state::CpuidEntry;

/// Vendor and feature words of a processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuFeatures {
    /// Architecture, such as `x86_64`.
    pub arch: String,
    /// Vendor identification string.
    pub vendor: String,
    /// Feature words by CPUID register: `leaf.subleaf.register`.
    pub words: BTreeMap<String, u32>,
}

/// A CPUID register that holds feature bits.
struct Word {
    leaf: u32,
    subleaf: u32,
    /// Index into eax, ebx, ecx, edx.
    register: usize,
    /// Bits that say what the operating system or hypervisor did, not what the
    /// processor can do.
    ignored: u32,
}

const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

const fn word(leaf: u32, subleaf: u32, register: usize, ignored: u32) -> Word {
    Word {
        leaf,
        subleaf,
        register,
        ignored,
    }
}

/// Intel SDM volume 2A (CPUID), AMD APM volume 3 appendix E.
const WORDS: [Word; 12] = [
    // OSXSAVE and "a hypervisor is present" are not the processor's.
    word(1, 0, 2, 1 << 27 | 1 << 31),
    word(1, 0, 3, 0),
    word(7, 0, 1, 0),
    // OSPKE.
    word(7, 0, 2, 1 << 4),
    // The speculation-control bits come and go with microcode.
    word(7, 0, 3, 0xfc00_0000 | 1 << 10 | 1 << 9),
    word(7, 1, 0, 0),
    word(0xd, 0, 0, 0),
    word(0xd, 1, 0, 0),
    word(0x8000_0001, 0, 2, 0),
    word(0x8000_0001, 0, 3, 0),
    word(0x8000_0007, 0, 3, 0),
    word(0x8000_0008, 0, 1, 0xffff_f000),
];

/// Names of the bits that people ask about; others are given by position.
const NAMES: [(&str, u32, &str); 22] = [
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
];

impl CpuFeatures {
    /// The processor that CPUID entries of a guest tell of: those of a saved vCPU, or
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
        for word in &WORDS {
            let Some(entry) = find(word.leaf, word.subleaf) else {
                continue;
            };
            let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            let key = format!(
                "{:08x}.{}.{}",
                word.leaf, word.subleaf, REGISTERS[word.register]
            );
            words.insert(key, registers[word.register] & !word.ignored);
        }
        Self {
            arch: std::env::consts::ARCH.to_owned(),
            vendor: String::from_utf8_lossy(&vendor).into_owned(),
            words,
        }
    }

    /// Says whether a guest that was given `self` can go on where `host` is offered.
    ///
    /// # Errors
    /// A sentence that names what `host` lacks.
    pub fn check(&self, host: &Self) -> Result<(), String> {
        if self.arch != host.arch {
            return Err(format!(
                "it was made on {}, and this host is {}",
                self.arch, host.arch
            ));
        }
        if self.vendor != host.vendor {
            return Err(format!(
                "it was made on a processor by {}, and this one is by {}",
                self.vendor, host.vendor
            ));
        }
        let mut missing = Vec::new();
        for (register, &needed) in &self.words {
            let lacking = needed & !host.words.get(register).copied().unwrap_or(0);
            missing.extend(
                (0..32)
                    .filter(|bit| lacking & (1 << bit) != 0)
                    .map(|bit| feature_name(register, bit)),
            );
        }
        if missing.is_empty() {
            return Ok(());
        }
        Err(format!(
            "this host does not offer {} to guests, which this one may be using",
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

    /// A processor with SSE3 and AVX2, among others.
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
    fn feature_words_are_taken_from_what_the_guest_is_told() {
        let cpu = sample();
        assert_eq!(cpu.vendor, "AuthenticAMD");
        assert_eq!(
            cpu.words["00000001.0.ecx"], 1,
            "not OSXSAVE, nor hypervisor"
        );
        assert_eq!(cpu.words["00000007.0.ebx"], 1 << 5);
        assert!(!cpu.words.contains_key("80000008.0.ebx"), "it was not told");
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

    #[test]
    fn another_vendor_is_refused() {
        let other = CpuFeatures {
            vendor: "Elsewhere".into(),
            ..sample()
        };
        assert!(other.check(&sample()).is_err());
    }
}
