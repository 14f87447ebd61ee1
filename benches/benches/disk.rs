//! Reading and writing disks of layers, beside a raw file of the same contents. Everything
//! is in the page cache, so the difference is the work of this program.
//!
//! With eight layers, each layer has every eighth cluster: no two neighbours come from the
//! same file, which is the worst case.
#![expect(clippy::unwrap_used, reason = "a bench on data of its own making")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::Span;
use sm_vmm_core::virtio::disk::Disk;
use sm_vmm_core::virtio::layered::{CLUSTER, DiskLayer, LayeredDisk};
use vm_memory::GuestAddress;

const CAPACITY: u64 = 256 << 20;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

fn span(len: u32) -> [Span; 1] {
    let address = GuestAddress(0);
    [Span { address, len }]
}

fn raw(memory: &GuestMemory) -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(CAPACITY).unwrap();
    let disk = Disk::raw(file, false).unwrap();
    let all = span(1 << 20);
    for offset in (0..CAPACITY).step_by(1 << 20) {
        let window = Window::new(&all, 0, u32::MAX);
        disk.write(memory, window, offset).unwrap();
    }
    disk
}

/// A disk whose cluster number n is in layer n modulo `layers`.
fn layered(memory: &GuestMemory, layers: u8) -> Disk {
    let file = || tempfile::tempfile().unwrap();
    let one = span(4096);
    let fill = |disk: &LayeredDisk, number: u8| {
        let start = u64::from(number - 1) * CLUSTER;
        for offset in (start..CAPACITY).step_by(usize::from(layers) * 4096) {
            let window = Window::new(&one, 0, u32::MAX);
            disk.write(memory, window, offset).unwrap();
        }
    };
    let layer = DiskLayer::create(file(), [1; 16], None, CAPACITY).unwrap();
    let mut disk = LayeredDisk::new(vec![layer]).unwrap();
    fill(&disk, 1);
    for number in 2..=layers {
        disk = disk.freeze(file(), [number; 16], CAPACITY).unwrap();
        fill(&disk, number);
    }
    Disk::layered(disk)
}

/// Offsets all over the disk, in no order.
fn scattered(len: u64) -> impl Iterator<Item = u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (CAPACITY / len) * len
    })
}

fn disks(criterion: &mut Criterion) {
    let memory = memory();
    let memory = &memory;
    for (name, len) in [("4k", 4096u32), ("1m", 1 << 20)] {
        let spans = span(len);
        let mut group = criterion.benchmark_group(format!("disk/{name}"));
        group.throughput(Throughput::Bytes(len.into()));
        let subjects = [
            ("raw", raw(memory)),
            ("1 layer", layered(memory, 1)),
            ("8 layers", layered(memory, 8)),
        ];
        for (subject, disk) in &subjects {
            let mut offsets = scattered(len.into());
            group.bench_function(BenchmarkId::new("read", subject), |bencher| {
                bencher.iter(|| {
                    let window = Window::new(&spans, 0, u32::MAX);
                    let offset = offsets.next().unwrap();
                    assert!(disk.read_cached(memory, window, offset).unwrap());
                });
            });
        }
        // Writes last: they bring every cluster into the top layer.
        for (subject, disk) in &subjects {
            let mut offsets = scattered(len.into());
            group.bench_function(BenchmarkId::new("write", subject), |bencher| {
                bencher.iter(|| {
                    let window = Window::new(&spans, 0, u32::MAX);
                    disk.write(memory, window, offsets.next().unwrap()).unwrap();
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, disks);
criterion_main!(benches);
