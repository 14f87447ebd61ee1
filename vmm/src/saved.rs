//! Machines in snapshots: the sections besides memory, and opening them again.
//!
//! `state.bin` has the sections of a machine ([`sm_vmm_core::state`]), one for each CPU and
//! device, and one of this crate: `vm`, the VMM's description of the VM.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sm_control::config::StoredConfigV1;
use sm_control::launch::DiskSegment;
use sm_control::with_causes;
use sm_guest_proto::PROTOCOL_VERSION;
use sm_hypervisor::{Hypervisor as _, Native};
use sm_snapshot::Error;
use sm_snapshot::capture::{Capture, Captured, Description};
use sm_snapshot::chain::Chain;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::machine;
use sm_snapshot::manifest::{FORMAT, Layer};
use sm_snapshot::restore::{self, Requirements};
use sm_snapshot::state_file::Section;
use sm_snapshot::store::SnapshotStore;
use sm_vmm_core::layout::MACHINE_VERSION;
use sm_vmm_core::state::{MachineState, SECTION_VERSIONS};
use sm_vmm_core::virtio::layered::MAX_LAYERS;
use sm_vmm_core::virtio::{balloon, blk, rng};

use super::disks::VerifiedDisks;
use super::environment::Identity;

mod shares;

pub use self::shares::{SavedShare, ShareMismatch, arrange};

/// Name and layout version of the section with [`Content`], which is JSON: members may be
/// added, with defaults, under the same number.
const VM_SECTION: (&str, u32) = ("vm", 1);

/// Returns the version numbers that decide which snapshots this program reads, in a fixed
/// order.
pub(crate) fn versions() -> Vec<u32> {
    let formats = [FORMAT, MACHINE_VERSION, PROTOCOL_VERSION, VM_SECTION.1];
    let devices = [
        sm_devices_vsock::STATE_VERSION,
        sm_devices_fs::STATE_VERSION,
        sm_devices_net::STATE_VERSION,
        balloon::STATE_VERSION,
        rng::STATE_VERSION,
        blk::STATE_VERSION,
    ];
    let backend = Native::STATE_VERSIONS;
    [&formats[..], &SECTION_VERSIONS, &devices, backend].concat()
}

/// The VMM's description of a machine, besides its state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Content {
    /// The path of its kernel.
    pub kernel: PathBuf,
    /// The root disk; empty in a base snapshot.
    pub root: Vec<DiskSegment>,
    /// The configuration of the VM with the workload; only in workload snapshots.
    pub config: Option<StoredConfigV1>,
    /// The writable disks.
    pub disks: Vec<SavedDisk>,
    /// The directories and files of the host that the guest has mounted, in the order of their
    /// numbers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<SavedShare>,
}

/// A writable disk in a snapshot: its layers are the files `disk-SLOT.0` (the lowest one),
/// `disk-SLOT.1` and so on, none of which is written to any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDisk {
    /// The slot of its device.
    pub slot: u32,
    /// The number of layers.
    pub layers: usize,
}

impl SavedDisk {
    /// Returns the name of the file of a layer.
    pub(crate) fn file_name(slot: u32, number: usize) -> String {
        format!("disk-{slot}.{number}")
    }

    /// Returns its files in the directory of the snapshot, the lowest layer first.
    fn files(&self, dir: &Path) -> Vec<PathBuf> {
        let layers = 0..self.layers.min(MAX_LAYERS);
        layers
            .map(|number| dir.join(Self::file_name(self.slot, number)))
            .collect()
    }
}

/// A machine in a snapshot, opened for use.
pub(crate) struct Saved {
    pub(crate) chain: Chain,
    pub(crate) state: MachineState,
    pub(crate) content: Content,
}

impl Saved {
    /// Returns the files of the layers of the disk in `slot`, the lowest one first; `None`
    /// if the snapshot has no such disk.
    pub(crate) fn disk(&self, slot: u32) -> Option<Vec<PathBuf>> {
        let disk = self.content.disks.iter().find(|disk| disk.slot == slot)?;
        Some(disk.files(self.chain.tip().lease.dir()))
    }

