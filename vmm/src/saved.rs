//! Machines in snapshots: the sections besides memory, and opening them again.
//!
//! `state.bin` has two sections of this crate: `machine`, the state of CPUs and devices,
//! and `vm`, the VMM's description of the VM.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sm_control::config::SnapshotConfigV1;
use sm_control::launch::DiskSegment;
use sm_control::with_causes;
use sm_guest_proto::PROTOCOL_VERSION;
use sm_snapshot::Error;
use sm_snapshot::capture::{Capture, Captured, Description};
use sm_snapshot::chain::Chain;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::manifest::{DeviceEntry, FORMAT, Layer};
use sm_snapshot::restore::{self, Requirements};
use sm_snapshot::state_file::Section;
use sm_snapshot::store::SnapshotStore;
use sm_vmm_core::layout::{MACHINE_VERSION, SLOT_RNG, SLOT_ROOT_DISK, SLOT_VSOCK};
use sm_vmm_core::state::MachineState;

use super::environment::Identity;

/// Name and layout version of the section with the machine's state. The layout is that of
/// [`MachineState`]: a change of that type, or of anything in it, must raise this number
/// (a test that reads a snapshot with this number fails otherwise).
const MACHINE_SECTION: (&str, u32) = ("machine", 1);
/// Name and layout version of the section with [`Content`], which is JSON: members may be
/// added, with defaults, under the same number.
const VM_SECTION: (&str, u32) = ("vm", 1);

/// Returns the version numbers that decide which snapshots this program reads.
pub(crate) fn versions() -> [u32; 5] {
    [
        FORMAT,
        MACHINE_VERSION,
        PROTOCOL_VERSION,
        MACHINE_SECTION.1,
        VM_SECTION.1,
    ]
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
    pub config: Option<SnapshotConfigV1>,
}

/// A machine in a snapshot, opened for use.
pub(crate) struct Saved {
    pub(crate) chain: Chain,
    pub(crate) state: MachineState,
    pub(crate) content: Content,
}

impl Saved {
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
            },
        )?;
        let state = machine_state(&chain)?;
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

/// Reads the state of CPUs and devices at the tip of a chain.
///
/// # Errors
/// The section is missing or damaged.
pub(crate) fn machine_state(chain: &Chain) -> Result<MachineState, Error> {
    let tip = chain.tip();
    let path = tip.lease.dir().join("state.bin");
    let (name, version) = MACHINE_SECTION;
    let (_, payload) = tip.state.section(&path, name, version..=version)?;
    postcard::from_bytes(payload).map_err(|error| Error::Damaged {
        reason: format!("its machine state cannot be read: {error}"),
        path,
    })
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
        let device = |slot, kind: &str| DeviceEntry {
            slot,
            kind: kind.to_owned(),
        };
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
            devices: vec![
                device(SLOT_VSOCK, "vsock"),
                device(SLOT_RNG, "rng"),
                device(SLOT_ROOT_DISK, "blk"),
            ],
            labels: self.labels,
        };
        let encode = |error: &dyn std::error::Error| format!("cannot encode its state: {error}");
        let section = |(name, version): (&str, u32), payload| Section {
            name: name.to_owned(),
            version,
            payload,
        };
        let sections = vec![
            section(
                MACHINE_SECTION,
                postcard::to_stdvec(state).map_err(|error| encode(&error))?,
            ),
            section(
                VM_SECTION,
                serde_json::to_vec(&self.content).map_err(|error| encode(&error))?,
            ),
        ];
        capture
            .finish(&self.store, &self.name, description, sections)
            .map_err(|error| with_causes(&error))
    }
}

#[cfg(test)]
mod tests;
