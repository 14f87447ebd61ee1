//! Bytes of flows, stored in chunks of a common pool.
//!
//! A flow has two queues: bytes of the guest that its host socket does not accept yet, and
//! bytes of the host that the guest has not acknowledged yet.
//!
//! **Shares.** A queue may have at most a quarter of what is free, as in switches with common
//! buffers ("dynamic thresholds", Choudhury and Hahne 1998). One chunk is certain for each
//! queue with a reservation, so that queues that nobody empties cannot stop others.
//!
//! Architecture invariants: an empty queue has no chunk; the pool never has more chunks than
//! its limit; filling and emptying queues allocates nothing once the pool has reached its
//! largest size; bytes are copied in once and never moved.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use super::link::GuestFrame;

/// Length of a chunk in bytes.
const LEN: u32 = 4096;
/// Length of a chunk in bytes.
pub(crate) const CHUNK: usize = LEN as usize;
/// Maximum number of unused chunks with memory: 1 MiB.
const SPARE: usize = 256;
/// Number that stands for no chunk.
const NONE: u32 = u32::MAX;
/// Maximum number of chunks that one read fills: 64 KiB behind a part of one.
const READ_CHUNKS: usize = 17;

type Memory = Box<[u8; CHUNK]>;

struct Chunk {
    /// `None` if its memory was freed, or is lent to a read.
    bytes: Option<Memory>,
    next: u32,
}

/// The chunks of all queues.
pub(crate) struct ChunkStore {
    chunks: Vec<Chunk>,
    /// Free chunks, with memory and without.
    spare: Vec<u32>,
    freed: Vec<u32>,
    /// Number of chunks that may be in use.
    limit: u32,
    used: u32,
    /// Number of queues that have a reservation and no chunk. With the used ones, these are
    /// at most `limit`.
    reserved: u32,
}

impl ChunkStore {
    /// A store of at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            chunks: Vec::new(),
            spare: Vec::new(),
            freed: Vec::new(),
            limit: u32::try_from(limit / CHUNK)
                .unwrap_or(NONE - 1)
                .min(NONE - 1),
            used: 0,
            reserved: 0,
        }
    }

    /// Number of chunks that are neither used nor reserved.
    fn free(&self) -> u32 {
        self.limit - self.used - self.reserved
    }

    /// Returns a queue for which one chunk is certain, if there is one more.
    pub(crate) fn reserve(&mut self) -> Option<ByteQueue> {
        if self.free() == 0 {
            return None;
        }
        self.reserved += 1;
        Some(ByteQueue {
            has_reservation: true,
            ..ByteQueue::default()
        })
    }

    /// Removes all bytes of a queue, and its reservation.
    pub(crate) fn remove(&mut self, mut queue: ByteQueue) {
        queue.clear(self);
        if queue.has_reservation {
            self.reserved -= 1;
        }
    }

    /// Number of bytes that a queue may store beyond those that it has, if it is to have at
    /// most `most`.
    pub(crate) fn share(&self, queue: &ByteQueue, most: u32) -> u32 {
        let free = self.free();
        // Whole chunks, and at least one as long as there is one.
        let share = (free / 4).max(free.min(1)).saturating_mul(LEN);
        let certain = match queue.last {
            NONE if queue.has_reservation => LEN,
            NONE => 0,
            _ => LEN - queue.end,
        };
        (share.saturating_add(certain)).min(most.saturating_sub(queue.len))
    }

    fn take(&mut self) -> Option<u32> {
        if self.free() == 0 {
            return None;
        }
        let index = self.spare.pop().or_else(|| self.freed.pop());
        let index = index.unwrap_or_else(|| {
            self.chunks.push(Chunk {
                bytes: None,
                next: NONE,
            });
            // At most `limit`, which fits.
            u32::try_from(self.chunks.len() - 1).unwrap_or(NONE)
        });
        let chunk = self.chunks.get_mut(index as usize)?;
        chunk.next = NONE;
        chunk.bytes.get_or_insert_with(|| Box::new([0; CHUNK]));
        self.used += 1;
        Some(index)
    }

    fn release(&mut self, index: u32) {
        self.used -= 1;
        if self.spare.len() < SPARE {
            self.spare.push(index);
        } else if let Some(chunk) = self.chunks.get_mut(index as usize) {
            chunk.bytes = None;
            self.freed.push(index);
        }
    }

    fn next(&self, index: u32) -> u32 {
        self.chunks
            .get(index as usize)
            .map_or(NONE, |chunk| chunk.next)
    }

    fn bytes(&self, index: u32) -> &[u8] {
        let chunk = self.chunks.get(index as usize);
        chunk
            .and_then(|chunk| chunk.bytes.as_deref())
            .map_or(&[], |bytes| bytes)
    }

    fn bytes_mut(&mut self, index: u32) -> &mut [u8] {
        let chunk = self.chunks.get_mut(index as usize);
        chunk
            .and_then(|chunk| chunk.bytes.as_deref_mut())
            .map_or(&mut [], |bytes| bytes)
    }

    fn lend(&mut self, index: u32) -> Option<Memory> {
        self.chunks.get_mut(index as usize)?.bytes.take()
    }

    fn give_back(&mut self, index: u32, bytes: Option<Memory>) {
        if let Some(chunk) = self.chunks.get_mut(index as usize) {
            chunk.bytes = bytes;
        }
    }
}

