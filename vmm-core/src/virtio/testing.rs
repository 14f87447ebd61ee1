//! A driver's side of a queue, for tests of devices without a guest.

#![expect(
    clippy::expect_used,
    reason = "test support: a failed expectation is a failed test"
)]

use vm_memory::{Bytes as _, GuestAddress};

use super::queue::{Queue, Span};
use crate::GuestMemory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A split virtqueue as its driver sees it, laid out in guest memory.
#[derive(Debug)]
pub struct DriverQueue {
    memory: GuestMemory,
    size: u16,
    base: u64,
    free: Vec<u16>,
    /// Descriptors of each chain in use, by head.
    chains: Vec<Vec<u16>>,
    available: u16,
    used: u16,
}

impl DriverQueue {
    /// Lays a queue of `size` out at `base`, which must be 16-byte aligned.
    #[must_use]
    pub fn new(memory: GuestMemory, base: u64, size: u16) -> Self {
        Self {
            memory,
            size,
            base,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            available: 0,
            used: 0,
        }
    }

    /// Bytes of guest memory that a queue of `size` takes.
    #[must_use]
    pub fn footprint(size: u16) -> u64 {
        let size = u64::from(size);
        (16 * size + 6 + 2 * size).next_multiple_of(4) + 6 + 8 * size
    }

    fn available_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.available_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The device's view of this queue.
    #[must_use]
    pub fn device_side(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size);
        queue.ready = true;
        queue.descriptors = self.base;
        queue.available = self.available_ring();
        queue.used = self.used_ring();
        queue.event_idx = event_idx;
        queue
    }

    /// Number of descriptors that are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Offers a chain; `None` when there are too few free descriptors.
    pub fn offer(&mut self, readable: &[Span], writable: &[Span]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || self.free.len() < count {
            return None;
        }
        let taken = self.free.split_off(self.free.len() - count);
        let all = readable
            .iter()
            .map(|span| (span, 0))
            .chain(writable.iter().map(|span| (span, WRITE)));
        for (position, (span, flags)) in all.enumerate() {
            let next = taken.get(position + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let at = self.base + 16 * u64::from(taken[position]);
            let words = (
                span.address.0,
                u64::from(span.len) | u64::from(flags) << 32 | u64::from(next.unwrap_or(0)) << 48,
            );
            self.put(at, words.0);
            self.put(at + 8, words.1);
        }
        let head = taken[0];
        self.chains[usize::from(head)] = taken;
        let slot = u64::from(self.available % self.size);
        self.put(self.available_ring() + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        self.put(self.available_ring() + 2, self.available);
        Some(head)
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory
            .write_obj(value, GuestAddress(at))
            .expect("the queue lies in guest memory");
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory
            .read_obj(GuestAddress(at))
            .expect("the queue lies in guest memory")
    }

    /// Takes the next chain handed back: its head and the bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.get(self.used_ring() + 2);
        if index == self.used {
            return None;
        }
        let slot = u64::from(self.used % self.size);
        let head: u32 = self.get(self.used_ring() + 4 + 8 * slot);
        let len: u32 = self.get(self.used_ring() + 8 + 8 * slot);
        self.used = self.used.wrapping_add(1);
        let head = u16::try_from(head).expect("the device names a chain that was offered");
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!chain.is_empty(), "chain {head} was not in use");
        self.free.extend(chain);
        Some((head, len))
    }

    /// Asks for an interrupt after the next chain, with event indices.
    pub fn set_used_event(&mut self) {
        self.put(
            self.available_ring() + 4 + 2 * u64::from(self.size),
            self.used,
        );
    }

    /// The available index at which the device wants to be notified.
    #[must_use]
    pub fn available_event(&self) -> u16 {
        self.get(self.used_ring() + 4 + 8 * u64::from(self.size))
    }
}
