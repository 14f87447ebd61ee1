//! The table of memory slots, which maps guest addresses to host memory.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A mapped region, without its pointer type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) guest_address: u64,
    pub(super) host_address: u64,
    pub(super) len: u64,
}

/// All regions of a VM by slot number.
#[derive(Debug, Default)]
pub(super) struct Slots {
    regions: Vec<Slot>,
}

/// Shared by the VM and its vCPUs, which read guest memory to explain a fault. KVM's own
/// table is changed with the lock held, so that both agree.
#[derive(Debug, Default)]
pub(super) struct SlotTable(Mutex<Slots>);

impl SlotTable {
    pub(super) fn lock(&self) -> MutexGuard<'_, Slots> {
        // No code panics while it changes the table.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// Returns the number for the next region; `None` if there are no more.
    pub(super) fn next(&self) -> Option<u32> {
        u32::try_from(self.regions.len()).ok()
    }

    /// Adds a region under the next number.
    pub(super) fn push(&mut self, slot: Slot) {
        self.regions.push(slot);
    }

    /// Copies guest memory starting at guest physical `address`, up to the end of the
    /// region that contains it; returns the number of bytes.
    pub(super) fn read(&self, address: u64, to: &mut [u8]) -> usize {
        let holds = |slot: &&Slot| {
            address
                .checked_sub(slot.guest_address)
                .is_some_and(|offset| offset < slot.len)
        };
        let Some(slot) = self.regions.iter().find(holds) else {
            return 0;
        };
        let offset = address - slot.guest_address;
        let len = usize::try_from(slot.len - offset)
            .unwrap_or(usize::MAX)
            .min(to.len());
        for (from, byte) in (slot.host_address + offset..).zip(&mut to[..len]) {
            #[expect(unsafe_code, reason = "reads memory that belongs to the guest")]
            // SAFETY: the caller of `map_memory` keeps the region mapped until the VM and
            // its vCPUs, which share the table, are dropped; volatile, because the guest
            // may be writing.
            let value = unsafe { std::ptr::read_volatile(from as *const u8) };
            *byte = value;
        }
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_end_of_a_region() {
        let memory = [7_u8; 16];
        let mut slots = Slots::default();
        slots.push(Slot {
            guest_address: 0x1000,
            host_address: memory.as_ptr() as u64,
            len: 16,
        });
        let mut bytes = [0; 8];
        assert_eq!(slots.read(0x1008, &mut bytes), 8);
        assert_eq!(slots.read(0x100e, &mut bytes), 2);
        assert_eq!(slots.read(0x1010, &mut bytes), 0);
        assert_eq!(slots.read(0xfff, &mut bytes), 0);
        assert_eq!(slots.next(), Some(1), "numbers are not used again");
    }
}
