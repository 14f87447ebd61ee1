//! The split virtqueue, device side (virtio 1.3 section 2.7).
//!
//! All contents of a ring come from the driver and are not trusted: every index, address
//! and length is checked, chains are bounded by the queue size (so a loop ends), and an
//! invalid value is an error after which the device needs a reset.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::{ByteValued, Bytes as _, GuestAddress, GuestMemoryBackend as _};

use crate::GuestMemory;

mod state;

pub use self::state::{QueueStateError, QueueStateV1};

/// Length of a descriptor in bytes.
const DESCRIPTOR_LEN: u64 = 16;
/// Largest queue size (virtio 1.3 section 2.7).
pub const MAX_SIZE: u16 = 32768;

/// Fault of a queue.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueError {
    /// A ring lies outside guest memory.
    #[error("a ring lies outside guest memory")]
    Ring,
    /// More chains are outstanding than the queue has descriptors.
    #[error("the available index moved by more than the queue size")]
    AvailableIndex,
    /// A descriptor number is not below the queue size.
    #[error("descriptor {0} does not exist")]
    DescriptorIndex(u16),
    /// A chain has more descriptors than the queue, or contains a cycle.
    #[error("a descriptor chain is longer than the queue")]
    ChainLength,
    /// A buffer lies outside guest memory.
    #[error("a buffer lies outside guest memory")]
    Buffer,
    /// A readable buffer follows a writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// An indirect table is malformed.
    #[error("an indirect descriptor table is malformed")]
    Indirect,
    /// The lengths of a chain add up to more than 4 GiB.
    #[error("the buffers of a chain are longer than 4 GiB")]
    TotalLength,
}

/// A contiguous range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Guest physical address.
    pub address: GuestAddress,
    /// Length in bytes; the range lies within guest memory.
    pub len: u32,
}

/// The buffers of one descriptor chain; reused from chain to chain.
#[derive(Clone, Debug, Default)]
pub struct DescriptorChain {
    head: u16,
    /// Buffers that the device reads.
    pub readable: Vec<Span>,
    /// Buffers that the device writes.
    pub writable: Vec<Span>,
}

impl DescriptorChain {
    /// Returns an empty chain, which [`Queue::pop`] fills.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the chain's first descriptor, which identifies it in the used ring.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Returns the number of bytes that the device may read. Does not overflow: checked by
    /// [`Queue::pop`].
    #[must_use]
    pub fn readable_len(&self) -> u32 {
        self.readable.iter().map(|span| span.len).sum()
    }

    /// Returns the number of bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> u32 {
        self.writable.iter().map(|span| span.len).sum()
    }
}

/// Stores the bytes `skip..skip + len` of `spans` in `out`; returns their number.
pub fn slice_spans(spans: &[Span], skip: u32, len: u32, out: &mut Vec<Span>) -> u32 {
    out.clear();
    let mut skip = skip;
    let mut left = len;
    for span in spans {
        if skip >= span.len {
            skip -= span.len;
            continue;
        }
        let take = (span.len - skip).min(left);
        if take == 0 {
            break;
        }
        out.push(Span {
            address: GuestAddress(span.address.0 + u64::from(skip)),
            len: take,
        });
        left -= take;
        skip = 0;
    }
    len - left
}

/// A descriptor in guest memory. Little-endian, like the host.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[expect(unsafe_code, reason = "declares a structure as plain bytes")]
// SAFETY: repr(C), no padding, every bit pattern is valid.
unsafe impl ByteValued for Descriptor {}

/// A virtqueue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Largest size that the device offers; a power of two.
    pub max_size: u16,
    /// Size that the driver chose; a power of two.
    pub size: u16,
    /// True if the driver has enabled the queue.
    pub ready: bool,
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub available: u64,
    /// Device area (used ring).
    pub used: u64,
    /// True if VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    next_available: u16,
    next_used: u16,
    signalled: u16,
}

