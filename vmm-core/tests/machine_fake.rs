//! The life of a machine on a scripted hypervisor: the machine's calls of any backend,
//! their order, and its reaction to their results. Needs no host support.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sm_event_loop::EventLoop;
use sm_hypervisor::fake::{FakeEvent, FakeHypervisor, Step};
use sm_hypervisor::{Exit, FaultInfo};
use sm_vmm_core::devices::{DeviceConfig, DeviceError};
use sm_vmm_core::exit::MachineExit;
use sm_vmm_core::layout::{GED_GSI, SLOT_RNG, virtio_window};
use sm_vmm_core::machine::{Machine, MachineConfig, MachineError};
use sm_vmm_core::memory::{MachineMemory, MemoryConfig};
use sm_vmm_core::state::{MachineState, StateSection};
use sm_vmm_core::virtio::rng::Rng;

use self::common::{ENTRY, kernel};

const MEMORY: u64 = 64 << 20;
const POWER_OFF: Step = Step::Exit(Exit::Shutdown);

struct Rig {
    host: FakeHypervisor,
    event_loop: EventLoop,
    console: File,
}

fn decoded(sections: &[StateSection]) -> MachineState {
    let parts = sections.iter();
    MachineState::decode(parts.map(|s| (&*s.name, s.version, &*s.payload))).unwrap()
}

fn print(text: &str) -> impl Iterator<Item = Step> {
    text.bytes().map(|byte| Step::PioWrite(0x3f8, vec![byte]))
}

impl Rig {
    fn new(scripts: Vec<Vec<Step>>) -> Self {
        Self {
            host: FakeHypervisor::new(scripts),
            event_loop: EventLoop::spawn("devices").unwrap(),
            console: tempfile::tempfile().unwrap(),
        }
    }

    fn devices() -> Vec<DeviceConfig> {
        vec![DeviceConfig::new(
            SLOT_RNG,
            Arc::new(Mutex::new(Rng::new())),
        )]
    }

    fn config(&self, vcpus: u32) -> MachineConfig {
        MachineConfig {
            memory: MemoryConfig::new(MEMORY),
            vcpus,
            kernel: kernel(&[0xf4]),
            initramfs: Vec::new(),
            cmdline: String::new(),
            generation_id: [7; 16],
            console: self.console.try_clone().unwrap(),
            devices: Self::devices(),
        }
    }

    fn boot(&self, vcpus: u32) -> Machine<FakeHypervisor> {
        Machine::boot(&self.host, self.config(vcpus), &self.event_loop.handle()).unwrap()
    }

    fn restore(&self, state: MachineState) -> Result<Machine<FakeHypervisor>, MachineError> {
        Machine::restore(
            &self.host,
            state,
            MachineMemory::anonymous(&MemoryConfig::new(MEMORY)).unwrap(),
            Self::devices(),
            self.console.try_clone().unwrap(),
            &self.event_loop.handle(),
        )
    }

    fn console_text(&self) -> String {
        let mut console = &self.console;
        let mut text = String::new();
        console.seek(SeekFrom::Start(0)).unwrap();
        console.read_to_string(&mut text).unwrap();
        text
    }
}

fn end(machine: &Machine<FakeHypervisor>) -> MachineExit {
    let latch = machine.exit_latch();
    latch
        .wait_timeout(Duration::from_secs(60))
        .expect("it ends")
}

#[test]
fn a_new_machine_has_memory_and_parked_vcpus() {
    let rig = Rig::new(vec![vec![POWER_OFF]]);
    let mut machine = rig.boot(3);
    assert_eq!((machine.vcpus(), machine.is_running()), (3, false));
    let mut events = rig.host.take_events();
    // Threads bind in any order.
    events.sort_by_key(|event| match event {
        FakeEvent::Bound(index, _) => *index + 1,
        _ => 0,
    });
    let [
        FakeEvent::Mapped {
            guest_address: 0,
            len: MEMORY,
            ..
        },
        bound @ ..,
    ] = &events[..]
    else {
        panic!("memory comes first: {events:?}");
    };
    let [
        FakeEvent::Bound(0, Some(boot)),
        FakeEvent::Bound(1, None),
        FakeEvent::Bound(2, None),
    ] = bound
    else {
        panic!("only the boot processor has registers: {bound:?}");
    };
    assert_eq!(boot.rip, u64::from(ENTRY));
    assert_eq!(machine.exit_reason(), None, "nothing has run");
    machine.resume().unwrap();
    machine.resume().unwrap();
    assert_eq!(end(&machine), MachineExit::PowerOff);
}

