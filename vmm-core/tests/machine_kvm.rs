//! Machines with tiny hand-written kernels on the host's KVM: any `/dev/kvm`, also one that
//! cannot run Linux. `cargo xtask test` runs these in the lab, too.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sm_event_loop::EventLoop;
use sm_hypervisor::Native;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::exit::MachineExit;
use sm_vmm_core::layout::SLOT_RNG;
use sm_vmm_core::machine::{Machine, MachineConfig, MachineError};
use sm_vmm_core::memory::{FileExtent, MachineMemory, MemoryConfig};
use sm_vmm_core::state::MachineState;
use sm_vmm_core::virtio::rng::Rng;
use vm_memory::{Bytes, GuestAddress};

use self::common::kernel;

const MEMORY: u64 = 64 << 20;
/// Address of the counter.
const COUNTER: GuestAddress = GuestAddress(0x20_0000);
/// The counting guest powers off once this is set.
const STOP: GuestAddress = GuestAddress(0x20_0004);

/// `mov dx, PORT; mov al, VALUE; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `cli; hlt` in an endless loop.
const STAY: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfc];

fn power_off() -> Vec<u8> {
    out(0x600, 5 << 2 | 1 << 5)
}

/// Counts at [`COUNTER`] until [`STOP`] is set, then powers off.
fn counting() -> Vec<u8> {
    let mut code = vec![
        0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // inc dword [0x200000]
        0x83, 0x3d, 0x04, 0x00, 0x20, 0x00, 0x00, // cmp dword [0x200004], 0
        0x74, 0xf1, // je start
    ];
    code.extend(power_off());
    code.extend(STAY);
    code
}

struct Rig {
    host: Native,
    event_loop: EventLoop,
    console: File,
}

impl Rig {
    fn new() -> Option<Self> {
        Some(Self {
            host: sm_hypervisor::testing::native()?,
            event_loop: EventLoop::spawn("devices").unwrap(),
            console: tempfile::tempfile().unwrap(),
        })
    }

    fn devices() -> Vec<DeviceConfig> {
        vec![DeviceConfig::new(
            SLOT_RNG,
            Arc::new(Mutex::new(Rng::new())),
        )]
    }

    fn boot(&self, code: &[u8], vcpus: u32) -> Result<Machine<Native>, MachineError> {
        Machine::boot(
            &self.host,
            MachineConfig {
                memory: MemoryConfig::new(MEMORY),
                vcpus,
                kernel: kernel(code),
                initramfs: Vec::new(),
                cmdline: String::new(),
                generation_id: [7; 16],
                console: self.console.try_clone().unwrap(),
                devices: Self::devices(),
            },
            &self.event_loop.handle(),
        )
    }

    fn restore(
        &self,
        state: MachineState,
        memory: MachineMemory,
    ) -> Result<Machine<Native>, MachineError> {
        Machine::restore(
            &self.host,
            state,
            memory,
            Self::devices(),
            self.console.try_clone().unwrap(),
            &self.event_loop.handle(),
        )
    }

    fn console_text(mut self) -> String {
        let mut text = String::new();
        self.console.seek(SeekFrom::Start(0)).unwrap();
        self.console.read_to_string(&mut text).unwrap();
        text
    }
}

fn end(machine: &Machine<Native>) -> MachineExit {
    machine
        .exit_latch()
        .wait_timeout(Duration::from_secs(60))
        .expect("the guest did not end")
}

fn counter(machine: &Machine<Native>) -> u32 {
    machine.memory().guest.read_obj(COUNTER).unwrap()
}

/// Returns all of a paused machine's memory, as a file to restore from.
fn memory_file(machine: &Machine<Native>) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    let mut page = vec![0; 4096];
    for at in (0..MEMORY).step_by(4096) {
        let guest = &machine.memory().guest;
        guest.read_slice(&mut page, GuestAddress(at)).unwrap();
        if page.iter().any(|&byte| byte != 0) {
            file.seek(SeekFrom::Start(at)).unwrap();
            file.write_all(&page).unwrap();
        }
    }
    file.set_len(MEMORY).unwrap();
    Arc::new(file)
}

fn memory_from(file: &Arc<File>) -> MachineMemory {
    let extent = FileExtent {
        offset: 0,
        len: MEMORY,
        file: file.clone(),
        file_offset: 0,
    };
    MachineMemory::from_files(&MemoryConfig::new(MEMORY), &[extent]).unwrap()
}

#[test]
fn console_output_and_power_off() {
    let Some(rig) = Rig::new() else { return };
    let code: Vec<u8> = b"hello\n"
        .iter()
        .flat_map(|&byte| out(0x3f8, byte))
        .chain(power_off())
        .chain(STAY)
        .collect();
    let mut machine = rig.boot(&code, 1).unwrap();
    machine.resume().unwrap();
    assert_eq!(end(&machine), MachineExit::PowerOff);
    assert_eq!(machine.console().tail(1), "hello");
    drop(machine);
    assert_eq!(rig.console_text(), "hello\n");
}

