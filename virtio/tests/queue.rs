//! The virtqueue compared with the `virtio-queue` crate, on valid rings and on invalid
//! ones.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "small numbers that the test chooses"
)]

use proptest::prelude::*;
use sm_virtio::GuestMemory;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError, Span};
use sm_virtio::testing::{DriverQueue, INDIRECT, NEXT, WRITE};
use virtio_queue::{Queue as Reference, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

/// Guest memory: two regions with a hole between them.
const LOW: u64 = 0x8000;
const HIGH: u64 = 0x10_0000;
const HIGH_LEN: u64 = 0x8000;
const BASE: u64 = 0x1000;
/// Addresses of indirect tables.
const TABLES: u64 = 0x4000;

fn memory() -> GuestMemory {
    let ranges = [
        (GuestAddress(0), LOW as usize),
        (GuestAddress(HIGH), HIGH_LEN as usize),
    ];
    GuestMemory::from_ranges(&ranges).unwrap()
}

fn is_backed(span: Span) -> bool {
    let end = span.address.0.saturating_add(span.len.into());
    let within =
        |start, len| span.address.0 >= start && end <= start + len && span.address.0 < start + len;
    within(0, LOW) || within(HIGH, HIGH_LEN)
}

/// A descriptor that a driver may have written.
type Raw = (Span, u16, u16);

fn span() -> impl Strategy<Value = Span> {
    let address = prop_oneof![
        8 => 0..LOW,
        4 => HIGH..HIGH + HIGH_LEN,
        2 => TABLES..TABLES + 64,
        1 => LOW - 8..LOW + 8,
        1 => HIGH - 8..HIGH + 8,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        8 => 0..0x200u32,
        2 => (1..9u32).prop_map(|n| 16 * n),
        1 => any::<u32>(),
    ];
    (address, len).prop_map(|(address, len)| Span {
        address: GuestAddress(address),
        len,
    })
}

fn descriptor(size: u16) -> impl Strategy<Value = Raw> {
    let flags = prop_oneof![
        6 => Just(0),
        6 => Just(NEXT),
        6 => Just(WRITE),
        6 => Just(NEXT | WRITE),
        3 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![8 => 0..size, 1 => 0..=size, 1 => any::<u16>()];
    (span(), flags, next)
}

#[derive(Clone, Debug)]
enum Step {
    /// Offer these heads.
    Offer(Vec<u16>),
    /// Move the index anywhere.
    Jump(u16),
    /// Take a chain, and return it with this many bytes written.
    Serve(u32),
    /// Take a chain and do not return it.
    Keep,
    /// Request an interrupt at this distance from the used index.
    Event(u16),
    Publish,
    /// Save and restore.
    Freeze,
}

fn step(size: u16) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(0..size, 1..5).prop_map(Step::Offer),
        1 => prop::collection::vec(any::<u16>(), 1..3).prop_map(Step::Offer),
        1 => any::<u16>().prop_map(Step::Jump),
        8 => any::<u32>().prop_map(Step::Serve),
        1 => Just(Step::Keep),
        2 => (0..size).prop_map(Step::Event),
        1 => any::<u16>().prop_map(Step::Event),
        5 => Just(Step::Publish),
        1 => Just(Step::Freeze),
    ]
}

#[derive(Clone, Debug)]
struct Scenario {
    size: u16,
    event_idx: bool,
    table: Vec<Raw>,
    indirect: Vec<Raw>,
    steps: Vec<Step>,
}

fn scenario() -> impl Strategy<Value = Scenario> {
    (0u32..6).prop_flat_map(|bits| {
        let size = 1u16 << bits;
        (
            any::<bool>(),
            prop::collection::vec(descriptor(size), usize::from(size)),
            prop::collection::vec(descriptor(size), 32),
            prop::collection::vec(step(size), 1..40),
        )
            .prop_map(move |(event_idx, table, indirect, steps)| Scenario {
                size,
                event_idx,
                table,
                indirect,
                steps,
            })
    })
}

/// Both implementations, each with its own memory.
struct Pair {
    size: u16,
    event_idx: bool,
    /// The driver side, once for each memory.
    drivers: [DriverQueue; 2],
    memories: [GuestMemory; 2],
    ours: Queue,
    theirs: Reference,
    chain: DescriptorChain,
    offered: u16,
    used: u16,
}

/// The ring can no longer be used.
struct Broken;

