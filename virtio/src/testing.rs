//! The driver side of queues and of the transport, for tests of devices without a guest.

#![expect(
    clippy::expect_used,
    reason = "test support: a failed expectation is a failed test"
)]

mod driver;

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes as _, GuestAddress};

use crate::GuestMemory;
use crate::queue::{Queue, Span};

pub use driver::{Driver, TestLine};

/// Descriptor flag: the chain continues.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// The driver's view of a split virtqueue in guest memory.
#[derive(Debug)]
pub struct DriverQueue {
    memory: GuestMemory,
    size: u16,
    base: u64,
    free: Vec<u16>,
    /// For the head of each chain in use, its number of descriptors; and for each
    /// descriptor in use, its successor in the chain.
    lens: Vec<u16>,
    following: Vec<u16>,
    available: u16,
    /// Available index at the last notification of the device.
    kicked: u16,
    used: u16,
}

impl DriverQueue {
    /// Creates a queue of `size` at `base`, which must be 16-byte aligned.
    #[must_use]
    pub fn new(memory: GuestMemory, base: u64, size: u16) -> Self {
        Self {
            memory,
            size,
            base,
            free: (0..size).rev().collect(),
            lens: vec![0; usize::from(size)],
            following: vec![0; usize::from(size)],
            available: 0,
            kicked: 0,
            used: 0,
        }
    }

    /// Returns the bytes of guest memory that a queue of `size` takes.
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

    /// Returns the device's view of this queue.
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

    /// Returns the number of free descriptors.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Offers a chain; returns `None` if there are too few free descriptors.
    pub fn offer(&mut self, readable: &[Span], writable: &[Span]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || self.free.len() < count {
            return None;
        }
        let all = readable
            .iter()
            .map(|span| (span, 0))
            .chain(writable.iter().map(|span| (span, WRITE)));
        let head = *self.free.last()?;
        for (left, (span, flags)) in (0..count).rev().zip(all) {
            let index = self.free.pop()?;
            let next = self.free.last().copied().filter(|_| left > 0);
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(index, *span, flags, next.unwrap_or(0));
            self.following[usize::from(index)] = next.unwrap_or(0);
        }
        self.lens[usize::from(head)] = u16::try_from(count).expect("below the queue size");
        self.make_available(head);
        Some(head)
    }

    /// Offers a chain in an indirect table at `table`, which takes 16 bytes for each span;
    /// returns `None` if there is no free descriptor.
    pub fn offer_indirect(
        &mut self,
        table: u64,
        readable: &[Span],
        writable: &[Span],
    ) -> Option<u16> {
        let count = readable.len() + writable.len();
        let head = self.free.pop()?;
        let all = readable
            .iter()
            .map(|span| (span, 0))
            .chain(writable.iter().map(|span| (span, WRITE)));
        for ((index, at), (span, flags)) in (1u16..).zip((table..).step_by(16)).zip(all) {
            let last = usize::from(index) == count;
            let (flags, next) = if last {
                (flags, 0)
            } else {
                (flags | NEXT, index)
            };
            write_descriptor(&self.memory, at, *span, flags, next);
        }
        let whole = Span {
            address: GuestAddress(table),
            len: u32::try_from(16 * count).expect("a table is small"),
        };
        self.write_descriptor(head, whole, INDIRECT, 0);
        self.lens[usize::from(head)] = 1;
        self.make_available(head);
        Some(head)
    }

    /// Writes descriptor `index` without any check, for invalid rings.
    pub fn write_descriptor(&self, index: u16, span: Span, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        write_descriptor(&self.memory, at, span, flags, next);
    }

    /// Offers the chain that starts at `head`, without any check.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.put(self.available_ring() + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        // The index follows the entries that it makes visible.
        fence(Ordering::Release);
        self.put(self.available_ring() + 2, self.available);
    }

    /// Moves the available index without offering a chain.
    pub fn set_available_index(&self, index: u16) {
        self.put(self.available_ring() + 2, index);
    }

    /// Returns the addresses of descriptors, available ring and used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.available_ring(), self.used_ring()]
    }

    /// Returns the queue's size.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Sets the free-running indices, which start at 0, to `index`.
    pub fn skip_to(&mut self, index: u16) {
        self.available = index;
        self.kicked = index;
        self.used = index;
        self.put(self.available_ring() + 2, index);
        self.put(self.used_ring() + 2, index);
    }

    /// Returns true if the device wants a notification of the chains offered since
    /// [`Self::kicked`], with event indices (virtio 1.3 section 2.7.10).
    #[must_use]
    pub fn needs_kick(&self) -> bool {
        let (new, old) = (self.available, self.kicked);
        let event = self.available_event();
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Returns the number of chains offered since [`Self::kicked`].
    #[must_use]
    pub fn offered_since_kick(&self) -> u16 {
        self.available.wrapping_sub(self.kicked)
    }

    /// Records that the device has been notified, or need not be.
    pub fn kicked(&mut self) {
        self.kicked = self.available;
    }

    /// Returns the same driver on a copy of its memory.
    #[must_use]
    pub fn moved_to(self, memory: GuestMemory) -> Self {
        Self { memory, ..self }
    }

    /// Resets the queue, as after a reset of the device.
    pub fn clear(&mut self) {
        *self = Self::new(self.memory.clone(), self.base, self.size);
        self.put(self.available_ring() + 2, 0u16);
        self.put(self.used_ring() + 2, 0u16);
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

    /// Takes the next returned chain: its head and the number of bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.get(self.used_ring() + 2);
        if index == self.used {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = u64::from(self.used % self.size);
        let head: u32 = self.get(self.used_ring() + 4 + 8 * slot);
        let len: u32 = self.get(self.used_ring() + 8 + 8 * slot);
        self.used = self.used.wrapping_add(1);
        let head = u16::try_from(head).expect("the device names a chain that was offered");
        let count = std::mem::take(&mut self.lens[usize::from(head)]);
        assert!(count > 0, "chain {head} was not in use");
        let mut index = head;
        for _ in 0..count {
            self.free.push(index);
            index = self.following[usize::from(index)];
        }
        Some((head, len))
    }

    /// Requests an interrupt after the next chain, with event indices.
    pub fn set_used_event(&mut self) {
        self.put(
            self.available_ring() + 4 + 2 * u64::from(self.size),
            self.used,
        );
    }

    /// Returns the available index at which the device wants a notification.
    #[must_use]
    pub fn available_event(&self) -> u16 {
        self.get(self.used_ring() + 4 + 8 * u64::from(self.size))
    }
}

fn write_descriptor(memory: &GuestMemory, at: u64, span: Span, flags: u16, next: u16) {
    let word = u64::from(span.len) | u64::from(flags) << 32 | u64::from(next) << 48;
    for (at, value) in [(at, span.address.0), (at + 8, word)] {
        memory
            .write_obj(value.to_le(), GuestAddress(at))
            .expect("the table lies in guest memory");
    }
}