#[test]
fn memory_leaves_the_hole_below_4_gib_free() {
    let rig = Rig::new(Vec::new());
    let large = MachineConfig {
        memory: MemoryConfig::new(6 << 30),
        ..rig.config(1)
    };
    let _machine = Machine::boot(&rig.host, large, &rig.event_loop.handle()).unwrap();
    let mapped: Vec<_> = rig
        .host
        .take_events()
        .into_iter()
        .filter_map(|event| match event {
            FakeEvent::Mapped {
                guest_address, len, ..
            } => Some((guest_address, guest_address + len)),
            _ => None,
        })
        .collect();
    let [(0, low_end), (4_294_967_296, high_end)] = mapped[..] else {
        panic!("two regions: {mapped:?}");
    };
    assert!(low_end < 4 << 30);
    assert_eq!(low_end + (high_end - (4 << 30)), 6 << 30);
}

#[test]
fn ports_reach_their_devices() {
    let power_off = Step::PioWrite(0x600, vec![5 << 2 | 1 << 5]);
    let script = print("hello\n").chain([power_off]).collect();
    let rig = Rig::new(vec![script]);
    let mut machine = rig.boot(1);
    machine.resume().unwrap();
    assert_eq!(end(&machine), MachineExit::PowerOff);
    assert_eq!(machine.console().tail(1), "hello");
    drop(machine);
    assert_eq!(rig.console_text(), "hello\n");
    for (port, value) in [(0x602, 1), (0x64, 0xfe), (0xcf9, 6)] {
        let rig = Rig::new(vec![vec![Step::PioWrite(port, vec![value])]]);
        let mut machine = rig.boot(1);
        machine.resume().unwrap();
        assert_eq!(end(&machine), MachineExit::Reset, "{port:#x}");
    }
}

#[test]
fn doorbells_are_served_by_the_hypervisor() {
    let notify = virtio_window(SLOT_RNG) + 0x50;
    let rig = Rig::new(vec![vec![
        // The magic value, "virt".
        Step::MmioRead(virtio_window(SLOT_RNG), 4),
        Step::MmioWrite(notify, 0u32.to_le_bytes().to_vec()),
        // No device has this address.
        Step::MmioRead(0xc000_0000, 4),
        POWER_OFF,
    ]]);
    let mut machine = rig.boot(1);
    machine.resume().unwrap();
    assert_eq!(end(&machine), MachineExit::PowerOff);
    let events = rig.host.take_events();
    assert!(
        events.contains(&FakeEvent::Read(0, b"virt".to_vec())),
        "{events:?}"
    );
    assert!(
        events.contains(&FakeEvent::Read(0, vec![0xff; 4])),
        "{events:?}"
    );
    let rung = |event: &FakeEvent| matches!(event, FakeEvent::Rung(bell) if bell.address == notify);
    assert!(events.iter().any(rung), "{events:?}");
}

#[test]
fn every_exit_is_reported_with_its_vcpu() {
    let info = FaultInfo {
        reason: "it is lost".into(),
        program_counter: 0x1234,
        ..FaultInfo::default()
    };
    for (step, expected) in [
        (POWER_OFF, MachineExit::PowerOff),
        (Step::Exit(Exit::Reset), MachineExit::Reset),
        (
            Step::Exit(Exit::TripleFault),
            MachineExit::TripleFault { vcpu: 1 },
        ),
        (Step::Exit(Exit::Halt), MachineExit::Halted { vcpu: 1 }),
        (
            Step::Exit(Exit::Fault(info.clone())),
            MachineExit::Fault { vcpu: 1, info },
        ),
    ] {
        // The first vCPU stays in the guest until it is kicked.
        let rig = Rig::new(vec![Vec::new(), vec![step]]);
        let mut machine = rig.boot(2);
        machine.resume().unwrap();
        assert_eq!(end(&machine), expected);
        machine.pause().unwrap();
        machine.save_state().unwrap();
    }
    let rig = Rig::new(vec![vec![Step::Fail]]);
    let mut machine = rig.boot(1);
    machine.resume().unwrap();
    let MachineExit::Failed { reason } = end(&machine) else {
        panic!("a failure");
    };
    assert!(
        reason.starts_with("vCPU 0: ") && reason.contains("run a vCPU"),
        "{reason}"
    );
}