impl Pair {
    fn new(scenario: &Scenario) -> Self {
        let memories = [memory(), memory()];
        let drivers = memories
            .each_ref()
            .map(|memory| DriverQueue::new(memory.clone(), BASE, scenario.size));
        for (driver, memory) in drivers.iter().zip(&memories) {
            for (index, &(span, flags, next)) in (0..).zip(&scenario.table) {
                driver.write_descriptor(index, span, flags, next);
            }
            // The descriptors of another queue serve as the tables.
            let tables = DriverQueue::new(memory.clone(), TABLES, 32);
            for (index, &(span, flags, next)) in (0..).zip(&scenario.indirect) {
                tables.write_descriptor(index, span, flags, next);
            }
        }
        let ours = drivers[0].device_side(scenario.event_idx);
        let [descriptors, available, used] = drivers[1].addresses();
        let low = |address: u64| Some(address as u32);
        let mut theirs = Reference::new(scenario.size).unwrap();
        theirs.set_size(scenario.size);
        theirs.set_desc_table_address(low(descriptors), Some(0));
        theirs.set_avail_ring_address(low(available), Some(0));
        theirs.set_used_ring_address(low(used), Some(0));
        theirs.set_event_idx(scenario.event_idx);
        theirs.set_ready(true);
        assert!(theirs.is_valid(&memories[1]));
        assert!(ours.is_valid(&memories[0]));
        Self {
            size: scenario.size,
            event_idx: scenario.event_idx,
            drivers,
            memories,
            ours,
            theirs,
            chain: DescriptorChain::new(),
            offered: 0,
            used: 0,
        }
    }

    /// Returns the part that the device has written: used ring, indices, event.
    fn device_area(&self, which: usize) -> Vec<u8> {
        let [_, _, used] = self.drivers[which].addresses();
        let mut bytes = vec![0; 6 + 8 * usize::from(self.size)];
        self.memories[which]
            .read_slice(&mut bytes, GuestAddress(used))
            .unwrap();
        bytes
    }

    fn take(&mut self) -> Result<bool, Broken> {
        let ours = self.ours.pop(&self.memories[0], &mut self.chain);
        let mut theirs = self.theirs.pop_descriptor_chain(&self.memories[1]);
        if theirs.is_none()
            && self.event_idx
            && self.theirs.enable_notification(&self.memories[1]).unwrap()
        {
            theirs = self.theirs.pop_descriptor_chain(&self.memories[1]);
        }
        let Some(theirs) = theirs else {
            assert!(
                matches!(ours, Ok(false) | Err(QueueError::AvailableIndex)),
                "{ours:?}"
            );
            return ours.map_err(|_| Broken);
        };
        let head = theirs.head_index();
        let seen: Vec<Raw> = theirs
            .map(|d| {
                let span = Span {
                    address: d.addr(),
                    len: d.len(),
                };
                (span, d.flags(), d.next())
            })
            .collect();
        match ours {
            Ok(taken) => {
                assert!(taken, "there is a chain");
                assert_eq!(self.chain.head(), head);
                let chain = self.chain.readable.iter().map(|span| (span, 0));
                let chain = chain.chain(self.chain.writable.iter().map(|span| (span, WRITE)));
                let chain: Vec<_> = chain.map(|(&span, flag)| (span, flag)).collect();
                let expected: Vec<_> = seen.iter().map(|d| (d.0, d.1 & WRITE)).collect();
                assert_eq!(chain, expected);
                assert!(chain.iter().all(|&(span, _)| is_backed(span)));
                Ok(true)
            }
            Err(error) => {
                assert!(self.explains(error, &seen), "{error:?} for {seen:?}");
                Err(Broken)
            }
        }
    }

    /// Returns true if the chain that the reference read contains this fault.
    fn explains(&self, error: QueueError, seen: &[Raw]) -> bool {
        let cut_short = seen.last().is_none_or(|last| last.1 & NEXT != 0);
        match error {
            QueueError::Buffer => seen.iter().any(|&(span, ..)| !is_backed(span)),
            QueueError::Order => seen
                .windows(2)
                .any(|pair| pair[0].1 & WRITE != 0 && pair[1].1 & WRITE == 0),
            // The reference takes chains again that have been returned.
            QueueError::AvailableIndex => self.offered.wrapping_sub(self.used) > self.size,
            // The reference ignores a NEXT beside INDIRECT, and accepts tables of any
            // length.
            QueueError::Indirect => true,
            _ => cut_short,
        }
    }