#[test]
fn every_reset_register_resets() {
    let Some(rig) = Rig::new() else { return };
    for (port, value) in [(0x602, 1), (0x64, 0xfe), (0xcf9, 6)] {
        let code: Vec<u8> = out(port, value).into_iter().chain(STAY).collect();
        let mut machine = rig.boot(&code, 1).unwrap();
        machine.resume().unwrap();
        assert_eq!(end(&machine), MachineExit::Reset, "{port:#x}");
    }
}

#[test]
fn a_triple_fault_is_reported_as_such() {
    let Some(rig) = Rig::new() else { return };
    // Loads an empty interrupt table (from zeroed memory), then ud2.
    let code = [0x0f, 0x01, 0x1d, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x0b];
    let mut machine = rig.boot(&code, 1).unwrap();
    machine.resume().unwrap();
    assert_eq!(end(&machine), MachineExit::TripleFault { vcpu: 0 });
}

#[test]
fn a_paused_guest_does_not_run_and_resumes() {
    let Some(rig) = Rig::new() else { return };
    // A second vCPU waits for its start-up signal throughout.
    let mut machine = rig.boot(&counting(), 2).unwrap();
    assert_eq!(counter(&machine), 0, "created paused");
    for _ in 0..3 {
        machine.resume().unwrap();
        assert!(matches!(
            machine.save_state(),
            Err(MachineError::NotPaused { .. })
        ));
        machine.pause().unwrap();
        let paused_at = counter(&machine);
        machine.save_state().unwrap();
        assert_eq!(counter(&machine), paused_at);
    }
    machine.memory().guest.write_obj(1u32, STOP).unwrap();
    machine.resume().unwrap();
    assert_eq!(end(&machine), MachineExit::PowerOff);
}

#[test]
fn stop_ends_a_running_guest() {
    let Some(rig) = Rig::new() else { return };
    let mut machine = rig.boot(&counting(), 1).unwrap();
    machine.resume().unwrap();
    machine.stop().unwrap();
    assert_eq!(end(&machine), MachineExit::Stopped);
    let stopped_at = counter(&machine);
    machine.resume().unwrap();
    machine.pause().unwrap();
    assert_eq!(counter(&machine), stopped_at, "it does not run again");
}

#[test]
fn a_restored_machine_continues_where_it_was_saved() {
    let Some(rig) = Rig::new() else { return };
    let mut machine = rig.boot(&counting(), 2).unwrap();
    machine.resume().unwrap();
    machine.pause().unwrap();
    let state = machine.save_state().unwrap();
    let saved_at = counter(&machine);
    let file = memory_file(&machine);
    drop(machine);

    let sections = state.encode().unwrap();
    let parts = sections.iter();
    let state = MachineState::decode(parts.map(|s| (&*s.name, s.version, &*s.payload))).unwrap();
    for _ in 0..3 {
        let mut clone = rig.restore(state.clone(), memory_from(&file)).unwrap();
        assert_eq!(clone.save_state().unwrap().vcpus.len(), 2);
        assert_eq!(counter(&clone), saved_at);
        clone.set_generation_id([9; 16]).unwrap();

        // In place: all later changes are undone.
        clone.resume().unwrap();
        clone.pause().unwrap();
        clone.memory().guest.write_obj(77u32, COUNTER).unwrap();
        clone.reset_to(&state, None).unwrap();
        assert_eq!(counter(&clone), saved_at);

        clone.memory().guest.write_obj(1u32, STOP).unwrap();
        clone.resume().unwrap();
        assert_eq!(end(&clone), MachineExit::PowerOff);
        assert!(counter(&clone) >= saved_at);
    }
}

#[test]
fn state_that_does_not_fit_is_refused_with_the_reason() {
    let Some(rig) = Rig::new() else { return };
    let mut machine = rig.boot(&counting(), 1).unwrap();
    let state = machine.save_state().unwrap();
    let fresh = || MachineMemory::anonymous(&MemoryConfig::new(MEMORY)).unwrap();

    let newer = MachineState {
        version: state.version + 1,
        ..state.clone()
    };
    let larger = MachineState {
        memory_bytes: MEMORY * 2,
        ..state.clone()
    };
    let other_devices = MachineState {
        devices: Vec::new(),
        ..state.clone()
    };
    let no_vcpus = MachineState {
        vcpus: Vec::new(),
        ..state
    };
    for bad in [newer, larger, other_devices, no_vcpus] {
        assert!(rig.restore(bad, fresh()).is_err());
    }
}

#[test]
fn invalid_machines_are_refused() {
    let Some(rig) = Rig::new() else { return };
    for vcpus in [0, 255, 100_000] {
        assert!(matches!(
            rig.boot(&counting(), vcpus),
            Err(MachineError::Vcpus { .. })
        ));
    }
}
