//! Bytes that host sockets do not accept immediately, stored in chunks of a common pool.
//!
//! Architecture invariants: an empty backlog has no chunk; filling and emptying backlogs
//! allocates nothing once the pool has reached its largest size; bytes are copied in once
//! and never moved.

use std::io::IoSlice;

use sm_virtio::GuestMemory;
use vm_memory::{Bytes as _, GuestAddress};

/// Length of a chunk in bytes.
const LEN: u32 = 4096;
/// Length of a chunk in bytes.
pub(crate) const CHUNK: usize = LEN as usize;
/// Maximum number of unused chunks with memory: 1 MiB.
const SPARE: usize = 256;
/// Number that stands for no chunk.
const NONE: u32 = u32::MAX;

struct Slot {
    /// `None` if its memory was freed.
    bytes: Option<Box<[u8]>>,
    next: u32,
}

/// The chunks of all backlogs.
#[derive(Default)]
pub(crate) struct ChunkPool {
    slots: Vec<Slot>,
    /// Free slots, with memory and without.
    spare: Vec<u32>,
    freed: Vec<u32>,
}

impl ChunkPool {
    fn take(&mut self) -> u32 {
        let slot = self.spare.pop().or_else(|| self.freed.pop());
        let slot = slot.unwrap_or_else(|| {
            self.slots.push(Slot {
                bytes: None,
                next: NONE,
            });
            // Fewer than 2^32: their bytes are limited by the sum of all windows.
            u32::try_from(self.slots.len() - 1).unwrap_or(NONE)
        });
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            slot.next = NONE;
            slot.bytes
                .get_or_insert_with(|| vec![0; CHUNK].into_boxed_slice());
        }
        slot
    }

    fn release(&mut self, index: u32) {
        if self.spare.len() < SPARE {
            self.spare.push(index);
        } else if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.bytes = None;
            self.freed.push(index);
        }
    }

    fn next(&self, index: u32) -> u32 {
        self.slots
            .get(index as usize)
            .map_or(NONE, |slot| slot.next)
    }

    fn bytes(&self, index: u32) -> &[u8] {
        let slot = self.slots.get(index as usize);
        slot.and_then(|slot| slot.bytes.as_deref()).unwrap_or(&[])
    }

    /// Returns the number of chunks in use.
    #[cfg(test)]
    fn used(&self) -> usize {
        self.slots.len() - self.spare.len() - self.freed.len()
    }
}

/// Stored bytes of one connection, first in, first out. [`Backlog::clear`] returns its
/// chunks to the pool.
#[derive(Debug)]
pub(crate) struct Backlog {
    first: u32,
    last: u32,
    /// Start in the first chunk, and end in the last.
    start: u32,
    end: u32,
    len: u32,
}

impl Default for Backlog {
    fn default() -> Self {
        Self {
            first: NONE,
            last: NONE,
            start: 0,
            end: 0,
            len: 0,
        }
    }
}

impl Backlog {
    #[cfg(test)]
    fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends guest memory; returns false if it cannot be read.
    #[must_use]
    pub(crate) fn push(
        &mut self,
        pool: &mut ChunkPool,
        memory: &GuestMemory,
        address: GuestAddress,
        len: u32,
    ) -> bool {
        let mut done = 0;
        while done < len {
            if self.last == NONE || self.end as usize == CHUNK {
                self.append_chunk(pool);
            }
            let slot = pool.slots.get_mut(self.last as usize);
            let bytes = slot.and_then(|slot| slot.bytes.as_deref_mut());
            let free = bytes.and_then(|bytes| bytes.get_mut(self.end as usize..));
            let free = free.unwrap_or_default();
            let now = (len - done).min(u32::try_from(free.len()).unwrap_or(0));
            let from = GuestAddress(address.0 + u64::from(done));
            let free = free.get_mut(..now as usize).unwrap_or_default();
            if now == 0 || memory.read_slice(free, from).is_err() {
                return false;
            }
            done += now;
            self.end += now;
            self.len += now;
        }
        true
    }

    fn append_chunk(&mut self, pool: &mut ChunkPool) {
        let chunk = pool.take();
        match pool.slots.get_mut(self.last as usize) {
            Some(last) => last.next = chunk,
            None => (self.first, self.start) = (chunk, 0),
        }
        (self.last, self.end) = (chunk, 0);
    }

