//! Arbitrary accesses to a device's MMIO window, and arbitrary rings: after a reset, the
//! device works.
#![no_main]

use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use sm_event_loop::EventLoop;
use sm_virtio::GuestMemory;
use sm_virtio::queue::Span;
use sm_virtio::testing::Driver;
use sm_vmm_core::virtio::rng::Rng;
use vm_memory::{Bytes as _, GuestAddress};

static LOOP: LazyLock<EventLoop> =
    LazyLock::new(|| EventLoop::spawn("fuzz").expect("a thread can be had"));
const MEMORY: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let device = Arc::new(Mutex::new(Rng::new()));
    let driver = Driver::new(device, &memory, LOOP.handle());
    for access in data.chunks_exact(8) {
        let &[kind, offset, high, len, ref value @ ..] = access else {
            return;
        };
        let offset = u64::from(offset) | u64::from(high & 1) << 8;
        match kind % 4 {
            0 => driver
                .transport
                .read(offset, &mut vec![0; usize::from(len % 9)]),
            1 => driver
                .transport
                .write(offset, &value[..usize::from(len % 5)]),
            2 => driver.transport.write(offset & !3, value),
            _ => {
                let at = u64::from(u16::from_le_bytes([offset.to_le_bytes()[0], len]));
                let _ = memory.write_slice(value, GuestAddress(at));
            }
        }
    }
    driver.reset();
    let mut queue = driver.start(0x8000, &[8]).remove(0);
    let buffer = Span {
        address: GuestAddress(0x100),
        len: 64,
    };
    let head = queue.offer(&[], &[buffer]).expect("a free descriptor");
    driver.notify(0);
    assert_eq!(driver.wait_used(&mut queue), (head, 64));
});
