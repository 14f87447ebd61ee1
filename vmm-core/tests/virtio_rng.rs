//! The entropy device, accessed as by a driver.

use std::sync::{Arc, Mutex};

use sm_event_loop::EventLoop;
use sm_virtio::GuestMemory;
use sm_virtio::queue::Span;
use sm_virtio::testing::Driver;
use sm_vmm_core::virtio::rng::Rng;
use vm_memory::{Bytes as _, GuestAddress};

const BASE: u64 = 0x1_0000;

fn span(address: u64, len: u32) -> Span {
    Span {
        address: GuestAddress(address),
        len,
    }
}

#[test]
fn entropy_arrives_in_bounded_and_distinct_portions() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let event_loop = EventLoop::spawn("test").unwrap();
    let device = Arc::new(Mutex::new(Rng::new()));
    let driver = Driver::new(device, &memory, event_loop.handle());
    let mut queue = driver.start(BASE, &[64]).remove(0);
    let mut seen = Vec::new();
    // A single buffer, several, one that is too long, an empty one.
    for (lens, expected) in [
        (&[64][..], 64),
        (&[3, 0, 61, 8], 72),
        (&[4096], 256),
        (&[0], 0),
    ] {
        let mut at = 0x1000;
        let spans: Vec<Span> = lens
            .iter()
            .map(|&len| {
                at += 0x100;
                span(at, len)
            })
            .collect();
        let head = queue.offer(&[], &spans).unwrap();
        driver.notify(0);
        assert_eq!(driver.wait_used(&mut queue), (head, expected));
        if expected >= 64 {
            let mut first = [0; 3];
            memory.read_slice(&mut first, spans[0].address).unwrap();
            let mut last = [0; 8];
            let end = spans.last().unwrap();
            memory.read_slice(&mut last, end.address).unwrap();
            seen.push(last);
        }
    }
    seen.sort_unstable();
    seen.dedup();
    // Equal by chance once in 2^60.
    assert_eq!(seen.len(), 3);
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(0x1100 + 256)).unwrap(),
        0,
        "nothing is written past the portion"
    );
}

/// More requests than one slice: the rest is served without a further notification.
#[test]
fn a_full_queue_is_served_to_the_end() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let event_loop = EventLoop::spawn("test").unwrap();
    let device = Arc::new(Mutex::new(Rng::new()));
    let driver = Driver::new(device, &memory, event_loop.handle());
    let mut queue = driver.start(BASE, &[64]).remove(0);
    for _ in 0..10 {
        let mut offered = 0;
        while queue.offer(&[], &[span(0x1000, 16)]).is_some() {
            offered += 1;
        }
        assert_eq!(offered, 64);
        driver.notify(0);
        for _ in 0..64 {
            assert_eq!(driver.wait_used(&mut queue).1, 16);
        }
    }
}
