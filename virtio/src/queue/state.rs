//! Saved state of a queue.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Queue;

/// State of a queue, version 1. Its fields and their order are those of snapshots and do
/// not change; another state is another type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStateV1 {
    /// Largest size that the device offers.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// The driver enabled the queue.
    pub ready: bool,
    /// Guest physical address of the descriptor area.
    pub descriptors: u64,
    /// Guest physical address of the driver area.
    pub available: u64,
    /// Guest physical address of the device area.
    pub used: u64,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Free-running index of the next chain that the device takes.
    pub next_available: u16,
    /// Free-running index of the next chain that the device returns.
    pub next_used: u16,
    /// Value of `next_used` when the used ring was last published.
    pub signalled: u16,
}

/// Saved state that is not of this queue.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueStateError {
    /// The device offers another size.
    #[error("it has a queue of {saved} descriptors, and the device has one of {own}")]
    Size {
        /// Largest size in the state.
        saved: u16,
        /// Largest size of the device's queue.
        own: u16,
    },
    /// The indices are further apart than a device can get them.
    #[error("it has {taken} chains in use, in a queue of {size} descriptors")]
    InUse {
        /// Chains that were taken and not returned.
        taken: u16,
        /// Size of the queue.
        size: u16,
    },
}

impl Queue {
    /// Returns the queue's state.
    #[must_use]
    pub fn save(&self) -> QueueStateV1 {
        QueueStateV1 {
            max_size: self.max_size,
            size: self.size,
            ready: self.ready,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            event_idx: self.event_idx,
            next_available: self.next_available,
            next_used: self.next_used,
            signalled: self.signalled,
        }
    }

    /// Creates a queue of at most `max_size` descriptors from its state. The size and the
    /// addresses are the driver's and are checked when the queue is used
    /// ([`Queue::is_valid`]).
    ///
    /// # Errors
    /// The state is of a queue of another size, or is none that a queue gets into.
    pub fn restore(max_size: u16, state: &QueueStateV1) -> Result<Self, QueueStateError> {
        if state.max_size != max_size {
            return Err(QueueStateError::Size {
                saved: state.max_size,
                own: max_size,
            });
        }
        let taken = state.next_available.wrapping_sub(state.next_used);
        if taken > state.size {
            return Err(QueueStateError::InUse {
                taken,
                size: state.size,
            });
        }
        Ok(Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            descriptors: state.descriptors,
            available: state.available,
            used: state.used,
            event_idx: state.event_idx,
            next_available: state.next_available,
            next_used: state.next_used,
            signalled: state.signalled,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A state is restored as it is, or refused.
        #[test]
        fn any_state_is_restored_or_refused(
            sizes: [u16; 2],
            addresses: [u64; 3],
            indices: [u16; 3],
            flags: [bool; 2],
        ) {
            let [max_size, size] = sizes;
            let [descriptors, available, used] = addresses;
            let [next_available, next_used, signalled] = indices;
            let [ready, event_idx] = flags;
            let state = QueueStateV1 {
                max_size,
                size,
                ready,
                descriptors,
                available,
                used,
                event_idx,
                next_available,
                next_used,
                signalled,
            };
            let fits = next_available.wrapping_sub(next_used) <= size;
            match Queue::restore(max_size, &state) {
                Ok(queue) => {
                    prop_assert!(fits);
                    prop_assert_eq!(queue.save(), state.clone());
                }
                Err(error) => {
                    prop_assert!(!fits);
                    prop_assert!(matches!(error, QueueStateError::InUse { .. }), "{}", error);
                }
            }
            let other = Queue::restore(max_size.wrapping_add(1), &state);
            prop_assert!(matches!(other, Err(QueueStateError::Size { .. })), "{:?}", other);
        }
    }
}
