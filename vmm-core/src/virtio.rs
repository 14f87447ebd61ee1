//! Virtio devices of the machine, behind the transport of `sm-virtio`.
//!
//! | file | idea |
//! |---|---|
//! | `blk.rs`, `disk.rs` | the block device and its backings |
//! | `layered.rs` | a disk of read-only layers under a writable one |
//! | `storage.rs` | operations on their files |
//! | `rng.rs` | the entropy device |
//! | `balloon.rs` | memory that the guest returns |

pub mod balloon;
pub mod blk;
pub mod disk;
pub mod layered;
pub mod rng;
mod storage;