    /// Stores the first bytes, at most `most`, in `slices`, as far as there are slices;
    /// returns the number of slices used.
    pub(crate) fn slices<'a>(
        &self,
        pool: &'a ChunkPool,
        most: u32,
        slices: &mut [IoSlice<'a>],
    ) -> usize {
        let mut left = most.min(self.len) as usize;
        let (mut chunk, mut start) = (self.first, self.start as usize);
        let mut count = 0;
        for slice in slices {
            if left == 0 {
                break;
            }
            let bytes = pool.bytes(chunk).get(start..).unwrap_or_default();
            let bytes = bytes.get(..left.min(bytes.len())).unwrap_or_default();
            *slice = IoSlice::new(bytes);
            left -= bytes.len();
            count += 1;
            (chunk, start) = (pool.next(chunk), 0);
        }
        count
    }

    /// Removes the first `count` bytes.
    pub(crate) fn consume(&mut self, pool: &mut ChunkPool, count: u32) {
        let mut left = count.min(self.len);
        self.len -= left;
        while self.first != NONE {
            let is_last = self.first == self.last;
            let end = if is_last { self.end } else { LEN };
            let here = left.min(end - self.start);
            self.start += here;
            left -= here;
            if self.start < end || (is_last && self.len > 0) {
                return;
            }
            let next = pool.next(self.first);
            pool.release(self.first);
            self.start = 0;
            if is_last {
                *self = Self::default();
                return;
            }
            self.first = next;
        }
    }

    /// Removes all bytes; returns their number.
    pub(crate) fn clear(&mut self, pool: &mut ChunkPool) -> u32 {
        let len = self.len;
        self.consume(pool, len);
        len
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn content(backlog: &Backlog, pool: &ChunkPool) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 32];
        let count = backlog.slices(pool, u32::MAX, &mut slices);
        slices[..count]
            .iter()
            .flat_map(|slice| slice.to_vec())
            .collect()
    }

    proptest! {
        #[test]
        fn two_backlogs_separate_their_bytes_and_preserve_order(
            steps in prop::collection::vec((any::<bool>(), any::<bool>(), 0u32..9000), 0..60),
        ) {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
            let pattern: Vec<u8> = (0..1u32 << 16).map(|n| (n % 253) as u8).collect();
            memory.write_slice(&pattern, GuestAddress(0)).unwrap();
            let mut pool = ChunkPool::default();
            let mut real = [Backlog::default(), Backlog::default()];
            let mut model = [VecDeque::new(), VecDeque::new()];
            for (second, push, amount) in steps {
                let which = usize::from(second);
                let (backlog, model) = (&mut real[which], &mut model[which]);
                if push && model.len() < 40_000 {
                    let from = u64::from(amount * 7 % 50_000);
                    prop_assert!(backlog.push(&mut pool, &memory, GuestAddress(from), amount));
                    let from = usize::try_from(from).unwrap();
                    model.extend(&pattern[from..from + amount as usize]);
                } else {
                    backlog.consume(&mut pool, amount);
                    model.drain(..model.len().min(amount as usize));
                }
                prop_assert_eq!(backlog.len() as usize, model.len());
                prop_assert_eq!(content(backlog, &pool), Vec::from(model.clone()));
                // The share of a connection is sufficient for it.
                let most = real.iter().map(|b| (b.len() as usize).div_ceil(CHUNK) + 1).sum();
                prop_assert!(pool.used() <= most);
            }
            real.iter_mut().for_each(|backlog| { backlog.clear(&mut pool); });
            prop_assert_eq!(pool.used(), 0);
        }
    }

    #[test]
    fn memory_beyond_a_reserve_is_freed() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let mut pool = ChunkPool::default();
        let mut backlog = Backlog::default();
        for _ in 0..2 * SPARE {
            assert!(backlog.push(&mut pool, &memory, GuestAddress(0), LEN));
        }
        assert_eq!(backlog.clear(&mut pool) as usize, 2 * SPARE * CHUNK);
        let kept = pool.slots.iter().filter(|slot| slot.bytes.is_some());
        assert_eq!(kept.count(), SPARE);
        assert!(backlog.is_empty());
    }
}
