//! The device, accessed as by a driver.

use std::sync::Mutex;

use proptest::prelude::*;
use sm_event_loop::EventLoop;
use sm_virtio::queue::Span;
use sm_virtio::testing::{Driver, DriverQueue};
use vm_memory::Bytes as _;

use super::*;
use crate::memory::{MIN_MEMORY, MemoryConfig};

const BASE: u64 = 0x10_000;
const NUMBERS_AT: u64 = 0x20_000;
/// Pages that tests return.
const FREE: u64 = 1024;
const NEEDS_RESET: u32 = 64;

struct Rig {
    balloon: Arc<Mutex<Balloon>>,
    driver: Driver,
    queues: Vec<DriverQueue>,
    memory: MachineMemory,
    _event_loop: EventLoop,
}

fn rig(queues: usize) -> Rig {
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    let mut balloon = Balloon::new();
    balloon.manage(memory.clone()).unwrap();
    start(Arc::new(Mutex::new(balloon)), memory, queues)
}

fn start(balloon: Arc<Mutex<Balloon>>, memory: MachineMemory, queues: usize) -> Rig {
    let event_loop = EventLoop::spawn("test").unwrap();
    let driver = Driver::new(balloon.clone(), &memory.guest, event_loop.handle());
    let queues = driver.start(BASE, &QUEUE_SIZES[..queues]);
    Rig {
        balloon,
        driver,
        queues,
        memory,
        _event_loop: event_loop,
    }
}

impl Rig {
    fn write(&self, page: u64) {
        let at = GuestAddress(page * PAGE);
        self.memory.guest.write_obj(0x55u8, at).unwrap();
    }

    fn is_zero(&self, page: u64) -> bool {
        let at = GuestAddress(page * PAGE);
        self.memory.guest.read_obj::<u8>(at).unwrap() == 0
    }

    /// Offers the buffers of a request and waits until the device has returned them.
    fn request(&mut self, queue: usize, readable: &[Span], writable: &[Span]) {
        let head = self.queues[queue].offer(readable, writable).unwrap();
        self.driver.notify(u32::try_from(queue).unwrap());
        let used = self.driver.wait_used(&mut self.queues[queue]);
        assert_eq!(used, (head, 0));
    }

    fn inflate(&mut self, queue: usize, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        let memory = &self.memory.guest;
        memory
            .write_slice(&bytes, GuestAddress(NUMBERS_AT))
            .unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(queue, &[span(NUMBERS_AT, len)], &[]);
    }

    fn sizes(&self) -> BalloonSizes {
        self.balloon.lock().unwrap().sizes()
    }
}

fn span(address: u64, len: u32) -> Span {
    Span {
        address: GuestAddress(address),
        len,
    }
}

#[test]
fn reported_pages_lose_their_memory() {
    let mut rig = rig(3);
    for page in FREE..FREE + 2048 {
        rig.write(page);
    }
    rig.write(FREE + 5000);
    // More than is returned in one turn, in several buffers.
    let buffers = [
        span(FREE * PAGE, 6 << 20),
        span(FREE * PAGE + (6 << 20), 0),
        span(FREE * PAGE + (6 << 20), 30 << 20),
    ];
    rig.request(REPORTING, &[], &buffers);
    assert_eq!(rig.sizes().returned, 2049 * PAGE);
    assert!((FREE..FREE + 2048).all(|page| rig.is_zero(page)));
    rig.write(FREE);
    rig.request(REPORTING, &[], &[span(FREE * PAGE, 4096)]);
    assert_eq!(rig.sizes().returned, 2050 * PAGE);
}

#[test]
fn pages_in_the_balloon_lose_their_memory_until_it_is_deflated() {
    let mut rig = rig(3);
    rig.balloon.lock().unwrap().set_target(1 << 20);
    let mut config = [0; 4];
    rig.driver.config(0, &mut config);
    assert_eq!(u32::from_le_bytes(config), 256);
    assert_eq!(rig.driver.acknowledge() & 2, 2, "a configuration change");

    // In the order in which Linux allocates them, more than are read at a time.
    let first = u32::try_from(FREE).unwrap();
    let numbers: Vec<u32> = (0..300).rev().map(|n| first + n * 2).collect();
    for page in FREE..FREE + 700 {
        rig.write(page);
    }
    rig.inflate(INFLATE, &numbers);
    for page in FREE..FREE + 700 {
        let inflated = page < FREE + 600 && page % 2 == 0;
        assert_eq!(rig.is_zero(page), inflated, "{page}");
    }
    rig.driver.transport.write(0x104, &300u32.to_le_bytes());
    let sizes = rig.sizes();
    assert_eq!((sizes.target, sizes.actual), (1 << 20, 300 * PAGE));
    assert_eq!(sizes.returned, 300 * PAGE);

    rig.inflate(1, &numbers);
    rig.write(FREE);
    assert!(!rig.is_zero(FREE));
    assert_eq!(rig.sizes().returned, 300 * PAGE);
    rig.driver.reset();
    assert_eq!((rig.sizes().target, rig.sizes().actual), (1 << 20, 0));
}

#[test]
fn a_driver_that_reports_nothing_has_two_queues() {
    let mut rig = rig(2);
    rig.write(FREE);
    rig.inflate(INFLATE, &[u32::try_from(FREE).unwrap()]);
    assert!(rig.is_zero(FREE));
}

#[test]
fn without_memory_requests_are_completed() {
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    let mut rig = start(Arc::default(), memory, 3);
    rig.write(FREE);
    rig.inflate(INFLATE, &[u32::try_from(FREE).unwrap()]);
    rig.request(REPORTING, &[], &[span(FREE * PAGE, 4096)]);
    assert!(!rig.is_zero(FREE));
}

