//! Plain-data state of a machine, the same on every host of one architecture.
//!
//! Architectural elements are typed, in a module for each architecture; backend-specific
//! state is an opaque versioned [`Blob`].
//!
//! These are the structures of snapshots, apart from what a hypervisor has: a backend
//! converts to and from them. The names of those that are sections of snapshots end in their
//! version, and the layout of a version does not change: a new one is a new type, the old one
//! is converted to it. The types of their fields, which have no version of their own, do not
//! change either: [`Blob`] and, on x86_64, [`Segment`](x86_64::Segment),
//! [`Table`](x86_64::Table), [`CpuidEntry`](x86_64::CpuidEntry) and the groups of registers.

pub mod aarch64;
pub mod x86_64;

use serde::{Deserialize, Serialize};

/// Backend-specific state that no other backend can read. A part of saved state of several
/// types: the layout does not change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Name of the backend that wrote it.
    pub backend: String,
    /// Version of the layout of `bytes`.
    pub version: u32,
    /// The payload.
    pub bytes: Vec<u8>,
}

/// The newest version of a VM's state, which backends save and restore.
pub type VmSavedState = VmStateV1;

/// State of interrupt controllers and clocks, version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStateV1 {
    /// The backend's elements (KVM on x86_64: PIC, IOAPIC, kvmclock; on arm64: the GIC).
    pub blob: Blob,
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    pub(super) fn blob() -> impl Strategy<Value = Blob> {
        let fields = ("[a-z]{0,8}", any::<u32>(), vec(any::<u8>(), 0..100));
        fields.prop_map(|(backend, version, bytes)| Blob {
            backend,
            version,
            bytes,
        })
    }

    proptest! {
        #[test]
        fn a_vm_survives_encoding(blob in blob()) {
            let state = VmSavedState { blob };
            let bytes = postcard::to_stdvec(&state).unwrap();
            prop_assert_eq!(postcard::from_bytes::<VmSavedState>(&bytes).unwrap(), state);
        }
    }
}
