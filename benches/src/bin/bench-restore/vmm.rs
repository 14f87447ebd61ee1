//! Restoring the tiny guest in this process, compared with the floor.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sm_benches::samples::{BenchReport, Comparison, Series};
use sm_event_loop::EventLoop;
use sm_hypervisor::{Hypervisor as _, Native};
use sm_snapshot::capture::{Ancestry, Capture, Description};
use sm_snapshot::chain::Chain;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::machine;
use sm_snapshot::manifest::Layer;
use sm_snapshot::restore::{Requirements, check, host_page_bytes, map_memory};
use sm_snapshot::store::SnapshotStore;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::MACHINE_VERSION;
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::MemoryConfig;
use vm_memory::Bytes as _;

use crate::config_probe::ConfigReadProbe;
use crate::floor::Floor;
use crate::{BenchOptions, tiny};

const NAME: &str = "tiny";
/// Time limit for the guest to power off.
const GUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The first phase of creating the machine: before it, files are read, and capabilities
/// of the host are checked.
pub(crate) const MAP_MEMORY: &str = "map memory";
/// Delay after which the kernel has released a dropped VM; before, the next one may wait
/// for it.
const SETTLED: Duration = Duration::from_millis(20);
/// Iterations that are not counted.
const WARM_UP: usize = 3;

pub(crate) fn measure(options: &BenchOptions) -> Result<BenchReport> {
    let iterations = options.iterations();
    let mut comparisons = vec![process_starts(iterations)?];
    comparisons.extend(restores(options)?);
    Ok(BenchReport {
        notes: vec![format!(
            "A tiny guest, restored in one process {iterations} times, alternating with the floor: \
             the same KVM calls without a VMM, on one thread."
        )],
        comparisons,
    })
}

fn restores(options: &BenchOptions) -> Result<Vec<Comparison>> {
    let iterations = options.iterations();
    let mut comparisons = Vec::new();
    for &vcpus in &options.vcpus() {
        for &mib in &options.sizes() {
            for cold in [false, true] {
                let snapshot = TinySnapshot::new(mib << 20, vcpus)?;
                let floor = Floor::new(mib << 20, vcpus)?;
                let mut ours = Series::new("sm");
                let mut theirs = Series::new("floor");
                for iteration in 0..WARM_UP + iterations {
                    if cold {
                        snapshot.evict()?;
                        floor.evict()?;
                    }
                    std::thread::sleep(SETTLED);
                    let a = snapshot.restore()?;
                    std::thread::sleep(SETTLED);
                    let b = floor.restore()?;
                    if iteration >= WARM_UP {
                        ours.add(&a);
                        theirs.add(&b);
                    }
                }
                comparisons.push(Comparison {
                    title: format!("VMM only, {vcpus} vCPU, {mib} MiB, {}", cache(cold)),
                    series: vec![ours, theirs],
                    since: Some(MAP_MEMORY.to_owned()),
                });
            }
        }
    }
    Ok(comparisons)
}

/// Returns the state of the page cache, for a title.
pub(crate) fn cache(cold: bool) -> &'static str {
    if cold {
        "cold page cache"
    } else {
        "warm page cache"
    }
}

/// Measures the start of this program, up to its `main`.
fn process_starts(iterations: usize) -> Result<Comparison> {
    let mut series = Series::new("sm");
    for iteration in 0..WARM_UP + iterations {
        let begun = monotonic();
        let output = Command::new(std::env::current_exe()?)
            .arg("start")
            .stdin(Stdio::null())
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let reached: u64 = text.trim().parse().context("the child said nothing")?;
        if iteration >= WARM_UP {
            let took = Duration::from_nanos(reached).saturating_sub(begun);
            series.add(&[("process start", took)]);
        }
    }
    Ok(Comparison {
        title: "Starting a process of this program's size, up to main".to_owned(),
        series: vec![series],
        since: None,
    })
}

/// Returns the time of the monotonic clock, which is common to all processes of a host.
pub(crate) fn monotonic() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::try_from(time).unwrap_or_default()
}

/// A snapshot of the tiny guest.
struct TinySnapshot {
    _directory: tempfile::TempDir,
    store: SnapshotStore,
    console: File,
}

/// A stopwatch with laps.
pub(crate) struct LapTimer(Instant);

impl LapTimer {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn lap(&mut self) -> Duration {
        self.lap_at(Instant::now())
    }

