//! A device with an event loop of its own: its calls are on that loop, and ordered with the
//! machine's life.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use sm_event_loop::{
    EventHandler, EventLoop, Interest, Readiness, Registered, Registry, new_eventfd, signal,
};
use sm_hypervisor::Exit;
use sm_hypervisor::fake::{FakeHypervisor, Step};
use sm_virtio::queue::Queue;
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, VirtioDevice};
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::exit::MachineExit;
use sm_vmm_core::layout::{GED_GSI, SLOT_NET, SLOT_RNG, virtio_window};
use sm_vmm_core::machine::{Machine, MachineConfig, MachineError};
use sm_vmm_core::memory::{MachineMemory, MemoryConfig};
use sm_vmm_core::state::MachineState;
use sm_vmm_core::virtio::rng::Rng;

use self::common::kernel;

const MEMORY: u64 = 64 << 20;
const OWN: &str = "own-loop";
/// Writes that make a device without queues active (virtio 1.3 section 3.1.1).
const STATUS: u64 = 0x70;
const FEATURES: u64 = 0x20;
const FEATURES_SELECT: u64 = 0x24;
const CONFIG: u64 = 0x100;

/// Calls, each with the thread's name.
type Calls = Arc<Mutex<Vec<(&'static str, String)>>>;

/// A device without queues that notes its calls.
struct Recorder {
    calls: Calls,
}

impl Recorder {
    fn note(&self, call: &'static str) {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default().to_owned();
        self.calls.lock().unwrap().push((call, name));
    }
}

impl VirtioDevice for Recorder {
    fn kind(&self) -> &'static str {
        "recorder"
    }

    fn device_type(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.note("written");
    }

    fn attached(&mut self, _registry: &mut dyn Registry) {
        self.note("attached");
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn started(&mut self, _registry: &mut dyn Registry) {
        self.note("started");
    }

    fn queue_notified(&mut self, _index: usize, _registry: &mut dyn Registry) {}

    fn host_ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut dyn Registry) {}

    fn reset(&mut self, _registry: Option<&mut dyn Registry>) {
        self.note("reset");
    }

    fn quiesce(&mut self, _registry: &mut dyn Registry) {
        self.note("quiesce");
    }

    fn queues(&self) -> &[Queue] {
        &[]
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        Ok(DevicePayload {
            kind: self.kind().to_owned(),
            version: 1,
            bytes: Vec::new(),
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect(self.kind(), 1)
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        self.check(payload)
    }
}

/// The machine's event loop, and one of the device. Dropped after machines.
struct Loops {
    common: EventLoop,
    own: EventLoop,
}

impl Loops {
    fn new() -> Self {
        Self {
            common: EventLoop::spawn("common-loop").unwrap(),
            own: EventLoop::spawn(OWN).unwrap(),
        }
    }

    fn devices(&self, calls: &Calls) -> Vec<DeviceConfig> {
        let recorder = Recorder {
            calls: Arc::clone(calls),
        };
        let recorder = DeviceConfig::new(SLOT_NET, Arc::new(Mutex::new(recorder)));
        vec![
            DeviceConfig::new(SLOT_RNG, Arc::new(Mutex::new(Rng::new()))),
            recorder.on(self.own.handle()),
        ]
    }
}

fn write(offset: u64, value: u32) -> Step {
    let address = virtio_window(SLOT_NET) + offset;
    Step::MmioWrite(address, value.to_le_bytes().to_vec())
}

/// Activates the device, and continues with `then`.
fn driver(then: Vec<Step>) -> Vec<Step> {
    let mut steps = vec![
        write(STATUS, 1),
        write(STATUS, 3),
        // VERSION_1, bit 32.
        write(FEATURES_SELECT, 1),
        write(FEATURES, 1),
        write(STATUS, 11),
        write(STATUS, 15),
    ];
    steps.extend(then);
    steps
}

fn take(calls: &Calls) -> Vec<(&'static str, String)> {
    std::mem::take(&mut calls.lock().unwrap())
}

/// Returns the calls without repetitions: a start may be noted twice.
fn order(calls: &[(&'static str, String)]) -> Vec<&'static str> {
    let mut names: Vec<_> = calls.iter().map(|(call, _)| *call).collect();
    names.dedup();
    names
}

fn machine(
    loops: &Loops,
    calls: &Calls,
    host: &FakeHypervisor,
) -> Result<Machine<FakeHypervisor>, MachineError> {
    let config = MachineConfig {
        memory: MemoryConfig::new(MEMORY),
        vcpus: 1,
        kernel: kernel(&[0xf4]),
        initramfs: Vec::new(),
        cmdline: String::new(),
        generation_id: [7; 16],
        console: tempfile::tempfile().unwrap(),
        devices: loops.devices(calls),
    };
    Machine::boot(host, config, &loops.common.handle())
}

fn restored(
    loops: &Loops,
    calls: &Calls,
    host: &FakeHypervisor,
    state: MachineState,
) -> Result<Machine<FakeHypervisor>, MachineError> {
    Machine::restore(
        host,
        state,
        MachineMemory::anonymous(&MemoryConfig::new(MEMORY)).unwrap(),
        loops.devices(calls),
        tempfile::tempfile().unwrap(),
        &loops.common.handle(),
    )
}

fn wait_for(calls: &Calls, call: &str) {
    while !calls.lock().unwrap().iter().any(|(it, _)| *it == call) {
        std::thread::yield_now();
    }
}

/// Occupies the loop until it is released.
struct Occupation(mpsc::Receiver<()>, Option<Registered<OwnedFd>>);

impl EventHandler for Occupation {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        let fd = new_eventfd()?;
        signal(fd.as_fd());
        self.1 = Some(registry.add(fd, 0, Interest::READ.edge_triggered())?);
        Ok(())
    }

    fn ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut dyn Registry) {
        let _ = self.0.recv();
    }
}

#[test]
fn all_calls_are_on_the_own_loop() {
    let (loops, calls) = (Loops::new(), Calls::default());
    let host = FakeHypervisor::new(vec![driver(vec![Step::WaitIrq(GED_GSI)])]);
    let mut first = machine(&loops, &calls, &host).unwrap();
    first.resume().unwrap();
    wait_for(&calls, "started");
    first.pause().unwrap();
    let mut all = take(&calls);
    assert_eq!(order(&all), ["attached", "started", "quiesce"]);
    let state = first.save_state().unwrap();
    first.resume().unwrap();
    all.extend(take(&calls));
    assert_eq!(
        order(&all).last(),
        Some(&"started"),
        "before the guest continues"
    );
    drop(first);

    let copies = Calls::default();
    let host = FakeHypervisor::new(vec![driver(vec![Step::WaitIrq(GED_GSI)])]);
    let mut copy = restored(&loops, &copies, &host, state.clone()).unwrap();
    copy.resume().unwrap();
    copy.pause().unwrap();
    copy.reset_to(&state, None).unwrap();
    copy.resume().unwrap();
    all.extend(take(&copies));
    drop(copy);
    let after = order(&all);
    let expected = ["attached", "started", "quiesce", "reset", "started"];
    assert!(after.ends_with(&expected), "{after:?}");
    for (call, thread) in &all {
        assert_eq!(thread, OWN, "{call}");
    }
}

/// A network device tells its guest that connections have ended before the guest runs.
#[test]
fn a_restored_device_starts_before_the_guest() {
    let (loops, calls) = (Loops::new(), Calls::default());
    let host = FakeHypervisor::new(vec![driver(vec![Step::WaitIrq(GED_GSI)])]);
    let mut first = machine(&loops, &calls, &host).unwrap();
    first.resume().unwrap();
    wait_for(&calls, "started");
    first.pause().unwrap();
    let state = first.save_state().unwrap();
    drop(first);

    // The copy continues behind the steps that the first has made.
    let script = driver(vec![write(CONFIG, 1), Step::Exit(Exit::Shutdown)]);
    let host = FakeHypervisor::new(vec![script]);
    let calls = Calls::default();
    let mut copy = restored(&loops, &calls, &host, state).unwrap();
    wait_for(&calls, "started");
    take(&calls);
    let (release, released) = mpsc::channel();
    let occupation = Occupation(released, None);
    let handle = loops.own.handle();
    handle
        .add_handler(Arc::new(Mutex::new(occupation)))
        .unwrap();
    let releasing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        release.send(()).unwrap();
    });
    copy.resume().unwrap();
    let end = copy.exit_latch().wait_timeout(Duration::from_secs(60));
    assert_eq!(end, Some(MachineExit::PowerOff));
    assert_eq!(order(&take(&calls)), ["started", "written"]);
    releasing.join().unwrap();
}

#[test]
fn a_machine_whose_device_has_lost_its_loop_is_not_paused() {
    let (loops, calls) = (Loops::new(), Calls::default());
    let host = FakeHypervisor::new(vec![driver(vec![Step::WaitIrq(GED_GSI)])]);
    let mut machine = machine(&loops, &calls, &host).unwrap();
    machine.resume().unwrap();
    wait_for(&calls, "started");
    let Loops { common, own } = loops;
    drop(own);
    let error = machine.pause().unwrap_err();
    assert!(matches!(error, MachineError::Device(_)), "{error}");
    assert!(machine.is_running());
    drop(machine);
    drop(common);
}
