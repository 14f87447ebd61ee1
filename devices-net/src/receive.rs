//! Frames for the guest, in its receive buffers.

use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError, Span};
use thiserror::Error;

use crate::counters::NetCounters;
use crate::header::{HEADER_LEN, MAX_FRAME, NetHeader};

/// Reason why there are no buffers for a frame.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReserveError {
    /// The guest has not offered enough buffers; the backend is called when it offers more.
    #[error("the guest has not offered enough receive buffers")]
    NoBuffers,
    /// The frame is longer than the guest's buffers will ever be: it has to be discarded.
    #[error("the frame does not fit into the guest's receive buffers")]
    TooLong,
    /// The ring is malformed, and the device needs a reset.
    #[error("the receive ring is malformed")]
    Broken,
}

/// Chains that are reused from frame to frame.
#[derive(Default)]
pub(crate) struct Receiver {
    /// Taken for the current frame, in order.
    taken: Vec<DescriptorChain>,
    spare: Vec<DescriptorChain>,
    spans: Vec<Span>,
}

impl Receiver {
    /// Forgets the chains of a queue that is not used any more.
    fn clear(&mut self) {
        self.spare.append(&mut self.taken);
    }
}

/// The receive buffers that the guest has offered, during one turn of a backend.
pub struct ReceiveRing<'a> {
    pub(crate) queue: &'a mut Queue,
    pub(crate) memory: &'a GuestMemory,
    pub(crate) receiver: &'a mut Receiver,
    /// True if a frame may be in several buffers (VIRTIO_NET_F_MRG_RXBUF).
    pub(crate) mergeable: bool,
    pub(crate) counters: &'a NetCounters,
    pub(crate) failure: Option<QueueError>,
}

impl<'a> ReceiveRing<'a> {
    /// Returns the memory of the buffers.
    #[must_use]
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Takes buffers for a frame of `len` bytes, from its Ethernet header on. They return to
    /// the ring if they are dropped without a delivery.
    ///
    /// # Errors
    /// There are too few, or the frame is too long for all of them.
    pub fn reserve(&mut self, len: u32) -> Result<ReceiveBuffers<'_, 'a>, ReserveError> {
        if self.failure.is_some() {
            return Err(ReserveError::Broken);
        }
        if len > MAX_FRAME {
            return Err(ReserveError::TooLong);
        }
        let taken = self.take(len);
        match taken {
            Ok(Ok(())) => Ok(ReceiveBuffers { ring: self, len }),
            Ok(Err(refused)) => {
                self.give_back();
                Err(refused)
            }
            Err(error) => {
                self.failure = Some(error);
                self.receiver.clear();
                Err(ReserveError::Broken)
            }
        }
    }

    /// Takes chains for the header and `len` bytes.
    fn take(&mut self, len: u32) -> Result<Result<(), ReserveError>, QueueError> {
        let wanted = u64::from(HEADER_LEN) + u64::from(len);
        let mut room = 0u64;
        self.receiver.spans.clear();
        while room < wanted {
            let limit = match self.mergeable {
                true => usize::from(self.queue.size),
                false => 1,
            };
            if self.receiver.taken.len() >= limit {
                return Ok(Err(ReserveError::TooLong));
            }
            let mut chain = self.receiver.spare.pop().unwrap_or_default();
            if !self.queue.pop(self.memory, &mut chain)? {
                self.receiver.spare.push(chain);
                return Ok(Err(ReserveError::NoBuffers));
            }
            let capacity = chain.writable_len();
            let skip = match self.receiver.taken.is_empty() {
                true => HEADER_LEN,
                false => 0,
            };
            let window = Window::new(&chain.writable, skip, u32::MAX);
            self.receiver.spans.extend(window.spans());
            self.receiver.taken.push(chain);
            // Every buffer has room for a header (section 5.1.6.3.1).
            if capacity < HEADER_LEN {
                return Err(QueueError::Buffer);
            }
            room += u64::from(capacity);
        }
        Ok(Ok(()))
    }

    /// Returns the chains to the ring.
    fn give_back(&mut self) {
        for _ in 0..self.receiver.taken.len() {
            self.queue.undo_pop();
        }
        self.receiver.clear();
    }

    /// Writes the header of a frame of `len` bytes that are in the buffers already, and
    /// returns the buffers that it takes to the driver; returns their number.
    fn complete(&mut self, header: &NetHeader, len: u32) -> Result<usize, QueueError> {
        let mut left = HEADER_LEN + len;
        let mut used = 0u16;
        for chain in &self.receiver.taken {
            if left == 0 {
                break;
            }
            let now = chain.writable_len().min(left);
            left -= now;
            used += 1;
            self.queue.push_used(self.memory, chain.head(), now)?;
        }
        if let Some(first) = self.receiver.taken.first() {
            let window = Window::new(&first.writable, 0, HEADER_LEN);
            if !window.copy_in(self.memory, &header.encode(used)) {
                return Err(QueueError::Buffer);
            }
        }
        Ok(used.into())
    }
}

/// Receive buffers for one frame.
pub struct ReceiveBuffers<'r, 'a> {
    ring: &'r mut ReceiveRing<'a>,
    len: u32,
}

impl ReceiveBuffers<'_, '_> {
    /// Returns the room for the frame, which is in the memory of
    /// [`ReceiveRing::memory`].
    #[must_use]
    pub fn window(&self) -> Window<'_> {
        Window::new(&self.ring.receiver.spans, 0, self.len)
    }

    /// Delivers the first `len` bytes of [`Self::window`], which the backend has filled, as a
    /// frame. The driver sees it at the end of the turn. More than was reserved is cut off.
    pub fn deliver(self, header: &NetHeader, len: u32) {
        let len = len.min(self.len);
        match self.ring.complete(header, len) {
            Ok(used) => {
                self.ring.counters.received(1);
                self.ring.counters.received_bytes(len.into());
                // The rest is undone on drop.
                let Receiver { taken, spare, .. } = &mut *self.ring.receiver;
                spare.extend(taken.drain(..used));
            }
            Err(error) => self.ring.failure = Some(error),
        }
    }

    /// Copies `bytes` into the buffers and delivers them as a frame; returns false if they
    /// are more than was reserved, and delivers nothing.
    #[must_use]
    pub fn copy(self, header: &NetHeader, bytes: &[u8]) -> bool {
        let Ok(len) = u32::try_from(bytes.len()) else {
            return false;
        };
        if len > self.len || !self.window().copy_in(self.ring.memory, bytes) {
            return false;
        }
        self.deliver(header, len);
        true
    }
}

impl Drop for ReceiveBuffers<'_, '_> {
    fn drop(&mut self) {
        self.ring.give_back();
    }
}