    /// Returns the lap that ended at `now`.
    fn lap_at(&mut self, now: Instant) -> Duration {
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}

/// Returns the machine's only device, and the time at which the guest reads from it.
fn devices() -> (Vec<DeviceConfig>, Arc<OnceLock<Instant>>) {
    let config_probe = ConfigReadProbe::default();
    let first_read = config_probe.first_read();
    let device = DeviceConfig::new(tiny::DEVICE_SLOT, Arc::new(Mutex::new(config_probe)));
    (vec![device], first_read)
}

/// Checks that this host can restore the snapshot, as every restore does.
pub(crate) fn check_host(host: &Native, chain: &Chain) -> Result<()> {
    let requirements = Requirements {
        machine_version: MACHINE_VERSION,
        protocol: 1,
        kernel: None,
        agent: None,
        cpu: CpuFeatures::of(&host.guest_features()?.cpuid),
        page_bytes: host_page_bytes(),
    };
    Ok(check(chain, &requirements)?)
}

impl TinySnapshot {
    fn new(memory: u64, vcpus: u32) -> Result<Self> {
        let directory = tempfile::tempdir_in(".").context("cannot make a directory here")?;
        let store = SnapshotStore::open(&directory.path().join("store"))?;
        let host = Native::open()?;
        let event_loop = EventLoop::spawn("devices")?;
        let console = tempfile::tempfile()?;
        let mut machine = Machine::boot(
            &host,
            MachineConfig {
                memory: MemoryConfig::new(memory),
                vcpus,
                kernel: tiny::kernel()?,
                initramfs: Vec::new(),
                cmdline: String::new(),
                generation_id: [7; 16],
                console: console.try_clone()?,
                devices: devices().0,
            },
            &event_loop.handle(),
        )?;
        machine.resume()?;
        machine.pause()?;
        // The snapshot contains the flag that lets the guest end.
        machine.memory().guest.write_obj(1u32, tiny::STOP)?;
        let state = machine.save_state()?;
        let sections = machine::encode(&state)?;
        let capture = Capture::begin(&store, machine.memory(), Ancestry::Booted)?;
        let description = Description {
            layer: Layer::Base,
            sm_version: env!("CARGO_PKG_VERSION").to_owned(),
            machine_version: MACHINE_VERSION,
            vcpus,
            kernel: "tiny".to_owned(),
            agent: "none".to_owned(),
            cpu: CpuFeatures::of(&host.guest_features()?.cpuid),
            protocol: 1,
            devices: machine::devices(&state),
            labels: BTreeMap::new(),
        };
        capture.finish(&store, NAME, description, sections)?;
        Ok(Self {
            _directory: directory,
            store,
            console,
        })
    }

    fn evict(&self) -> Result<()> {
        let lease = self.store.lease(NAME)?;
        for name in ["memory.bin", "state.bin", "manifest.json"] {
            evict(&lease.dir().join(name))?;
        }
        Ok(())
    }

    /// Executes the steps of a VMM process from its start to the guest's first access.
    fn restore(&self) -> Result<Vec<(&'static str, Duration)>> {
        let mut watch = LapTimer::start();
        let host = Native::open()?;
        let event_loop = EventLoop::spawn("devices")?;
        let opened = watch.lap();
        let chain = Chain::open(&self.store, NAME)?;
        check_host(&host, &chain)?;
        let state = machine::decode(&chain)?;
        let snapshot = watch.lap();
        let memory = map_memory(&chain)?;
        let mapped = watch.lap();
        let (devices, first_read) = devices();
        let mut machine = Machine::restore(
            &host,
            state,
            memory,
            devices,
            self.console.try_clone()?,
            &event_loop.handle(),
        )?;
        let created = watch.lap();
        let inner = machine.phases();
        machine.resume()?;
        let exit = machine.exit_latch();
        if exit.wait_timeout(GUEST_TIMEOUT).is_none() {
            bail!("the tiny guest did not power off");
        }
        let first_read = first_read.get().context("the tiny guest saw no device")?;
        let ran = watch.lap_at(*first_read);
        let map = mapped + inner.memory_map;
        Ok(vec![
            ("open KVM", opened),
            ("open snapshot", snapshot),
            (MAP_MEMORY, map),
            ("KVM objects", inner.hypervisor_objects),
            ("devices", inner.devices),
            // The remainder: vCPUs, their threads, all state.
            (
                "load state",
                created.saturating_sub(inner.memory_map + inner.hypervisor_objects + inner.devices),
            ),
            ("resume to first exit", ran),
        ])
    }
}

/// Drops a file's pages from the page cache, except mapped ones.
pub(crate) fn evict(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    // Dirty pages would stay.
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiny_guest_is_restored_and_so_is_the_floor() {
        if sm_hypervisor::testing::native().is_none() {
            return;
        }
        let options = BenchOptions {
            iterations: Some(2),
            memory_mib: vec![64, 4096],
            vcpus: vec![2],
            ..BenchOptions::default()
        };
        // This program is not the benchmark, so the process start cannot be measured.
        let report = BenchReport {
            comparisons: restores(&options).unwrap(),
            notes: Vec::new(),
        };
        assert_eq!(report.comparisons.len(), 4);
        for comparison in &report.comparisons {
            assert!(comparison.ratio("floor").is_some_and(|ratio| ratio > 0.0));
            let sm = &comparison.series[0];
            assert_eq!(sm.phases.len(), 7);
            assert!(sm.phases.iter().all(|phase| phase.micros.len() == 2));
        }
    }
}
