//! Counters of the device, readable from any thread at any time.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters since the device was created.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct NetCounts {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The live counters of a device.
        #[derive(Debug, Default)]
        pub struct NetCounters {
            $($name: AtomicU64,)*
        }

        impl NetCounters {
            /// Returns the current values. They are read one after the other.
            #[must_use]
            pub fn read(&self) -> NetCounts {
                NetCounts { $($name: self.$name.load(Ordering::Relaxed),)* }
            }

            $(pub(crate) fn $name(&self, more: u64) {
                self.$name.fetch_add(more, Ordering::Relaxed);
            })*
        }
    };
}

counters! {
    /// Frames of the guest that a backend has taken.
    transmitted,
    /// Their bytes, without the virtio header.
    transmitted_bytes,
    /// Frames of the guest that were discarded because the device has no backend.
    dropped,
    /// Frames of the guest without a complete header, or longer than any frame.
    malformed,
    /// Frames delivered to the guest.
    received,
    /// Their bytes, without the virtio header.
    received_bytes,
}
