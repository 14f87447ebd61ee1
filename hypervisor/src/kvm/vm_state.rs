//! The blob in the saved state of a VM of KVM.

use serde::{Deserialize, Serialize};

use crate::Error;

/// Version of the blob that is saved and restored.
pub(super) const STATE_VERSION: u32 = 1;

/// Interrupt controllers, as `struct kvm_irqchip` has them, and the clock, version 1. The
/// layout does not change; another state is another type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KvmVmStateV1 {
    pub(super) pic_master: Vec<u8>,
    pub(super) pic_slave: Vec<u8>,
    pub(super) ioapic: Vec<u8>,
    /// kvmclock, in nanoseconds.
    pub(super) clock_ns: u64,
}

impl KvmVmStateV1 {
    /// Decodes a blob, which has to be used up.
    ///
    /// # Errors
    /// [`Error::State`].
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let fault = |fault: String| Error::State {
            reason: format!("interrupt controllers cannot be decoded: {fault}"),
        };
        let (state, rest) =
            postcard::take_from_bytes(bytes).map_err(|error| fault(error.to_string()))?;
        if rest.is_empty() {
            return Ok(state);
        }
        Err(fault(format!("{} bytes follow them", rest.len())))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;

    use super::*;
    use crate::kvm::BACKEND;
    use crate::state::{Blob, VmStateV1};

    fn sample() -> KvmVmStateV1 {
        let chip = |first: u8| {
            (0..512u16)
                .map(|n| first.wrapping_add(n.to_le_bytes()[0]))
                .collect()
        };
        KvmVmStateV1 {
            pic_master: chip(1),
            pic_slave: chip(2),
            ioapic: chip(3),
            clock_ns: 123_456_789_012,
        }
    }

    fn section() -> VmStateV1 {
        VmStateV1 {
            blob: Blob {
                backend: BACKEND.to_owned(),
                version: STATE_VERSION,
                bytes: postcard::to_stdvec(&sample()).unwrap(),
            },
        }
    }

    fn golden() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/interrupts-kvm-1.bin")
    }

    /// Snapshots have these bytes: the file does not change. A new version of the state is
    /// a new type with a file of its own, which [`write_golden`] is extended to write.
    #[test]
    fn the_encoding_of_interrupts_is_fixed() {
        let bytes = fs::read(golden()).unwrap();
        assert_eq!(postcard::to_stdvec(&section()).unwrap(), bytes);
        let decoded: VmStateV1 = postcard::from_bytes(&bytes).unwrap();
        assert_eq!((&*decoded.blob.backend, decoded.blob.version), ("kvm", 1));
        let decoded: KvmVmStateV1 = postcard::from_bytes(&decoded.blob.bytes).unwrap();
        assert_eq!(decoded, sample());
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = postcard::to_stdvec(&sample()).unwrap();
        assert_eq!(KvmVmStateV1::decode(&bytes).unwrap(), sample());
        bytes.push(0);
        let error = KvmVmStateV1::decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("1 bytes follow"), "{error}");
        assert!(KvmVmStateV1::decode(&bytes[..9]).is_err());
    }

    #[test]
    #[ignore = "writes a file of the source tree"]
    fn write_golden() {
        fs::write(golden(), postcard::to_stdvec(&section()).unwrap()).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = postcard::from_bytes::<KvmVmStateV1>(&bytes);
        }
    }
}
