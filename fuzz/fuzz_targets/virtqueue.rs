//! Arbitrary contents of a ring: chains are within guest memory and finite.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sm_virtio::GuestMemory;
use sm_virtio::queue::DescriptorChain;
use sm_virtio::testing::DriverQueue;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

const MEMORY: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let [size, event_idx, contents @ ..] = data else {
        return;
    };
    let ranges = [(GuestAddress(0), MEMORY), (GuestAddress(1 << 32), MEMORY)];
    let memory = GuestMemory::from_ranges(&ranges).expect("memory can be had");
    let contents = &contents[..contents.len().min(MEMORY)];
    memory
        .write_slice(contents, GuestAddress(0))
        .expect("it fits");
    let size = 1 << (size % 9);
    let mut queue = DriverQueue::new(memory.clone(), 0, size).device_side(event_idx % 2 == 1);
    assert!(queue.is_valid(&memory));
    let mut chain = DescriptorChain::new();
    // The contents may offer any number of chains.
    for _ in 0..1024 {
        let Ok(true) = queue.pop(&memory, &mut chain) else {
            break;
        };
        let total = u64::from(chain.readable_len()) + u64::from(chain.writable_len());
        assert!(total <= u64::from(u32::MAX));
        assert!(chain.readable.len() + chain.writable.len() <= 2 * usize::from(size));
        for span in chain.readable.iter().chain(&chain.writable) {
            assert!(memory.get_slice(span.address, span.len as usize).is_ok());
        }
        let _ = queue.push_used(&memory, chain.head(), 0);
        let _ = queue.publish(&memory);
    }
});