#[test]
fn page_numbers_outside_memory_are_ignored() {
    let mut rig = rig(3);
    rig.write(FREE);
    let last = u32::try_from(MIN_MEMORY / PAGE).unwrap();
    let first = u32::try_from(FREE).unwrap();
    rig.inflate(
        INFLATE,
        &[u32::MAX, last, 0xc_0000, first, first, u32::MAX - 1],
    );
    assert_eq!(rig.sizes().returned, PAGE);
    // Incomplete numbers, and none.
    rig.write(FREE);
    rig.request(INFLATE, &[span(NUMBERS_AT, 3)], &[]);
    rig.request(INFLATE, &[], &[span(NUMBERS_AT, 64)]);
    rig.request(REPORTING, &[span(FREE * PAGE, 4096)], &[]);
    assert!(!rig.is_zero(FREE));
    assert_eq!(rig.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn a_guest_that_returns_its_own_rings_only_breaks_its_device() {
    let mut rig = rig(3);
    let queue = &mut rig.queues[REPORTING];
    let head = queue.offer(&[], &[span(0, 1 << 20)]).unwrap();
    assert_eq!(head, 0);
    rig.driver.notify(2);
    rig.driver.transport.quiesce().unwrap();
    rig.driver.transport.unquiesce();
    rig.driver.reset();
    rig.queues = rig.driver.start(BASE, &QUEUE_SIZES);
    rig.write(FREE);
    rig.request(REPORTING, &[], &[span(FREE * PAGE, 4096)]);
    assert!(rig.is_zero(FREE));
}

#[test]
fn a_malformed_ring_needs_a_reset() {
    let rig = rig(3);
    rig.queues[REPORTING].set_available_index(5000);
    rig.driver.notify(2);
    let pulses = rig.driver.line.wait_for_pulse_after(0);
    assert!(pulses > 0 && rig.driver.status() & NEEDS_RESET != 0);
}

#[test]
fn required_queues_are_those_of_inflating_and_deflating() {
    let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
    let rig = start(Arc::default(), memory, 1);
    assert_ne!(rig.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn only_the_actual_size_is_writable() {
    let rig = rig(3);
    rig.balloon.lock().unwrap().set_target(8 << 12);
    for (offset, bytes) in [(0, &[9; 4][..]), (2, &[7; 4]), (8, &[1; 4]), (7, &[3; 9])] {
        rig.driver.transport.write(0x100 + offset, bytes);
    }
    let mut config = [0xff; 12];
    rig.driver.config(0, &mut config);
    assert_eq!(config, [8, 0, 0, 0, 7, 7, 0, 3, 0, 0, 0, 0]);
    rig.balloon
        .lock()
        .unwrap()
        .read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 12]);
}

#[test]
fn a_pause_completes_requests_and_state_is_restored() {
    let mut rig = rig(3);
    rig.balloon.lock().unwrap().set_target(3 << 12);
    rig.driver.transport.write(0x104, &2u32.to_le_bytes());
    // Far more than a turn returns.
    let buffers = [span(0x100_000, 60 << 20); 31];
    rig.queues[REPORTING].offer(&[], &buffers).unwrap();
    rig.driver.notify(2);
    rig.driver.transport.quiesce().unwrap();
    assert!(rig.queues[REPORTING].take_used().is_some());
    let saved = rig.driver.transport.save().unwrap();
    // The layout does not change.
    assert_eq!(saved.device.bytes, [3, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(
        (saved.device.kind.as_str(), saved.device.version),
        ("balloon", 1)
    );
    rig.driver.transport.unquiesce();

    let other = Arc::new(Mutex::new(Balloon::new()));
    let event_loop = EventLoop::spawn("other").unwrap();
    let driver = Driver::new(other.clone(), &rig.memory.guest, event_loop.handle());
    driver.transport.restore(&saved).unwrap();
    let sizes = other.lock().unwrap().sizes();
    assert_eq!((sizes.target, sizes.actual), (3 << 12, 2 << 12));
    for bytes in [&[][..], &[0; 7], &[0; 9]] {
        let mut unfit = saved.clone();
        unfit.device.bytes = bytes.to_vec();
        assert!(driver.transport.restore(&unfit).is_err());
    }
}

#[test]
fn the_target_is_rounded_down_and_bounded() {
    let mut balloon = Balloon::new();
    balloon.set_target(4095);
    assert_eq!(balloon.sizes().target, 0);
    balloon.set_target(u64::MAX);
    assert_eq!(balloon.sizes().target, u64::from(u32::MAX) * PAGE);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Any requests on any queue: the device answers, or needs a reset.
    #[test]
    fn any_requests_are_answered(
        requests in prop::collection::vec(
            (0usize..3, 0u64..0x400_0000, any::<u32>(), any::<bool>()), 1..20),
    ) {
        let mut rig = rig(3);
        for (queue, address, len, writable) in requests {
            let buffer = [span(address, len % 0x600_0000)];
            let (readable, writable) = if writable { (&[][..], &buffer[..]) } else { (&buffer[..], &[][..]) };
            let _ = rig.queues[queue].offer(readable, writable);
            rig.driver.notify(u32::try_from(queue).unwrap());
        }
        rig.driver.transport.quiesce().unwrap();
        rig.driver.transport.unquiesce();
        rig.driver.reset();
        rig.queues = rig.driver.start(BASE, &QUEUE_SIZES);
        rig.write(FREE);
        rig.request(REPORTING, &[], &[span(FREE * PAGE, 4096)]);
        prop_assert!(rig.is_zero(FREE));
    }
}