/// A position in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    chunk: u32,
    start: u32,
}

/// Stored bytes of one flow, first in, first out. [`ByteQueue::clear`] returns its chunks to
/// the store.
#[derive(Debug)]
pub(crate) struct ByteQueue {
    first: u32,
    last: u32,
    /// Start in the first chunk, and end in the last.
    start: u32,
    end: u32,
    len: u32,
    has_reservation: bool,
}

impl Default for ByteQueue {
    fn default() -> Self {
        Self {
            first: NONE,
            last: NONE,
            start: 0,
            end: 0,
            len: 0,
            has_reservation: false,
        }
    }
}

impl ByteQueue {
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `len` bytes of a frame from `offset` on; returns the number of bytes that were
    /// stored, which is less if the store is full.
    #[must_use]
    pub(crate) fn push(
        &mut self,
        store: &mut ChunkStore,
        frame: &dyn GuestFrame,
        offset: usize,
        len: u32,
    ) -> u32 {
        let mut done = 0;
        while done < len {
            if (self.last == NONE || self.end == LEN) && !self.append_chunk(store) {
                break;
            }
            let now = (len - done).min(LEN - self.end);
            let room = store.bytes_mut(self.last).get_mut(self.end as usize..);
            let room = room.and_then(|room| room.get_mut(..now as usize));
            let copied = room.is_some_and(|room| frame.copy_out(offset + done as usize, room));
            if !copied {
                self.drop_empty_last(store);
                break;
            }
            done += now;
            self.end += now;
            self.len += now;
        }
        done
    }

    /// Reads from a socket up to `most` bytes, which is not zero, and at most 64 KiB, as far
    /// as the store has room; returns the number of bytes, and true if there was room for more.
    ///
    /// # Errors
    /// The operating system's error; `OutOfMemory` if the store is full.
    pub(crate) fn read(
        &mut self,
        store: &mut ChunkStore,
        socket: BorrowedFd<'_>,
        most: u32,
    ) -> io::Result<(u32, bool)> {
        let mut indices = [NONE; READ_CHUNKS];
        let mut lent: [Option<Memory>; READ_CHUNKS] = [const { None }; READ_CHUNKS];
        let begin = if self.last == NONE { LEN } else { self.end };
        let mut room = 0u32;
        let mut count = 0;
        // The rest of the last chunk comes first.
        if begin < LEN {
            indices[0] = self.last;
            lent[0] = store.lend(self.last);
            (room, count) = (LEN - begin, 1);
        }
        let skip = if count == 1 { begin as usize } else { 0 };
        while room < most && count < READ_CHUNKS {
            let is_first = self.last == NONE && count == 0;
            let Some(index) = self.take(store, is_first) else {
                break;
            };
            indices[count] = index;
            lent[count] = store.lend(index);
            (room, count) = (room + LEN, count + 1);
        }
        let wanted = room.min(most);
        let result = receive(&mut lent[..count], skip, wanted, socket);
        for (index, bytes) in indices.iter().zip(&mut lent).take(count) {
            store.give_back(*index, bytes.take());
        }
        let read = *result.as_ref().unwrap_or(&0);
        self.append_read(store, &indices[..count], read);
        result.map(|read| (read, read < wanted))
    }

    /// Appends the chunks that a read has filled, and releases the others.
    fn append_read(&mut self, store: &mut ChunkStore, indices: &[u32], read: u32) {
        let mut left = read;
        for (position, &index) in indices.iter().enumerate() {
            if index == self.last {
                let now = left.min(LEN - self.end);
                self.end += now;
                left -= now;
            } else if left > 0 {
                self.link(store, index);
                self.end = left.min(LEN);
                left -= self.end;
            } else {
                // Only the first chunk of an empty queue was the reserved one.
                self.release(store, index, position == 0);
            }
        }
        self.len += read;
    }

