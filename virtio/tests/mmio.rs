//! The register transport, accessed as by a driver.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use sm_event_loop::{EventHandler, EventLoop, Readiness, Registry};
use sm_virtio::GuestMemory;
use sm_virtio::mmio::{MmioTransportStateV1, TransportState};
use sm_virtio::queue::{QueueStateV1, Span};
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::{Bytes as _, GuestAddress};

use self::common::Filler;

const MEMORY: usize = 1 << 20;
const BASE: u64 = 0x1_0000;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
const VERSION_1: u64 = 1 << 32;
/// Types of devices.
const BLOCK: u32 = 2;
const ENTROPY: u32 = 4;
/// Causes of an interrupt.
const USED: u32 = 1;
const CONFIG: u32 = 2;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// A device and its loop.
struct Bench {
    driver: Driver,
    memory: GuestMemory,
    event_loop: EventLoop,
}

fn bench_with(memory: GuestMemory) -> Bench {
    let event_loop = EventLoop::spawn("test").unwrap();
    let device = Arc::new(Mutex::new(Filler::new(ENTROPY)));
    Bench {
        driver: Driver::new(device, &memory, event_loop.handle()),
        memory,
        event_loop,
    }
}

fn bench() -> Bench {
    bench_with(memory())
}

const BUFFER: Span = Span {
    address: GuestAddress(0x100),
    len: 64,
};

impl Bench {
    fn start(&self) -> DriverQueue {
        self.driver.start(BASE, &[8]).remove(0)
    }

    /// Waits until the loop has reported every event that is ready now.
    fn settle(&self) {
        struct Nothing;
        impl EventHandler for Nothing {
            fn start(&mut self, _: &mut dyn Registry) -> std::io::Result<()> {
                Ok(())
            }
            fn ready(&mut self, _: u64, _: Readiness, _: &mut dyn Registry) {}
        }
        let handle = self.event_loop.handle();
        let id = handle.add_handler(Arc::new(Mutex::new(Nothing))).unwrap();
        // An event that was ready before the call is in the same batch at the latest; the
        // next call follows that batch.
        handle.call(id, |_| ()).unwrap();
        handle.remove_handler(id).unwrap();
    }

    fn entropy(&self, queue: &mut DriverQueue) {
        let head = queue.offer(&[], &[BUFFER]).unwrap();
        self.driver.notify(0);
        assert_eq!(self.driver.wait_used(queue), (head, 64));
    }
}

#[test]
fn registers_describe_the_device() {
    let Bench { driver, .. } = &bench();
    assert_eq!(driver.read(0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read(0x04), 2, "not a legacy device");
    assert_eq!(driver.read(0x08), ENTROPY);
    assert_eq!(driver.read(0x34), 64, "queue 0");
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "there is no queue 1");
    assert_ne!(driver.offered() & VERSION_1, 0);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0, "no features beyond 63");
    for register in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.read(register), u32::MAX, "no shared memory");
    }
}

#[test]
fn odd_accesses_do_nothing() {
    let Bench { driver, .. } = &bench();
    for (offset, len) in [(0x70, 1), (0x70, 2), (0x70, 8), (0x71, 4), (0x72, 2)] {
        driver.transport.write(offset, &vec![1; len]);
        let mut bytes = vec![0xff; len];
        driver.transport.read(offset, &mut bytes);
        assert_eq!(bytes, vec![0xff; len], "left as the bus filled it");
    }
    assert_eq!(driver.status(), 0);
}

