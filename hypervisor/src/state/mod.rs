//! Plain-data state of a machine, the same on every host.
//!
//! Architectural elements are typed; what only one backend understands is an
//! opaque versioned [`Blob`].

mod x86_64;

use serde::{Deserialize, Serialize};

pub use self::x86_64::*;

/// Backend-specific state that no other backend can read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Name of the backend that wrote it.
    pub backend: String,
    /// Version of the layout of `bytes`.
    pub version: u32,
    /// The payload.
    pub bytes: Vec<u8>,
}

/// State of interrupt controllers and clocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The backend's elements (KVM: PIC, IOAPIC, PIT if any, kvmclock).
    pub blob: Blob,
}