    /// Takes a chunk; the first one is the reserved one.
    fn take(&self, store: &mut ChunkStore, is_first: bool) -> Option<u32> {
        let reserved = u32::from(is_first && self.has_reservation);
        store.reserved -= reserved;
        let chunk = store.take();
        if chunk.is_none() {
            store.reserved += reserved;
        }
        chunk
    }

    /// Releases a chunk that is not in the queue; the first one of an empty queue is reserved
    /// again.
    fn release(&self, store: &mut ChunkStore, chunk: u32, is_first: bool) {
        store.release(chunk);
        store.reserved += u32::from(is_first && self.has_reservation && self.last == NONE);
    }

    fn append_chunk(&mut self, store: &mut ChunkStore) -> bool {
        let Some(chunk) = self.take(store, self.last == NONE) else {
            return false;
        };
        self.link(store, chunk);
        true
    }

    fn link(&mut self, store: &mut ChunkStore, chunk: u32) {
        match store.chunks.get_mut(self.last as usize) {
            Some(last) => last.next = chunk,
            None => (self.first, self.start) = (chunk, 0),
        }
        (self.last, self.end) = (chunk, 0);
    }

    /// Releases the only chunk if it has no bytes.
    fn drop_empty_last(&mut self, store: &mut ChunkStore) {
        if self.len == 0 && self.last != NONE {
            let chunk = self.last;
            self.empty();
            self.release(store, chunk, true);
        }
    }

    /// The position of the first byte.
    pub(crate) fn start(&self) -> Cursor {
        Cursor {
            chunk: self.first,
            start: self.start,
        }
    }

    /// Puts the bytes from a position on, at most `most`, into `slices`, as far as there are
    /// slices. Returns their length, the number of slices, and the position after them.
    pub(crate) fn slices<'a>(
        &self,
        store: &'a ChunkStore,
        from: Cursor,
        most: u32,
        slices: &mut [IoSlice<'a>],
    ) -> (u32, usize, Cursor) {
        let mut at = self.normalized(store, from);
        let (mut len, mut count) = (0, 0);
        for slice in slices {
            let end = if at.chunk == self.last { self.end } else { LEN };
            let now = end.saturating_sub(at.start).min(most - len);
            let bytes = store.bytes(at.chunk).get(at.start as usize..);
            let bytes = bytes.and_then(|bytes| bytes.get(..now as usize));
            let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) else {
                break;
            };
            *slice = IoSlice::new(bytes);
            len += now;
            count += 1;
            at.start += now;
            at = self.normalized(store, at);
        }
        (len, count, at)
    }

    /// The same position at the start of the next chunk, if it is the end of one.
    fn normalized(&self, store: &ChunkStore, at: Cursor) -> Cursor {
        if at.chunk == NONE {
            return self.start();
        }
        if at.start == LEN && at.chunk != self.last {
            return Cursor {
                chunk: store.next(at.chunk),
                start: 0,
            };
        }
        at
    }

    /// Removes the first `count` bytes.
    pub(crate) fn consume(&mut self, store: &mut ChunkStore, count: u32) {
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
            let chunk = self.first;
            if is_last {
                self.empty();
                return self.release(store, chunk, true);
            }
            (self.first, self.start) = (store.next(chunk), 0);
            self.release(store, chunk, false);
        }
    }

    /// The state without chunks.
    fn empty(&mut self) {
        *self = Self {
            has_reservation: self.has_reservation,
            ..Self::default()
        };
    }

    /// Removes all bytes.
    pub(crate) fn clear(&mut self, store: &mut ChunkStore) {
        self.consume(store, self.len);
    }
}

/// Reads up to `most` bytes into memory, `skip` bytes of the first part left out.
fn receive(
    parts: &mut [Option<Memory>],
    skip: usize,
    most: u32,
    socket: BorrowedFd<'_>,
) -> io::Result<u32> {
    if most == 0 {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let mut left = most as usize;
    let mut slices = [const { None }; READ_CHUNKS].map(|_: Option<()>| IoSliceMut::new(&mut []));
    let mut count = 0;
    for (slice, part) in slices.iter_mut().zip(parts) {
        let bytes: &mut [u8] = part.as_deref_mut().map_or(&mut [], |bytes| bytes);
        let from = if count == 0 { skip } else { 0 };
        let bytes = bytes.get_mut(from..).unwrap_or_default();
        let len = bytes.len().min(left);
        left -= len;
        *slice = IoSliceMut::new(&mut bytes[..len]);
        count += 1;
    }
    let read = rustix::io::retry_on_intr(|| rustix::io::readv(socket, &mut slices[..count]))?;
    // At most 64 KiB.
    u32::try_from(read).map_err(io::Error::other)
}

#[cfg(test)]
#[path = "store/tests.rs"]
mod tests;
