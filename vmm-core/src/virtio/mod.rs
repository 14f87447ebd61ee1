//! Virtio devices on the MMIO transport (virtio 1.3).
//!
//! | file | idea |
//! |---|---|
//! | `device.rs` | what a device is to the machine |
//! | `queue.rs` | the split virtqueue |
//! | `iov.rs` | vectored I/O straight on guest memory |
//! | `mmio.rs` | the register transport |
//! | `blk.rs`, `disk.rs` | the block device and what may be behind it |
//! | `rng.rs` | the entropy device |

pub mod blk;
mod device;
pub mod disk;
pub mod iov;
pub mod mmio;
pub mod queue;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use device::{ActivateError, Activation, DevicePayload, Interrupt, VirtioDevice};
