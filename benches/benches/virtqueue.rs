//! Popping chains from a virtqueue and returning them, beside the same work with the
//! `virtio-queue` crate. One iteration is a batch: the driver offers chains, the device
//! pops and returns all, and publishes once.
#![expect(clippy::unwrap_used, reason = "a bench on data of its own making")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sm_virtio::GuestMemory;
use sm_virtio::queue::{DescriptorChain, Queue, Span};
use sm_virtio::testing::DriverQueue;
use virtio_queue::{Queue as Reference, QueueT as _};
use vm_memory::GuestAddress;

const SIZE: u16 = 256;
const BASE: u64 = 0x1_0000;
const TABLES: u64 = 0x10_0000;
const BATCH: u16 = 32;

/// The driver's layout of a chain: header, data, status, as for a block read.
#[derive(Clone, Copy)]
enum Layout {
    Direct,
    Indirect,
}

/// A ring with a batch of chains that are offered repeatedly without the driver's work:
/// only the available index moves.
struct Ring {
    memory: GuestMemory,
    driver: DriverQueue,
    index: u16,
}

impl Ring {
    fn new(layout: Layout) -> Self {
        // Two regions, as in machines of more than 3 GiB.
        let ranges = [
            (GuestAddress(0), 64 << 20),
            (GuestAddress(1 << 32), 64 << 20),
        ];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        let mut driver = DriverQueue::new(memory.clone(), BASE, SIZE);
        let span = |address, len| Span {
            address: GuestAddress(address),
            len,
        };
        let readable = [span(0x20_0000, 16)];
        let writable = [
            span(0x30_0000, 4096),
            span(1 << 32, 4096),
            span(0x20_1000, 1),
        ];
        // Every entry of the ring names a chain, so that a batch can start anywhere.
        let mut heads = Vec::new();
        for slot in 0..SIZE {
            if driver.free() < 4 {
                driver.make_available(heads[usize::from(slot) % heads.len()]);
                continue;
            }
            let table = TABLES + 64 * u64::from(slot);
            let head = match layout {
                Layout::Direct => driver.offer(&readable, &writable),
                Layout::Indirect => driver.offer_indirect(table, &readable, &writable),
            };
            heads.push(head.unwrap());
        }
        driver.set_available_index(0);
        Self {
            memory,
            driver,
            index: 0,
        }
    }

    fn offer(&mut self) {
        self.index = self.index.wrapping_add(BATCH);
        self.driver.set_available_index(self.index);
    }
}

fn ours(memory: &GuestMemory, queue: &mut Queue, chain: &mut DescriptorChain) -> bool {
    while queue.pop(memory, chain).unwrap() {
        let mut len = 0;
        for span in &chain.readable {
            black_box(span);
        }
        for span in &chain.writable {
            len += black_box(span).len;
        }
        queue.push_used(memory, chain.head(), len).unwrap();
    }
    queue.publish(memory).unwrap()
}

fn theirs(memory: &GuestMemory, queue: &mut Reference) -> bool {
    loop {
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let mut len = 0;
            for descriptor in chain {
                if black_box(&descriptor).is_write_only() {
                    len += descriptor.len();
                }
            }
            queue.add_used(memory, head, len).unwrap();
        }
        if !queue.enable_notification(memory).unwrap() {
            return queue.needs_notification(memory).unwrap();
        }
    }
}

fn virtqueue(c: &mut Criterion) {
    let mut group = c.benchmark_group("virtqueue");
    group.throughput(Throughput::Elements(BATCH.into()));
    for (name, layout) in [("direct", Layout::Direct), ("indirect", Layout::Indirect)] {
        group.bench_function(BenchmarkId::new("ours", name), |b| {
            let mut ring = Ring::new(layout);
            let mut queue = ring.driver.device_side(true);
            let mut chain = DescriptorChain::new();
            b.iter(|| {
                ring.offer();
                ours(&ring.memory, &mut queue, &mut chain)
            });
        });
        group.bench_function(BenchmarkId::new("virtio-queue", name), |b| {
            let mut ring = Ring::new(layout);
            let [descriptors, available, used] = ring.driver.addresses().map(|address| {
                let low = u32::try_from(address).unwrap();
                (Some(low), Some(0))
            });
            let mut queue = Reference::new(SIZE).unwrap();
            queue.set_size(SIZE);
            queue.set_desc_table_address(descriptors.0, descriptors.1);
            queue.set_avail_ring_address(available.0, available.1);
            queue.set_used_ring_address(used.0, used.1);
            queue.set_event_idx(true);
            queue.set_ready(true);
            b.iter(|| {
                ring.offer();
                theirs(&ring.memory, &mut queue)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, virtqueue);
criterion_main!(benches);
