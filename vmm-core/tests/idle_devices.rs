//! The time that idle devices add to a restore, on this host's KVM.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sm_devices_net::{Net, NetConfig};
use sm_event_loop::EventLoop;
use sm_hypervisor::Native;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::{SLOT_BALLOON, SLOT_NET, SLOT_RNG};
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::{MIN_MEMORY, MachineMemory, MemoryConfig};
use sm_vmm_core::state::MachineState;
use sm_vmm_core::virtio::balloon::Balloon;
use sm_vmm_core::virtio::rng::Rng;

use self::common::kernel;

const ROUNDS: usize = 201;

fn devices(all: bool) -> Vec<DeviceConfig> {
    let mut devices = vec![DeviceConfig::new(
        SLOT_RNG,
        Arc::new(Mutex::new(Rng::new())),
    )];
    if all {
        devices.push(DeviceConfig::new(
            SLOT_NET,
            Arc::new(Mutex::new(Net::new(NetConfig::new([2, 0, 0, 0, 0, 1])))),
        ));
        devices.push(DeviceConfig::new(
            SLOT_BALLOON,
            Arc::new(Mutex::new(Balloon::new())),
        ));
    }
    devices
}

struct Rig {
    host: Native,
    event_loop: EventLoop,
}

impl Rig {
    fn state(&self, all: bool) -> MachineState {
        let config = MachineConfig {
            memory: MemoryConfig::new(MIN_MEMORY),
            vcpus: 1,
            kernel: kernel(&[0xfa, 0xf4, 0xeb, 0xfc]),
            initramfs: Vec::new(),
            cmdline: String::new(),
            generation_id: [7; 16],
            console: tempfile::tempfile().unwrap(),
            devices: devices(all),
        };
        let mut machine = Machine::boot(&self.host, config, &self.event_loop.handle()).unwrap();
        machine.save_state().unwrap()
    }

    /// Returns the time of a restore, from its devices to vCPUs that run.
    fn restore(&self, state: &MachineState, all: bool) -> Duration {
        let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
        let console = tempfile::tempfile().unwrap();
        let begun = Instant::now();
        let mut machine = Machine::restore(
            &self.host,
            state.clone(),
            memory,
            devices(all),
            console,
            &self.event_loop.handle(),
        )
        .unwrap();
        machine.resume().unwrap();
        begun.elapsed()
    }
}

#[test]
#[ignore = "a measurement, whose result is in docs/src/benchmarks.md"]
fn a_restore_with_a_network_device_and_a_balloon() {
    let rig = Rig {
        host: sm_hypervisor::testing::native().unwrap(),
        event_loop: EventLoop::spawn("devices").unwrap(),
    };
    let states = [false, true].map(|all| (all, rig.state(all), Vec::new()));
    let mut states = states;
    for _ in 0..ROUNDS {
        for (all, state, times) in &mut states {
            times.push(rig.restore(state, *all));
        }
    }
    for (all, _, times) in &mut states {
        times.sort_unstable();
        let [least, tenth, half] = [0, ROUNDS / 10, ROUNDS / 2].map(|at| times[at]);
        println!("with both: {all}; least {least:?}, tenth {tenth:?}, median {half:?}");
    }
}
