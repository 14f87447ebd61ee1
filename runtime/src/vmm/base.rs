//! Base snapshots: kernel and agent, booted once, restored for every image.
//!
//! The first VM of its kind (kernel, agent, memory size, number of vCPUs) boots
//! with an empty root disk; as soon as its agent is ready, the machine is
//! captured, and only then gets its image. Later VMs start from the copy. What
//! makes a kind is in the snapshot's name, so another kernel or agent is
//! another snapshot, never a wrong one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread::JoinHandle;

use sha2::{Digest as _, Sha256};
use sm_guest_proto::PROTOCOL_VERSION;
use sm_hypervisor::kvm::Kvm;
use sm_snapshot::Error;
use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::chain::Chain;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::manifest::{DeviceEntry, Layer};
use sm_snapshot::restore::{self, Requirements};
use sm_snapshot::state_file::Section;
use sm_snapshot::store::SnapshotStore;
use sm_vmm_core::layout::{MACHINE_VERSION, SLOT_RNG, SLOT_ROOT_DISK, SLOT_VSOCK};
use sm_vmm_core::machine::Machine;
use sm_vmm_core::state::MachineState;

use crate::doctor::with_causes;
use crate::launch::LaunchRequest;

/// Name and layout version of the section with the machine's state.
const MACHINE_SECTION: (&str, u32) = ("machine", 1);

/// The base snapshot that a request could start from.
pub(crate) struct Base {
    store: SnapshotStore,
    name: String,
    kernel: String,
    agent: String,
    vcpus: u32,
}

/// SHA-256 in hexadecimal.
fn digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .fold(String::new(), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Tells kernels apart without reading them: the file's identity, size and age.
fn kernel_identity(path: &Path) -> std::io::Result<String> {
    let meta = path.metadata()?;
    let text = format!(
        "{}:{}:{}:{}:{}",
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    Ok(digest(&[text.as_bytes()]))
}

impl Base {
    /// The base snapshot for `request`; `initramfs` holds agent and modules.
    ///
    /// # Errors
    /// The kernel cannot be examined, or the store not be opened; a clause.
    pub(crate) fn of(request: &LaunchRequest, initramfs: &[u8]) -> Result<Self, String> {
        let root = request.data.join("snapshots");
        let store = SnapshotStore::open(&root).map_err(|error| with_causes(&error))?;
        let kernel = kernel_identity(&request.config.kernel)
            .map_err(|error| format!("cannot examine the kernel: {error}"))?;
        let agent = digest(&[initramfs]);
        let kind = digest(&[
            kernel.as_bytes(),
            agent.as_bytes(),
            request.cmdline.as_bytes(),
        ]);
        let vcpus = request.config.cpus;
        let mib = request.config.memory >> 20;
        let name = format!("base-{mib}m-{vcpus}c-{}", kind.get(..16).unwrap_or(&kind));
        Ok(Self {
            store,
            name,
            kernel,
            agent,
            vcpus,
        })
    }

    /// Opens the snapshot with its machine's state; `None` when there is none
    /// that can be used here. One that cannot is removed, so that the next boot
    /// makes a new one.
    pub(crate) fn open(&self) -> Option<(Chain, MachineState)> {
        match self.try_open() {
            Ok(opened) => Some(opened),
            Err(Error::NotFound { .. }) => None,
            Err(error) => {
                tracing::warn!(
                    error = with_causes(&error),
                    "a base snapshot cannot be used"
                );
                let _ = self.store.remove(&self.name);
                None
            }
        }
    }

    fn try_open(&self) -> Result<(Chain, MachineState), Error> {
        let chain = Chain::open(&self.store, &self.name)?;
        restore::check(
            &chain,
            &Requirements {
                machine_version: MACHINE_VERSION,
                protocol: PROTOCOL_VERSION,
                kernel: Some(self.kernel.clone()),
                agent: Some(self.agent.clone()),
                cpu: CpuFeatures::host(),
            },
        )?;
        let tip = chain.tip();
        let path = tip.lease.dir().join("state.bin");
        let (name, version) = MACHINE_SECTION;
        let bytes = tip.state.section(&path, name, version)?;
        let state = postcard::from_bytes(bytes).map_err(|error| Error::Damaged {
            path: path.clone(),
            reason: format!("its machine state cannot be read: {error}"),
        })?;
        Ok((chain, state))
    }

    /// Captures a running machine whose agent is ready. Copying its memory
    /// happens in a pause; the rest on a thread, which publishes the snapshot.
    ///
    /// # Errors
    /// The machine cannot be paused, saved or resumed; a clause.
    pub(crate) fn capture(self, machine: &mut Machine<Kvm>) -> Result<JoinHandle<()>, String> {
        machine.pause().map_err(|error| with_causes(&error))?;
        let state = machine.save_state().map_err(|error| with_causes(&error));
        let capture = Capture::begin(&self.store, &machine.memory().guest, Ancestry::Booted)
            .map_err(|error| with_causes(&error));
        machine.resume().map_err(|error| with_causes(&error))?;
        let (state, capture) = (state?, capture?);
        let payload =
            postcard::to_stdvec(&state).map_err(|error| format!("cannot encode: {error}"))?;
        std::thread::Builder::new()
            .name("sm-snapshot".to_owned())
            .spawn(move || self.finish(capture, payload))
            .map_err(|error| format!("cannot start a thread: {error}"))
    }

    fn finish(self, capture: Capture, machine: Vec<u8>) {
        let device = |slot, kind: &str| DeviceEntry {
            slot,
            kind: kind.to_owned(),
        };
        let description = Description {
            layer: Layer::Base,
            sm_version: env!("CARGO_PKG_VERSION").to_owned(),
            machine_version: MACHINE_VERSION,
            vcpus: self.vcpus,
            kernel: self.kernel,
            agent: self.agent,
            protocol: PROTOCOL_VERSION,
            devices: vec![
                device(SLOT_VSOCK, "vsock"),
                device(SLOT_RNG, "rng"),
                device(SLOT_ROOT_DISK, "blk"),
            ],
            labels: BTreeMap::new(),
        };
        let sections = vec![Section {
            name: MACHINE_SECTION.0.to_owned(),
            version: MACHINE_SECTION.1,
            payload: machine,
        }];
        match capture.finish(&self.store, &self.name, description, sections) {
            Ok(manifest) => tracing::info!(
                name = self.name,
                pages = manifest.memory.data_pages,
                "a base snapshot was made"
            ),
            // Another VM made the same one meanwhile: as good.
            Err(Error::Exists { .. }) => {}
            Err(error) => {
                tracing::warn!(error = with_causes(&error), "no base snapshot was made");
            }
        }
    }
}
