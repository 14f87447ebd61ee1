//! Transport reset: notifies the guest that all its connections are gone (virtio 1.3
//! section 5.10.6.7), after the machine was restored.

use sm_virtio::queue::QueueError;
use vm_memory::Bytes as _;

use super::{Active, EVENT, Vsock};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;

/// State of the notification of a transport reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TransportReset {
    /// No reset is pending.
    None,
    /// The event is pending until the driver offers a buffer for it.
    Pending,
    /// The event was sent when the driver had offered this number of other buffers. The
    /// driver offers the buffer again once it has handled the event; connections that it
    /// learns of before would end with the others.
    Notified { offered: u16 },
}

impl Vsock {
    /// Returns true if new connections have to wait.
    pub(super) fn is_resetting(&self) -> bool {
        self.reset != TransportReset::None
    }

    /// Continues a transport reset, as far as possible now.
    pub(super) fn proceed_with_reset(&mut self, active: &Active) -> Result<(), QueueError> {
        let memory = &active.memory;
        let Some(queue) = self.queues.get_mut(EVENT).filter(|queue| queue.ready) else {
            // A driver without an event queue is not notified.
            self.reset = TransportReset::None;
            return Ok(());
        };
        if self.reset == TransportReset::Pending && queue.pop(memory, &mut self.chain)? {
            let span = self.chain.writable.first().ok_or(QueueError::Buffer)?;
            if span.len < 4 {
                return Err(QueueError::Buffer);
            }
            memory
                .write_obj(TRANSPORT_RESET.to_le(), span.address)
                .map_err(|_| QueueError::Buffer)?;
            queue.push_used(memory, self.chain.head(), 4)?;
            // Before the event is published: buffers offered now were offered before it.
            self.reset = TransportReset::Notified {
                offered: queue.pending(memory)?,
            };
            queue.request_notification(memory)?;
            return Ok(());
        }
        if let TransportReset::Notified { offered } = self.reset
            && queue.pending(memory)? != offered
        {
            self.reset = TransportReset::None;
            self.receiver.unpark(&mut self.muxer);
        }
        Ok(())
    }
}
