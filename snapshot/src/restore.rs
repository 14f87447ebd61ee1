//! Restoring: compatibility checks, and mapping of guest memory from a chain.

use std::sync::Arc;

use sm_hypervisor::state::x86_64::CpuidEntry;
use sm_vmm_core::memory::{FileExtent, MachineMemory, MemoryConfig};

use crate::Error;
use crate::chain::{Chain, MAX_PIECES};
use crate::cpu::CpuFeatures;
use crate::extents::{PAGE, Source};
use crate::manifest::{ALL_CPUID_FORMAT, Manifest};

/// Properties of the restoring host and software. A snapshot that requires others is
/// refused.
#[derive(Clone, Debug)]
pub struct Requirements {
    /// Version of the machine's address map and devices.
    pub machine_version: u32,
    /// Version of the protocol between host and agent.
    pub protocol: u32,
    /// SHA-256 of the kernel that a boot would use, if known.
    pub kernel: Option<String>,
    /// SHA-256 of the initial RAM file system that a boot would use, if known.
    pub agent: Option<String>,
    /// CPU features that this host offers to guests.
    pub cpu: CpuFeatures,
    /// Page size of this host in bytes; see [`host_page_bytes`].
    pub page_bytes: u64,
}

/// Returns the page size of this host in bytes: the unit in which it maps memory.
#[must_use]
pub fn host_page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

/// Checks that a snapshot can be restored on this host.
///
/// # Errors
/// [`Error::Incompatible`] with the first mismatch.
pub fn check(chain: &Chain, wanted: &Requirements) -> Result<(), Error> {
    let lease = &chain.tip().lease;
    check_manifest(lease.manifest(), wanted).map_err(|reason| Error::Incompatible {
        name: lease.name().to_owned(),
        reason,
    })
}

/// Compares architecture and page size first: of a host with others, all other values are
/// different as well, and say less.
fn check_manifest(manifest: &Manifest, wanted: &Requirements) -> Result<(), String> {
    manifest.cpu.check_arch(&wanted.cpu)?;
    if manifest.host_page_bytes() != wanted.page_bytes {
        return Err(format!(
            "it was created on a host with pages of {} bytes, and this host has pages of {}",
            manifest.host_page_bytes(),
            wanted.page_bytes
        ));
    }
    if manifest.machine_version != wanted.machine_version {
        return Err(format!(
            "it is of machine version {}, and this sm makes version {}",
            manifest.machine_version, wanted.machine_version
        ));
    }
    if manifest.protocol != wanted.protocol {
        return Err(format!(
            "its agent speaks protocol {}, and this sm speaks {}",
            manifest.protocol, wanted.protocol
        ));
    }
    for (what, found, expected) in [
        ("kernel", &manifest.kernel, &wanted.kernel),
        ("agent", &manifest.agent, &wanted.agent),
    ] {
        if let Some(expected) = expected
            && expected != found
        {
            return Err(format!("it was created with another guest {what}"));
        }
    }
    manifest.cpu.check(&wanted.cpu)
}

/// Checks the CPUID of a saved vCPU against the features that this host offers to guests,
/// if the manifest's format does not have all words that are compared ([`check`]).
///
/// # Errors
/// [`Error::Incompatible`] with the features that the host lacks.
pub fn check_vcpu(chain: &Chain, cpuid: &[CpuidEntry], host: &CpuFeatures) -> Result<(), Error> {
    let lease = &chain.tip().lease;
    if lease.manifest().format >= ALL_CPUID_FORMAT {
        return Ok(());
    }
    CpuFeatures::of(cpuid)
        .check(host)
        .map_err(|reason| Error::Incompatible {
            name: lease.name().to_owned(),
            reason,
        })
}

/// Maps the memory of a snapshot privately. Pages are read on first access, and clones
/// share the page cache.
///
/// # Errors
/// A mapping fails, a file is shorter than its index requires, or memory consists of more
/// than [`MAX_PIECES`] pieces.
pub fn map_memory(chain: &Chain) -> Result<MachineMemory, Error> {
    let machine = |e: sm_vmm_core::memory::MemoryError| Error::Machine {
        operation: "map the memory of a snapshot",
        source: Box::new(e),
    };
    if chain.pieces().len() > MAX_PIECES {
        return Err(Error::Fragmented {
            name: chain.tip().lease.name().to_owned(),
            pieces: chain.pieces().len(),
            limit: MAX_PIECES,
        });
    }
    let mut files = Vec::with_capacity(chain.members().len());
    for member in chain.members() {
        let path = member.lease.dir().join("memory.bin");
        let file = member
            .lease
            .memory()
            .try_clone()
            .map_err(Error::io("duplicate the descriptor of", &path))?;
        files.push(Arc::new(file));
    }
    let extents: Vec<FileExtent> = chain
        .pieces()
        .iter()
        .filter_map(|piece| {
            let Source::Member(index) = piece.source else {
                return None;
            };
            Some(FileExtent {
                offset: piece.first * PAGE,
                len: piece.pages * PAGE,
                file: Arc::clone(files.get(index)?),
                file_offset: piece.first * PAGE,
            })
        })
        .collect();
    let config = MemoryConfig::new(chain.tip().index.pages() * PAGE);
    MachineMemory::from_files(&config, &extents).map_err(machine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::sample;

    fn requirements(manifest: &Manifest) -> Requirements {
        Requirements {
            machine_version: manifest.machine_version,
            protocol: manifest.protocol,
            kernel: Some(manifest.kernel.clone()),
            agent: Some(manifest.agent.clone()),
            cpu: manifest.cpu.clone(),
            page_bytes: manifest.host_page_bytes(),
        }
    }

    #[test]
    fn the_host_is_compared_before_the_software() {
        let manifest = sample();
        let same = requirements(&manifest);
        check_manifest(&manifest, &same).unwrap();
        let unknown = Requirements {
            kernel: None,
            agent: None,
            ..same.clone()
        };
        check_manifest(&manifest, &unknown).unwrap();

        // From the first that is compared to the last.
        type Change = fn(&mut Requirements);
        let changes: [(&str, Change); 7] = [
            ("this host is riscv64", |r| {
                r.cpu.arch = "riscv64".to_owned()
            }),
            ("pages of 65536", |r| r.page_bytes = 1 << 16),
            ("makes version 9", |r| r.machine_version = 9),
            ("speaks 9", |r| r.protocol = 9),
            ("another guest kernel", |r| r.kernel = Some("b".to_owned())),
            ("another guest agent", |r| r.agent = Some("b".to_owned())),
            ("this one is by", |r| r.cpu.vendor = "other".to_owned()),
        ];
        let mut all = same.clone();
        for (reason, change) in changes.iter().rev() {
            let mut one = same.clone();
            for wanted in [&mut one, &mut all] {
                change(wanted);
                let refused = check_manifest(&manifest, wanted).unwrap_err();
                assert!(refused.contains(reason), "{refused}");
            }
        }
    }
}