#[test]
fn a_paused_machine_can_be_saved_and_a_running_one_not() {
    let rig = Rig::new(Vec::new());
    let mut machine = rig.boot(2);
    for _ in 0..3 {
        machine.resume().unwrap();
        let refused = machine.save_state();
        assert!(matches!(refused, Err(MachineError::NotPaused { .. })));
        machine.pause().unwrap();
        machine.pause().unwrap();
        assert_eq!(machine.save_state().unwrap().vcpus.len(), 2);
    }
    let paused = |event: &FakeEvent| matches!(event, FakeEvent::Paused(_));
    // A vCPU that had not entered the guest yet need not be notified.
    assert!(
        rig.host
            .take_events()
            .iter()
            .filter(|event| paused(event))
            .count()
            <= 6
    );
    machine.resume().unwrap();
    machine.stop().unwrap();
    assert_eq!(end(&machine), MachineExit::Stopped);
}

#[test]
fn a_restored_machine_continues_and_is_first_notified_of_its_generation() {
    let script = print("a")
        .chain([Step::WaitIrq(GED_GSI)])
        .chain(print("b"))
        .chain([POWER_OFF])
        .collect();
    let rig = Rig::new(vec![script]);
    let mut machine = rig.boot(1);
    machine.resume().unwrap();
    machine.pause().unwrap();
    let state = machine.save_state().unwrap();
    drop(machine);
    let before = rig.console_text();
    let sections = state.encode().unwrap();
    for _ in 0..2 {
        let state = decoded(&sections);
        let mut clone = rig.restore(state).unwrap();
        let _ = rig.host.take_events();
        clone.set_generation_id([9; 16]).unwrap();
        assert_eq!(rig.host.take_events(), [FakeEvent::Irq(GED_GSI)]);
        clone.resume().unwrap();
        assert_eq!(end(&clone), MachineExit::PowerOff);
        assert!(clone.console().tail(1).ends_with('b'));
    }
    // The clone does not repeat output from before the save.
    let whole = format!("{before}{}", "ab"[before.len()..].repeat(2));
    assert_eq!(rig.console_text(), whole);
}

/// State of all vCPUs, then the VM's, then the vCPU state that follows it; devices and the
/// first instruction come later.
#[test]
fn a_restore_has_three_phases() {
    let rig = Rig::new(vec![vec![Step::WaitIrq(GED_GSI)]; 2]);
    let state = rig.boot(2).save_state().unwrap();
    let phases = |events: Vec<FakeEvent>| -> Vec<u8> {
        let phase = |event| match event {
            FakeEvent::Restored(_) => Some(1),
            FakeEvent::VmRestored => Some(2),
            FakeEvent::Finished(_) => Some(3),
            _ => None,
        };
        events.into_iter().filter_map(phase).collect()
    };
    let _ = rig.host.take_events();
    let mut clone = rig.restore(state.clone()).unwrap();
    assert_eq!(phases(rig.host.take_events()), [1, 1, 2, 3, 3]);
    clone.resume().unwrap();
    clone.pause().unwrap();
    let _ = rig.host.take_events();
    clone.reset_to(&state, None).unwrap();
    assert_eq!(phases(rig.host.take_events()), [1, 1, 2, 3, 3]);
}

/// Its vCPUs have a part of the state, and do not run.
#[test]
fn a_machine_whose_reset_failed_has_ended() {
    let rig = Rig::new(vec![vec![Step::WaitIrq(GED_GSI)]]);
    let state = rig.boot(1).save_state().unwrap();
    let mut foreign = state.clone();
    foreign.vm.blob.backend = "another".into();
    let mut clone = rig.restore(state).unwrap();
    assert!(clone.reset_to(&foreign, None).is_err());
    clone.resume().unwrap();
    let reason = end(&clone);
    assert!(matches!(reason, MachineExit::Failed { .. }), "{reason:?}");
}