impl Queue {
    /// Returns a queue that the driver has not set up.
    #[must_use]
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ..Self::default()
        }
    }

    /// Sets the free-running indices, which start at 0, to `index`.
    #[cfg(any(test, feature = "testing"))]
    pub fn skip_to(&mut self, index: u16) {
        self.next_available = index;
        self.next_used = index;
        self.signalled = index;
    }

    /// Returns true if the driver's set-up is valid: power-of-two size, aligned rings
    /// (virtio 1.3 section 2.7) that lie within guest memory.
    #[must_use]
    pub fn is_valid(&self, memory: &GuestMemory) -> bool {
        let size = u64::from(self.size);
        let within = |address: u64, align: u64, len: u64| {
            address.is_multiple_of(align)
                && usize::try_from(len)
                    .is_ok_and(|len| memory.get_slice(GuestAddress(address), len).is_ok())
        };
        self.size.is_power_of_two()
            && self.size <= self.max_size
            && within(self.descriptors, 16, DESCRIPTOR_LEN * size)
            && within(self.available, 2, 6 + 2 * size)
            && within(self.used, 4, 6 + 8 * size)
    }

    fn load(&self, memory: &GuestMemory, address: u64, order: Ordering) -> Result<u16, QueueError> {
        memory
            .load(GuestAddress(address), order)
            .map(u16::from_le)
            .map_err(|_| QueueError::Ring)
    }

    fn store(&self, memory: &GuestMemory, address: u64, value: u16) -> Result<(), QueueError> {
        memory
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .map_err(|_| QueueError::Ring)
    }

    /// Returns the position of a free-running index in the ring.
    fn slot(&self, index: u16) -> u64 {
        u64::from(index & self.size.wrapping_sub(1))
    }

    // Addresses wrap instead of overflowing: rings of an active device have been checked,
    // and for others an access outside guest memory is an error anyway.

    fn available_index(&self) -> u64 {
        self.available.wrapping_add(2)
    }

    fn available_entry(&self, index: u16) -> u64 {
        self.available.wrapping_add(4 + 2 * self.slot(index))
    }

    /// Returns the address of `used_event`: the driver wants an interrupt after that chain.
    fn used_event(&self) -> u64 {
        self.available.wrapping_add(4 + 2 * u64::from(self.size))
    }

    fn used_index(&self) -> u64 {
        self.used.wrapping_add(2)
    }

    fn used_entry(&self, index: u16) -> u64 {
        self.used.wrapping_add(4 + 8 * self.slot(index))
    }

    /// Returns the address of `avail_event`: the device wants a notification after that
    /// chain.
    fn available_event(&self) -> u64 {
        self.used.wrapping_add(4 + 8 * u64::from(self.size))
    }

    /// Returns the number of chains offered and not yet taken.
    ///
    /// # Errors
    /// A malformed ring.
    pub fn pending(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        if !self.ready || self.size == 0 {
            return Ok(0);
        }
        let index = self.load(memory, self.available_index(), Ordering::Acquire)?;
        // A chain has at least one descriptor, so the number of chains that are offered and
        // not returned is at most the queue size. This also bounds a device's chains in
        // flight.
        let outstanding = index.wrapping_sub(self.next_used);
        let count = index.wrapping_sub(self.next_available);
        if outstanding > self.size || count > outstanding {
            return Err(QueueError::AvailableIndex);
        }
        Ok(count)
    }

    /// Takes the next chain into `chain`; returns `Ok(false)` if there is none, and the
    /// driver will then send a notification with the next one.
    ///
    /// # Errors
    /// A malformed ring or chain; the queue can no longer be used.
    pub fn pop(
        &mut self,
        memory: &GuestMemory,
        chain: &mut DescriptorChain,
    ) -> Result<bool, QueueError> {
        chain.readable.clear();
        chain.writable.clear();
        if self.pending(memory)? == 0 {
            if !self.event_idx || !self.ready {
                return Ok(false);
            }
            // Request a notification of the next chain, then check once more, because the
            // driver may have offered it in between (section 2.7.10.1).
            self.store(memory, self.available_event(), self.next_available)?;
            fence(Ordering::SeqCst);
            if self.pending(memory)? == 0 {
                return Ok(false);
            }
        }
        let entry = self.available_entry(self.next_available);
        let head = self.load(memory, entry, Ordering::Relaxed)?;
        self.walk(memory, head, chain)?;
        chain.head = head;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Returns the chain taken last to the queue, which `pop` then takes again.
    pub fn undo_pop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Requests a notification of the next chain after all those offered now.
    ///
    /// # Errors
    /// A ring outside guest memory.
    pub fn request_notification(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.event_idx && self.ready {
            let pending = self.pending(memory)?;
            let next = self.next_available.wrapping_add(pending);
            self.store(memory, self.available_event(), next)?;
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    fn walk(
        &self,
        memory: &GuestMemory,
        head: u16,
        chain: &mut DescriptorChain,
    ) -> Result<(), QueueError> {
        let mut table = self.descriptors;
        let mut entries = self.size;
        let mut index = head;
        let mut indirect = false;
        let mut total = 0u32;
        let mut left = self.size;
        loop {
            if index >= entries {
                return Err(if indirect {
                    QueueError::Indirect
                } else {
                    QueueError::DescriptorIndex(index)
                });
            }
            left = left.checked_sub(1).ok_or(QueueError::ChainLength)?;
            let address = table.wrapping_add(DESCRIPTOR_LEN * u64::from(index));
            let descriptor: Descriptor = memory
                .read_obj(GuestAddress(address))
                .map_err(|_| QueueError::Ring)?;
            let flags = u32::from(descriptor.flags);
            if flags & VRING_DESC_F_INDIRECT != 0 {
                if indirect || flags & VRING_DESC_F_NEXT != 0 {
                    return Err(QueueError::Indirect);
                }
                (table, entries) = self.indirect_table(memory, &descriptor)?;
                indirect = true;
                index = 0;
                left = entries;
                continue;
            }
            total = total
                .checked_add(descriptor.len)
                .ok_or(QueueError::TotalLength)?;
            add_span(memory, &descriptor, flags, chain)?;
            if flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn indirect_table(
        &self,
        memory: &GuestMemory,
        descriptor: &Descriptor,
    ) -> Result<(u64, u16), QueueError> {
        let len = u64::from(descriptor.len);
        let entries = u16::try_from(len / DESCRIPTOR_LEN).map_err(|_| QueueError::Indirect)?;
        // Drivers that chose a small queue still create tables up to the device's own
        // limits on segments.
        let sound = len.is_multiple_of(DESCRIPTOR_LEN)
            && (1..=self.max_size).contains(&entries)
            && memory
                .get_slice(GuestAddress(descriptor.address), descriptor.len as usize)
                .is_ok();
        if sound {
            Ok((descriptor.address, entries))
        } else {
            Err(QueueError::Indirect)
        }
    }

    /// Returns a chain to the driver with `len` bytes written. The driver sees it after
    /// [`Self::publish`].
    ///
    /// # Errors
    /// A used ring outside guest memory.
    pub fn push_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        let entry = self.used_entry(self.next_used);
        let element = u64::from(head) | u64::from(len) << 32;
        memory
            .write_obj(element.to_le(), GuestAddress(entry))
            .map_err(|_| QueueError::Ring)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Makes the returned chains visible; returns true if the driver wants an interrupt for
    /// them (section 2.7.10).
    ///
    /// # Errors
    /// A ring outside guest memory.
    pub fn publish(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let old = self.signalled;
        let new = self.next_used;
        if old == new {
            return Ok(false);
        }
        self.store(memory, self.used_index(), new)?;
        self.signalled = new;
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(memory, self.used_event(), Ordering::Relaxed)?;
            // True if `event` is one of the chains published just now.
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        let flags = self.load(memory, self.available, Ordering::Relaxed)?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

fn add_span(
    memory: &GuestMemory,
    descriptor: &Descriptor,
    flags: u32,
    chain: &mut DescriptorChain,
) -> Result<(), QueueError> {
    let address = GuestAddress(descriptor.address);
    if memory.get_slice(address, descriptor.len as usize).is_err() {
        return Err(QueueError::Buffer);
    }
    let span = Span {
        address,
        len: descriptor.len,
    };
    if flags & VRING_DESC_F_WRITE != 0 {
        chain.writable.push(span);
    } else if chain.writable.is_empty() {
        chain.readable.push(span);
    } else {
        return Err(QueueError::Order);
    }
    Ok(())
}