    /// Opens a snapshot and checks that this host and program can run it. `cpu` is the
    /// CPU that the host offers to guests, `identity` the required guest software, if
    /// any.
    ///
    /// # Errors
    /// The snapshot does not exist, is damaged, or is incompatible.
    pub(crate) fn open(
        store: &SnapshotStore,
        name: &str,
        cpu: &CpuFeatures,
        identity: Option<&Identity>,
    ) -> Result<Self, Error> {
        let chain = Chain::open(store, name)?;
        restore::check(
            &chain,
            &Requirements {
                machine_version: MACHINE_VERSION,
                protocol: PROTOCOL_VERSION,
                kernel: identity.map(|identity| identity.kernel.clone()),
                agent: identity.map(|identity| identity.agent.clone()),
                cpu: cpu.clone(),
                page_bytes: restore::host_page_bytes(),
            },
        )?;
        let state = machine::decode(&chain)?;
        for vcpu in &state.vcpus {
            restore::check_vcpu(&chain, &vcpu.cpuid, cpu)?;
        }
        let content = content(&chain)?;
        Ok(Self {
            chain,
            state,
            content,
        })
    }
}

/// Reads the description of the VM at the tip of a chain.
///
/// # Errors
/// The section is missing or damaged.
pub fn content(chain: &Chain) -> Result<Content, Error> {
    let tip = chain.tip();
    let path = tip.lease.dir().join("state.bin");
    let (name, version) = VM_SECTION;
    let (_, payload) = tip.state.section(&path, name, version..=version)?;
    serde_json::from_slice(payload).map_err(|error| Error::Damaged {
        reason: format!("its description of the VM cannot be read: {error}"),
        path,
    })
}

/// Verifies the disks of the snapshot at the tip of a chain. The contents of layers have no
/// digests: what is found is a file that is missing, cut, unreadable, or of another disk.
///
/// # Errors
/// The first problem.
pub fn verify_disks(chain: &Chain) -> Result<VerifiedDisks, Error> {
    let dir = chain.tip().lease.dir();
    let mut verified = VerifiedDisks::default();
    for disk in content(chain)?.disks {
        let files = disk.files(dir);
        verified.add(&files).map_err(|error| Error::Damaged {
            reason: with_causes(&error),
            path: dir.to_owned(),
        })?;
    }
    Ok(verified)
}

/// A snapshot to be created.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) store: SnapshotStore,
    pub(crate) name: String,
    pub(crate) layer: Layer,
    pub(crate) identity: Identity,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) content: Content,
}

impl Plan {
    /// Writes and publishes a capture.
    ///
    /// # Errors
    /// A file cannot be written, or the name is taken; a clause.
    pub(crate) fn finish(
        self,
        capture: Capture,
        state: &MachineState,
        vcpus: usize,
    ) -> Result<Captured, String> {
        let description = Description {
            layer: self.layer,
            sm_version: env!("CARGO_PKG_VERSION").to_owned(),
            machine_version: MACHINE_VERSION,
            vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
            kernel: self.identity.kernel,
            agent: self.identity.agent,
            // All vCPUs have the same CPUID.
            cpu: CpuFeatures::of(state.vcpus.first().map_or(&[], |vcpu| &vcpu.cpuid)),
            protocol: PROTOCOL_VERSION,
            devices: machine::devices(state),
            labels: self.labels,
        };
        let unencodable = |error: &dyn std::error::Error| {
            format!("cannot encode its state: {}", with_causes(error))
        };
        let mut sections = machine::encode(state).map_err(|error| unencodable(&error))?;
        let (name, version) = VM_SECTION;
        sections.push(Section {
            name: name.to_owned(),
            version,
            payload: serde_json::to_vec(&self.content).map_err(|error| unencodable(&error))?,
        });
        capture
            .finish(&self.store, &self.name, description, sections)
            .map_err(|error| with_causes(&error))
    }
}

#[cfg(test)]
mod tests;