#[test]
fn status_bits_come_in_their_order() {
    let Bench { driver, .. } = &bench();
    assert_eq!(driver.add_status(DRIVER), 0);
    assert_eq!(driver.add_status(DRIVER_OK), 0);
    assert_eq!(driver.add_status(ACKNOWLEDGE), ACKNOWLEDGE);
    assert_eq!(driver.add_status(FEATURES_OK), ACKNOWLEDGE);
    let ready = ACKNOWLEDGE | DRIVER;
    assert_eq!(driver.add_status(DRIVER), ready);
    assert_eq!(driver.add_status(DRIVER_OK), ready);
    assert_eq!(
        driver.add_status(FEATURES_OK),
        ready,
        "VERSION_1 is missing"
    );
    driver.write(0x24, 1);
    driver.write(0x20, 1 | 1 << 31);
    assert_eq!(driver.add_status(FEATURES_OK), ready, "not offered");
    driver.write(0x20, 1);
    assert_eq!(driver.add_status(FEATURES_OK), ready | FEATURES_OK);
    assert_eq!(
        driver.add_status(FAILED | DRIVER_OK),
        ready | FEATURES_OK | FAILED
    );
    driver.reset();
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_reset_clears_all_state() {
    let bench = bench();
    let driver = &bench.driver;
    for _ in 0..3 {
        let mut queue = bench.start();
        bench.entropy(&mut queue);
        driver.reset();
        assert_eq!(driver.read(0x60), 0);
        assert_eq!(driver.read(0x44), 0, "the queue is not ready");
        let used = queue.take_used();
        // The device touches nothing any more, even if it is notified.
        queue.offer(&[], &[BUFFER]).unwrap();
        driver.notify(0);
        bench.settle();
        assert_eq!(queue.take_used(), used);
    }
}

#[test]
fn rings_outside_guest_memory_need_a_reset() {
    let bench = bench();
    let driver = &bench.driver;
    driver.negotiate(VERSION_1);
    let top = MEMORY as u64 - 256;
    let outside = DriverQueue::new(bench.memory.clone(), top, 64);
    driver.enable_queue(0, &outside);
    let status = driver.add_status(DRIVER_OK);
    assert_eq!(status & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(driver.line.pulses(), 1);
    assert_eq!(driver.acknowledge(), CONFIG);
    driver.notify(0);
    bench.settle();
    driver.reset();
    bench.entropy(&mut bench.start());
}

#[test]
fn a_malformed_ring_needs_a_reset_and_is_reported_once() {
    let bench = bench();
    let driver = &bench.driver;
    let mut queue = bench.start();
    queue.make_available(8); // there is no such descriptor
    driver.notify(0);
    driver.line.wait_for_pulse_after(0);
    assert_eq!(driver.acknowledge(), CONFIG);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    queue.offer(&[], &[BUFFER]).unwrap();
    driver.notify(0);
    bench.settle();
    assert_eq!(driver.line.pulses(), 1);
    assert_eq!(queue.take_used(), None);
    driver.reset();
    bench.entropy(&mut bench.start());
}

#[test]
fn a_quiesced_device_pauses_and_loses_no_notification() {
    let bench = bench();
    let driver = &bench.driver;
    let mut queue = bench.start();
    // Requested before the pause: completed.
    let first = queue.offer(&[], &[BUFFER]).unwrap();
    driver.notify(0);
    driver.transport.quiesce().unwrap();
    assert_eq!(queue.take_used(), Some((first, 64)));
    let contents = || {
        let mut bytes = [0; 64];
        bench.memory.read_slice(&mut bytes, BUFFER.address).unwrap();
        bytes
    };
    let before = contents();
    let second = queue.offer(&[], &[BUFFER]).unwrap();
    driver.notify(0);
    bench.settle();
    assert_eq!(queue.take_used(), None);
    assert_eq!(before, contents());
    driver.transport.unquiesce();
    assert_eq!(driver.wait_used(&mut queue), (second, 64));
}

#[test]
fn a_restored_device_continues_where_it_was_saved() {
    let bench = bench();
    let mut queue = bench.start();
    for _ in 0..11 {
        bench.entropy(&mut queue);
    }
    // An interrupt that the guest has not seen, and a request that the device has not seen.
    let unseen = queue.offer(&[], &[BUFFER]).unwrap();
    queue.set_used_event();
    let before = bench.driver.line.pulses();
    bench.driver.notify(0);
    bench.driver.line.wait_for_pulse_after(before);
    bench.driver.transport.quiesce().unwrap();
    let waiting = queue.offer(&[], &[BUFFER]).unwrap();
    let state = bench.driver.transport.save().unwrap();
    let bytes = postcard::to_stdvec(&state.transport).unwrap();
    let state = TransportState {
        transport: postcard::from_bytes(&bytes).unwrap(),
        ..state
    };

    let clone = memory();
    let mut bytes = vec![0; MEMORY];
    bench
        .memory
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    clone.write_slice(&bytes, GuestAddress(0)).unwrap();
    let clone = bench_with(clone);
    clone.driver.transport.restore(&state).unwrap();
    assert_eq!(clone.driver.line.pulses(), 1, "raised again");
    assert_eq!(clone.driver.acknowledge(), USED);
    assert_eq!(clone.driver.status(), bench.driver.status());
    let mut queue = queue.moved_to(clone.memory.clone());
    assert_eq!(queue.take_used(), Some((unseen, 64)));
    assert_eq!(clone.driver.wait_used(&mut queue), (waiting, 64));
    clone.entropy(&mut queue);
    // In place, too: the machine is reset to the snapshot.
    clone.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    clone.driver.transport.quiesce().unwrap();
    clone.driver.transport.restore(&state).unwrap();
    clone.driver.transport.unquiesce();
}

#[test]
fn state_of_another_device_is_refused() {
    let bench = bench();
    bench.start();
    bench.driver.transport.quiesce().unwrap();
    let state = bench.driver.transport.save().unwrap();
    let block = Arc::new(Mutex::new(Filler::new(BLOCK)));
    let driver = Driver::new(block, &bench.memory, bench.event_loop.handle());
    let error = driver.transport.restore(&state).unwrap_err();
    assert!(error.to_string().contains("device type"), "{error}");
    // The rings must be in this machine's memory.
    let small = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let small = bench_with(small);
    let error = small.driver.transport.restore(&state).unwrap_err();
    assert!(error.to_string().contains("outside"), "{error}");
}

/// A transport in use stays as it is, and so does its device.
#[test]
fn refused_state_changes_nothing() {
    let bench = bench();
    let mut queue = bench.start();
    bench.entropy(&mut queue);
    let transport = &bench.driver.transport;
    transport.quiesce().unwrap();
    let before = transport.save().unwrap();
    let refused = |change: &dyn Fn(&mut TransportState), reason: &str| {
        let mut state = before.clone();
        state.transport.driver_features_select = 7;
        state.transport.config_generation += 9;
        state.device.bytes[0] += 100;
        change(&mut state);
        let error = transport.restore(&state).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(transport.save().unwrap(), before);
    };
    refused(&|state| state.transport.status = 1 << 4, "device status");
    let outside = |state: &mut TransportState| state.transport.queues[0].used = 1 << 40;
    refused(&outside, "outside guest memory");
    refused(&|state| state.device.version = 9, "version 9");
    refused(
        &|state| "other".clone_into(&mut state.device.kind),
        "it is \"other\" version 1, and only \"filler\" version 1",
    );
    transport.unquiesce();
    bench.entropy(&mut queue);
}

#[test]
fn a_device_that_cannot_be_saved_answers_so() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let device = Arc::new(Mutex::new(Filler::new(ENTROPY)));
    let driver = Driver::new(device.clone(), &memory(), event_loop.handle());
    device.lock().unwrap().busy = true;
    let refused = driver.transport.save().unwrap_err();
    assert_eq!(refused.kind, "filler");
    assert!(refused.to_string().contains("it is busy"), "{refused}");
    device.lock().unwrap().busy = false;
    driver.transport.save().unwrap();
}

/// A field with a value of its own each.
fn sample() -> MmioTransportStateV1 {
    let queue = |n: u16| QueueStateV1 {
        max_size: 256 << n,
        size: 128 << n,
        ready: n == 0,
        descriptors: 0x1_0000 + u64::from(n),
        available: 0x2_0000 + u64::from(n),
        used: 0x3_0000 + u64::from(n),
        event_idx: n == 1,
        next_available: 0x1234 + n,
        next_used: 0x1233 + n,
        signalled: 0x1230 + n,
    };
    MmioTransportStateV1 {
        device_type: 19,
        status: 0xf,
        device_features_select: 1,
        driver_features_select: 2,
        driver_features: 0x1_3000_0003,
        queue_select: 3,
        queues: vec![queue(0), queue(1)],
        interrupt_status: 1,
        config_generation: 300,
        needs_reset: true,
    }
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/virtio-mmio-1.bin")
}

/// Snapshots have these bytes: this file does not change. A new version of the state is a
/// new type with a file of its own, which [`write_golden`] is extended to write.
#[test]
fn the_encoding_of_a_transport_is_fixed() {
    let bytes = fs::read(golden()).unwrap();
    assert_eq!(postcard::to_stdvec(&sample()).unwrap(), bytes);
    let decoded: MmioTransportStateV1 = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(decoded, sample());
}

#[test]
#[ignore = "writes a file of the source tree"]
fn write_golden() {
    fs::write(golden(), postcard::to_stdvec(&sample()).unwrap()).unwrap();
}

fn queue_state() -> impl Strategy<Value = QueueStateV1> {
    let address = prop_oneof![(0u64..0x12).prop_map(|n| n << 12), any::<u64>()];
    let addresses = prop::array::uniform3(address);
    let sizes = (
        prop_oneof![9 => Just(64u16), 1 => any::<u16>()],
        prop_oneof![9 => Just(8u16), 1 => any::<u16>()],
    );
    let indices = (any::<u16>(), 0u16..10, any::<u16>());
    (sizes, addresses, indices, any::<[bool; 2]>()).prop_map(
        |((max_size, size), [descriptors, available, used], indices, [ready, event_idx])| {
            let (next_used, taken, signalled) = indices;
            QueueStateV1 {
                max_size,
                size,
                ready,
                descriptors,
                available,
                used,
                event_idx,
                next_available: next_used.wrapping_add(taken),
                next_used,
                signalled,
            }
        },
    )
}

fn transport_state() -> impl Strategy<Value = MmioTransportStateV1> {
    let status = prop_oneof![4 => Just(0xfu32), 4 => 0u32..0x100, 1 => any::<u32>()];
    let features = prop_oneof![Just(VERSION_1), Just(VERSION_1 | 3 << 28), any::<u64>()];
    let queues = prop_oneof![
        9 => prop::collection::vec(queue_state(), 1),
        1 => prop::collection::vec(queue_state(), 0..4),
    ];
    let causes = prop_oneof![4 => 0u32..4, 1 => any::<u32>()];
    (
        status,
        features,
        queues,
        causes,
        any::<[u32; 3]>(),
        any::<bool>(),
    )
        .prop_map(
            |(status, driver_features, queues, interrupt_status, words, needs_reset)| {
                let [select, queue_select, config_generation] = words;
                MmioTransportStateV1 {
                    device_type: ENTROPY,
                    status,
                    device_features_select: select,
                    driver_features_select: select,
                    driver_features,
                    queue_select,
                    queues,
                    interrupt_status,
                    config_generation,
                    needs_reset,
                }
            },
        )
}

/// A driver's access to the window.
#[derive(Clone, Debug)]
enum Poke {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Poke> {
    let register = prop_oneof![
        4 => prop::sample::select(vec![
            0x14u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
        ]),
        4 => Just(0x70u64),
        1 => 0u64..0x200,
    ];
    let value = prop_oneof![
        4 => (0u32..16).prop_map(|v| v.to_le_bytes().to_vec()),
        1 => Just(0x1000u32.to_le_bytes().to_vec()),
        1 => any::<u32>().prop_map(|v| v.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..9),
    ];
    prop_oneof![
        3 => (register.clone(), value).prop_map(|(at, bytes)| Poke::Write(at, bytes)),
        1 => (register, 1usize..9).prop_map(|(at, len)| Poke::Read(at, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A state is refused, or restored as it is; the device works after a reset either way.
    #[test]
    fn any_state_leaves_a_device_that_can_be_reset(transport in transport_state()) {
        let bench = bench();
        let fresh = bench.driver.transport.save().unwrap();
        let state = TransportState { transport, device: fresh.device };
        let restored = bench.driver.transport.restore(&state);
        bench.driver.transport.quiesce().unwrap();
        if restored.is_ok() {
            let saved = bench.driver.transport.save().unwrap();
            let expected = &state.transport;
            prop_assert_eq!(saved.transport.status, expected.status);
            prop_assert_eq!(saved.transport.driver_features, expected.driver_features);
            prop_assert_eq!(saved.transport.queues.len(), expected.queues.len());
        }
        bench.driver.transport.unquiesce();
        bench.driver.reset();
        bench.entropy(&mut bench.start());
    }

    #[test]
    fn any_bytes_of_a_transport_decode_or_fail(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let _ = postcard::from_bytes::<MmioTransportStateV1>(&bytes);
    }

    /// After any accesses, no status bit is set without those before it, and after a reset
    /// the device works.
    #[test]
    fn any_accesses_leave_a_device_that_can_be_reset(
        accesses in prop::collection::vec(access(), 0..120),
    ) {
        let bench = bench();
        let driver = &bench.driver;
        for access in accesses {
            match access {
                Poke::Read(at, len) => driver.transport.read(at, &mut vec![0; len]),
                Poke::Write(at, bytes) => driver.transport.write(at, &bytes),
            }
            let status = driver.status();
            for (before, after) in
                [(ACKNOWLEDGE, DRIVER), (DRIVER, FEATURES_OK), (FEATURES_OK, DRIVER_OK)]
            {
                prop_assert!(status & after == 0 || status & before != 0, "{status:#x}");
            }
        }
        driver.reset();
        bench.entropy(&mut bench.start());
    }
}
