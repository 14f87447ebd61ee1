//! A machine of this project with the rivals' guest: a kernel and an initramfs that
//! writes to its console repeatedly.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sm_event_loop::EventLoop;
use sm_hypervisor::{Hypervisor as _, Native};
use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::chain::Chain;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::machine;
use sm_snapshot::manifest::Layer;
use sm_snapshot::restore::map_memory;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::{MACHINE_VERSION, SLOT_RNG};
use sm_vmm_core::loader::{BASE_COMMAND_LINE, InitramfsPart};
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::MemoryConfig;
use sm_vmm_core::state::MachineState;
use sm_vmm_core::virtio::rng::Rng;

use crate::rivals::{BenchGuest, Contender, await_output};
use crate::vmm::check_host;

pub(crate) const NAME: &str = "snapshot";

/// Creates the snapshot of a machine whose user space has written to its console.
pub(crate) fn create(store: &Path, guest: &BenchGuest) -> Result<()> {
    let store = SnapshotStore::open(store)?;
    let event_loop = EventLoop::spawn("devices")?;
    let (mut output, console) = std::io::pipe()?;
    let host = Native::open()?;
    let mut machine = Machine::boot(
        &host,
        MachineConfig {
            memory: MemoryConfig::new(guest.memory),
            vcpus: 1,
            kernel: File::open(&guest.kernel)?,
            initramfs: vec![InitramfsPart::File(guest.initramfs.clone())],
            cmdline: format!("{BASE_COMMAND_LINE} {}", guest.cmdline),
            generation_id: [7; 16],
            console: File::from(OwnedFd::from(console)),
            devices: devices(),
        },
        &event_loop.handle(),
    )?;
    machine.resume()?;
    await_output(&mut output, guest.sign)?;
    // Output until the pause is read, so that the console does not block.
    let reader = std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    machine.pause()?;
    let state = machine.save_state()?;
    let sections = machine::encode(&state)?;
    let capture = Capture::begin(&store, machine.memory(), Ancestry::Booted)?;
    drop(machine);
    drop(event_loop);
    let _ = reader.join();
    capture.finish(&store, NAME, description(&host, &state)?, sections)?;
    Ok(())
}

/// Returns the description in snapshots of this guest.
pub(crate) fn description(host: &Native, state: &MachineState) -> Result<Description> {
    Ok(Description {
        layer: Layer::Base,
        sm_version: env!("CARGO_PKG_VERSION").to_owned(),
        machine_version: MACHINE_VERSION,
        vcpus: 1,
        kernel: "bench".to_owned(),
        agent: "none".to_owned(),
        cpu: CpuFeatures::of(&host.guest_features()?.cpuid),
        protocol: 1,
        devices: machine::devices(state),
        labels: BTreeMap::new(),
    })
}

/// Restores the snapshot until its guest writes, and records the working set.
pub(crate) fn record_working_set(store: &Path, guest: &BenchGuest) -> Result<()> {
    let store = SnapshotStore::open(store)?;
    let (mut output, console) = std::io::pipe()?;
    let restored = Restored::new(&store, OwnedFd::from(console).into())?;
    await_output(&mut output, guest.sign)?;
    let set = WorkingSet::record(restored.machine.memory())?;
    set.save(&store, &restored.chain.tip().lease)?;
    Ok(())
}

/// Restores the snapshot in this process, with its console at standard output, until
/// killed.
pub(crate) fn serve(store: &Path) -> Result<()> {
    let console = std::io::stdout().as_fd().try_clone_to_owned()?;
    let restored = Restored::new(&SnapshotStore::read_only(store), console.into())?;
    let exit = restored.machine.exit_latch().wait();
    bail!("the guest ended: {exit:?}")
}

/// A running clone.
struct Restored {
    machine: Machine<Native>,
    chain: Chain,
    _event_loop: EventLoop,
}

impl Restored {
    fn new(store: &SnapshotStore, console: File) -> Result<Self> {
        let host = Native::open()?;
        host.prepare_vm();
        let event_loop = EventLoop::spawn("devices")?;
        let chain = Chain::open(store, NAME)?;
        check_host(&host, &chain)?;
        let memory = map_memory(&chain)?;
        if let Some(set) = WorkingSet::load(chain.tip().lease.dir()) {
            let memory = memory.clone();
            std::thread::spawn(move || set.prefetch(&memory));
        }
        let mut machine = Machine::restore(
            &host,
            machine::decode(&chain)?,
            memory,
            devices(),
            console,
            &event_loop.handle(),
        )?;
        machine.resume()?;
        Ok(Self {
            machine,
            chain,
            _event_loop: event_loop,
        })
    }
}

pub(crate) fn devices() -> Vec<DeviceConfig> {
    vec![DeviceConfig::new(
        SLOT_RNG,
        Arc::new(Mutex::new(Rng::new())),
    )]
}

/// This program as a contender: the layers of `sm` without its agent.
#[derive(Debug, Default)]
pub(crate) struct Ours {
    store: Option<tempfile::TempDir>,
}

impl Contender for Ours {
    fn name(&self) -> &'static str {
        "sm"
    }

    fn prepare(&mut self, guest: &BenchGuest) -> Result<()> {
        let store = tempfile::tempdir()?;
        create(store.path(), guest)?;
        record_working_set(store.path(), guest)?;
        self.store = Some(store);
        Ok(())
    }

    fn restore(&self, guest: &BenchGuest) -> Result<Duration> {
        let store = self.store.as_ref().context("not prepared")?;
        let started = Instant::now();
        let mut child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .arg(store.path())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdout = child.stdout.take().context("no output")?;
        let output = await_output(&mut stdout, guest.sign);
        let took = started.elapsed();
        child.kill()?;
        let _ = stdout.read_to_end(&mut Vec::new());
        child.wait()?;
        output.map(|()| took)
    }
}