#[test]
fn a_reset_machine_continues_from_the_state() {
    let rig = Rig::new(vec![vec![Step::WaitIrq(GED_GSI), Step::Exit(Exit::Halt)]]);
    let mut first = rig.boot(1);
    let state = first.save_state().unwrap();
    drop(first);
    let mut clone = rig.restore(state.clone()).unwrap();
    for _ in 0..3 {
        clone.resume().unwrap();
        let running = clone.reset_to(&state, None);
        assert!(matches!(running, Err(MachineError::NotPaused { .. })));
        clone.pause().unwrap();
        clone.reset_to(&state, None).unwrap();
    }
    let two = rig.boot(2).save_state().unwrap();
    assert!(
        clone.reset_to(&two, None).is_err(),
        "of another number of vCPUs"
    );
    clone.set_generation_id([9; 16]).unwrap();
    clone.resume().unwrap();
    assert_eq!(end(&clone), MachineExit::Halted { vcpu: 0 });
    clone.pause().unwrap();
    assert!(clone.reset_to(&state, None).is_err(), "it has ended");
}

#[test]
fn state_that_does_not_fit_is_refused() {
    let rig = Rig::new(Vec::new());
    let state = rig.boot(1).save_state().unwrap();
    let mut newer = state.clone();
    newer.version += 1;
    let mut larger = state.clone();
    larger.memory_bytes *= 2;
    let mut bare = state.clone();
    bare.devices.clear();
    let mut headless = state.clone();
    headless.vcpus.clear();
    let mut foreign = state.clone();
    foreign.vm.blob.backend = "another".into();
    let mut swapped = state.clone();
    swapped.vcpus[0].index = 1;
    for bad in [newer, larger, bare, headless, foreign, swapped] {
        assert!(rig.restore(bad).is_err());
    }
    assert!(rig.restore(state).is_ok());
}

/// Both a device without state and state without a device.
#[test]
fn devices_of_another_set_are_named() {
    let rig = Rig::new(Vec::new());
    let state = rig.boot(1).save_state().unwrap();
    let refused = |change: &dyn Fn(&mut MachineState)| {
        let mut state = state.clone();
        change(&mut state);
        match rig.restore(state) {
            Err(MachineError::Device(error)) => error,
            other => panic!("{:?}", other.map(|_| ())),
        }
    };
    let error = refused(&|state| state.devices.clear());
    let missing = matches!(
        error,
        DeviceError::NotSaved {
            slot: SLOT_RNG,
            kind: "rng"
        }
    );
    assert!(missing, "{error}");
    let error = refused(&|state| {
        let mut second = state.devices[0].clone();
        second.slot = 4;
        second.transport.device.kind = "net".to_owned();
        state.devices.push(second);
    });
    let absent = matches!(&error, DeviceError::Absent { slot: 4, kind } if kind == "net");
    assert!(absent, "{error}");
    let error = refused(&|state| state.devices.push(state.devices[0].clone()));
    assert!(matches!(error, DeviceError::Slots { .. }), "{error}");
    let error = refused(&|state| state.devices[0].transport.device.version = 9);
    let DeviceError::Restore {
        slot: SLOT_RNG,
        source,
    } = &error
    else {
        panic!("{error}");
    };
    let found = "\"rng\" version 9";
    assert!(source.to_string().contains(found), "{source}");
    let error = refused(&|state| state.devices[0].transport.device.bytes.push(0));
    assert!(matches!(error, DeviceError::Restore { .. }), "{error}");
}

#[test]
fn invalid_numbers_of_vcpus_are_refused() {
    let rig = Rig::new(Vec::new());
    for vcpus in [0, 255, 100_000] {
        let made = Machine::boot(&rig.host, rig.config(vcpus), &rig.event_loop.handle());
        assert!(matches!(made, Err(MachineError::Vcpus { .. })));
    }
}
