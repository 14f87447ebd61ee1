//! Counters of the device, readable from any thread at any time.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that one thread writes at a time.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Returns true if nothing was counted so far.
    pub(crate) fn is_first(&self) -> bool {
        self.get() == 0
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters since the device was created.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        impl Counters {
            pub(crate) fn read(&self) -> Stats {
                Stats { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Connections open now, including those that only write their last bytes.
    connections,
    /// Connections opened or requested so far.
    opened,
    /// Bytes read from host sockets into the guest.
    to_guest,
    /// Bytes taken from the guest for host sockets.
    from_guest,
    /// Bytes of the guest that no host socket accepted any more.
    discarded,
    /// Invalid packets of the guest, which were answered by a reset.
    malformed,
    /// Requests, of either side, that were refused: no socket on the host accepted them, or
    /// the limit of connections was reached.
    refused,
    /// Requests that the guest did not answer in time, ends that it did not confirm, and
    /// last bytes that the host did not accept.
    timed_out,
}