    fn run(&mut self, step: &Step) -> Result<(), Broken> {
        match step {
            Step::Offer(heads) => {
                for head in heads {
                    self.offered = self.offered.wrapping_add(1);
                    for driver in &mut self.drivers {
                        driver.make_available(*head);
                    }
                }
            }
            Step::Jump(index) => {
                for driver in &self.drivers {
                    driver.set_available_index(*index);
                }
                self.offered = *index;
            }
            Step::Serve(len) => {
                if self.take()? {
                    let head = self.chain.head();
                    self.used = self.used.wrapping_add(1);
                    self.ours.push_used(&self.memories[0], head, *len).unwrap();
                    self.theirs.add_used(&self.memories[1], head, *len).unwrap();
                }
            }
            Step::Keep => {
                self.take()?;
            }
            Step::Event(distance) => {
                let event = self.used.wrapping_add(*distance);
                for (driver, memory) in self.drivers.iter().zip(&self.memories) {
                    let [_, available, _] = driver.addresses();
                    let at = available + 4 + 2 * u64::from(self.size);
                    memory.write_obj(event, GuestAddress(at)).unwrap();
                }
            }
            Step::Publish => {
                let interrupt = self.ours.publish(&self.memories[0]).unwrap();
                let wanted = self.theirs.needs_notification(&self.memories[1]).unwrap();
                if self.event_idx {
                    assert_eq!(interrupt, wanted);
                }
                assert_eq!(self.device_area(0), self.device_area(1));
            }
            Step::Freeze => {
                let bytes = postcard::to_stdvec(&self.ours.save()).unwrap();
                let state = postcard::from_bytes(&bytes).unwrap();
                self.ours = Queue::restore(self.ours.max_size, &state).unwrap();
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(800))]

    /// For any contents of a ring, both implementations see the same chains and return the
    /// same, until ours reports a fault that exists.
    #[test]
    fn any_ring_is_read_like_the_reference_reads_it(scenario in scenario()) {
        let mut pair = Pair::new(&scenario);
        for step in &scenario.steps {
            if pair.run(step).is_err() {
                break;
            }
        }
    }

    /// A correct driver gets every chain back, for any order in which the device serves
    /// them, and is notified when it wants to be.
    #[test]
    fn a_correct_driver_gets_every_chain_back_and_no_wake_up_is_lost(
        bits in 0u32..7,
        event_idx: bool,
        start: u16,
        rounds in prop::collection::vec((0usize..9, 0usize..9, any::<bool>()), 1..60),
    ) {
        let memory = memory();
        let size = 1 << bits;
        let mut driver = DriverQueue::new(memory.clone(), BASE, size);
        let mut device = driver.device_side(event_idx);
        // Start anywhere in the free-running indices, so that they wrap.
        driver.skip_to(start);
        device.skip_to(start);
        let (mut chain, mut in_flight) = (DescriptorChain::new(), Vec::new());
        let (mut sent, mut back) = (0u32, 0u32);
        // Both sleep at first: the device waits for a notification.
        prop_assert!(!device.pop(&memory, &mut chain).unwrap());
        driver.set_used_event();
        for (offers, serves, indirect) in rounds {
            let mut kick = false;
            for n in 0..offers {
                let spans = [Span { address: GuestAddress(0x100), len: 16 + n as u32 }];
                // Each chain has a table of its own.
                let table = TABLES + 16 * u64::from(sent % 64);
                let offered = if indirect {
                    driver.offer_indirect(table, &spans, &[])
                } else {
                    driver.offer(&[], &spans)
                };
                if offered.is_some() {
                    sent += 1;
                    kick |= !event_idx || driver.needs_kick();
                }
            }
            // The device last found the ring empty, so the first offer notifies.
            prop_assert_eq!(kick, driver.offered_since_kick() > 0);
            driver.kicked();
            while device.pop(&memory, &mut chain).unwrap() {
                prop_assert_eq!(chain.readable.len() + chain.writable.len(), 1);
                in_flight.push(chain.head());
            }
            let mut published = false;
            for n in 0..serves.min(in_flight.len()) {
                let head = in_flight.swap_remove(n % in_flight.len());
                device.push_used(&memory, head, u32::from(head)).unwrap();
                published = true;
            }
            let interrupt = device.publish(&memory).unwrap();
            prop_assert_eq!(interrupt, published);
            prop_assert!(!device.publish(&memory).unwrap(), "nothing new");
            while let Some((head, len)) = driver.take_used() {
                prop_assert_eq!(u32::from(head), len);
                back += 1;
            }
            driver.set_used_event();
        }
        prop_assert_eq!(sent, back + in_flight.len() as u32);
    }
}

/// Every ring of two descriptors, by flags and links: `pop` ends, and takes the chain that
/// a simple reading of the specification gives.
#[test]
fn all_small_tables_are_walked_to_an_end() {
    let memory = memory();
    let driver = DriverQueue::new(memory.clone(), BASE, 2);
    let spans = [0x100, 0x200].map(|address| Span {
        address: GuestAddress(address),
        len: 32,
    });
    let mut chain = DescriptorChain::new();
    let mut taken = 0;
    for table in 0u16..(32 * 32) {
        let parts = [table % 32, table / 32].map(|part| (part % 8, part / 8));
        for (index, (flags, next)) in (0..).zip(parts) {
            // An INDIRECT descriptor points to itself.
            let span = if flags & INDIRECT == 0 {
                spans[usize::from(index)]
            } else {
                Span {
                    address: GuestAddress(BASE + 16 * u64::from(index)),
                    len: 16,
                }
            };
            driver.write_descriptor(index, span, flags, next);
        }
        for head in 0u16..4 {
            let mut driver = DriverQueue::new(memory.clone(), BASE, 2);
            driver.make_available(head);
            let mut queue = driver.device_side(false);
            let result = queue.pop(&memory, &mut chain);
            match walk(&parts, head) {
                None => assert!(result.is_err(), "{parts:?} {head}"),
                Some(steps) => {
                    assert_eq!(result, Ok(true), "{parts:?} {head}");
                    let expected: Vec<Span> =
                        steps.iter().map(|&i| spans[usize::from(i)]).collect();
                    let mut all = chain.readable.clone();
                    all.extend(&chain.writable);
                    assert_eq!(all, expected, "{parts:?} {head}");
                    taken += 1;
                }
            }
        }
    }
    assert!(taken > 100, "{taken}");
}

/// Returns the descriptors of a valid chain in their order; `None` for any other.
fn walk(parts: &[(u16, u16); 2], head: u16) -> Option<Vec<u16>> {
    let mut steps = Vec::new();
    let (mut index, mut written) = (head, false);
    loop {
        let (flags, next) = *parts.get(usize::from(index))?;
        // An indirect table that holds an indirect descriptor: always itself.
        if flags & INDIRECT != 0 || steps.len() == 2 {
            return None;
        }
        let writes = flags & WRITE != 0;
        if written && !writes {
            return None;
        }
        written = writes;
        steps.push(index);
        if flags & NEXT == 0 {
            return Some(steps);
        }
        index = next;
    }
}

/// virtio-blk's largest request: 254 buffers between header and status.
#[test]
fn an_indirect_table_may_be_as_long_as_the_queue() {
    let memory = memory();
    let mut driver = DriverQueue::new(memory.clone(), BASE, 256);
    let mut queue = driver.device_side(true);
    let part = Span {
        address: GuestAddress(0x100),
        len: 16,
    };
    for (count, sound) in [(256, true), (257, false)] {
        driver
            .offer_indirect(TABLES, &[part], &vec![part; count - 1])
            .unwrap();
        let mut chain = DescriptorChain::new();
        let result = queue.pop(&memory, &mut chain);
        if sound {
            assert_eq!(result, Ok(true));
            assert_eq!(chain.writable.len(), 255);
        } else {
            assert_eq!(result, Err(QueueError::Indirect));
        }
    }
}

/// A driver that offers outstanding chains again could otherwise have any number of
/// requests in flight.
#[test]
fn chains_in_flight_never_exceed_the_queue_size() {
    let memory = memory();
    let mut driver = DriverQueue::new(memory.clone(), BASE, 4);
    let mut queue = driver.device_side(true);
    let mut chain = DescriptorChain::new();
    let part = Span {
        address: GuestAddress(0x100),
        len: 16,
    };
    driver.write_descriptor(0, part, 0, 0);
    for _ in 0..4 {
        driver.make_available(0);
        assert_eq!(queue.pop(&memory, &mut chain), Ok(true));
    }
    driver.make_available(0);
    let again = queue.pop(&memory, &mut chain);
    assert_eq!(again, Err(QueueError::AvailableIndex));
    queue.push_used(&memory, 0, 0).unwrap();
    assert_eq!(queue.pop(&memory, &mut chain), Ok(true));
}

#[test]
fn invalid_queues_are_detected() {
    let memory = memory();
    let driver = DriverQueue::new(memory.clone(), BASE, 8);
    let good = driver.device_side(false);
    assert!(good.is_valid(&memory));
    let change = |change: &dyn Fn(&mut Queue)| {
        let mut queue = good.clone();
        change(&mut queue);
        assert!(!queue.is_valid(&memory), "{queue:?}");
        // Using it nevertheless is an error, not a crash.
        let mut chain = DescriptorChain::new();
        let _ = queue.pop(&memory, &mut chain);
        let _ = queue.push_used(&memory, 0, 0);
        let _ = queue.publish(&memory);
        let _ = queue.request_notification(&memory);
    };
    for size in [0, 3, 16, 0x8000, 0xffff] {
        change(&|queue| queue.size = size);
    }
    for address in [1, 8, LOW - 16, LOW, HIGH - 16, u64::MAX - 15, u64::MAX] {
        change(&|queue| queue.descriptors = address);
    }
    for address in [1, LOW - 2, LOW, u64::MAX - 1, u64::MAX] {
        change(&|queue| queue.available = address);
    }
    for address in [2, LOW - 4, LOW, u64::MAX - 3, u64::MAX] {
        change(&|queue| queue.used = address);
    }
}
