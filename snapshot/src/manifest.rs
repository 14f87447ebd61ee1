//! `manifest.json`: description of a snapshot, for people and for checks before use.
//!
//! The file is canonical: there is exactly one byte sequence for a manifest, and its last
//! member is the SHA-256 of that sequence with the member empty. A change of any byte is
//! therefore detected, although the file is readable text.
//!
//! Compatibility: a later sm reads all formats from [`OLDEST_FORMAT`] on. A member never
//! changes its meaning; adding a member requires a new format number. An older sm refuses
//! a newer format by its number.
//!
//! Format 2 contains more CPUID words than format 1 (`cpu.rs`). Format 3 has the page size
//! of the host, the devices that the state has, and the state of the machine in a section
//! for each part.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cpu::CpuFeatures;
use crate::{Error, state_file};

/// Format that this version writes.
pub const FORMAT: u32 = 3;
/// First format whose manifest has all compared CPUID words.
pub const ALL_CPUID_FORMAT: u32 = 2;
/// First format whose manifest has the page size of the host.
const PAGE_BYTES_FORMAT: u32 = 3;
/// First format whose manifest lists the devices that the state has.
pub(crate) const DEVICES_FORMAT: u32 = 3;
/// Page size of all hosts that wrote older formats.
const OLD_PAGE_BYTES: u64 = 4096;
/// Oldest format that this version reads.
pub const OLDEST_FORMAT: u32 = 1;
/// Maximum size of a manifest in bytes.
pub const MAX_LEN: u64 = 1024 * 1024;

/// The start stage at which a snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// Kernel and agent have booted; no image is attached.
    Base,
    /// An image's root file system is mounted; none of its programs has run.
    Image,
    /// A workload is running.
    App,
}

/// Reference to the parent of a diff.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentRef {
    /// Name of the parent in the same store.
    pub name: String,
    /// Digest of the parent's manifest. Another snapshot with the parent's name is
    /// refused.
    pub digest: String,
}

/// Description of `state.bin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateEntry {
    /// Length in bytes.
    pub len: u64,
    /// SHA-256 of the file without its own trailer, in hexadecimal.
    pub digest: String,
}

/// Description of `memory.bin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryEntry {
    /// Length in bytes, which is the size of guest memory.
    pub len: u64,
    /// Number of stored pages.
    pub data_pages: u64,
    /// Number of pages recorded as zero over a parent.
    pub zero_pages: u64,
}

/// A device of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceEntry {
    /// Slot in the virtio-mmio window.
    pub slot: u32,
    /// Kind of the device, such as `blk`.
    pub kind: String,
}

/// The manifest of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format number; see [`FORMAT`].
    pub format: u32,
    /// The start stage at which the snapshot was taken.
    pub layer: Layer,
    /// Wall-clock time of the capture, in milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Version of the sm that wrote the manifest.
    pub sm_version: String,
    /// Version of the machine's address map and devices.
    pub machine_version: u32,
    /// Guest memory in bytes: the length of `memory.bin`, too.
    pub memory_bytes: u64,
    /// Page size of the host that wrote the snapshot, in bytes. `None` in formats 1 and 2;
    /// see [`Manifest::host_page_bytes`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_bytes: Option<u64>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// SHA-256 of the guest kernel, in hexadecimal.
    pub kernel: String,
    /// SHA-256 of the initial RAM file system, which contains the guest's agent (and the
    /// kernel's modules), in hexadecimal.
    pub agent: String,
    /// Version of the protocol between host and agent.
    pub protocol: u32,
    /// CPU features that the guest sees.
    pub cpu: CpuFeatures,
    /// The machine's devices, by ascending slot. Formats 1 and 2 list those that a machine
    /// usually has.
    pub devices: Vec<DeviceEntry>,
    /// The parent; `None` for a full snapshot.
    pub parent: Option<ParentRef>,
    /// `state.bin`.
    pub state: StateEntry,
    /// `memory.bin`.
    pub memory: MemoryEntry,
    /// Labels of the writer, such as the image that runs.
    pub labels: BTreeMap<String, String>,
    /// SHA-256 of the canonical file with this member empty; set by [`Manifest::encode`].
    pub digest: String,
}

/// The format number, which is decoded before the other members.
#[derive(Deserialize)]
struct FormatProbe {
    format: u32,
}

impl Manifest {
    /// Returns the page size of the host that wrote the snapshot, in bytes: 4096 where the
    /// format does not have it.
    #[must_use]
    pub fn host_page_bytes(&self) -> u64 {
        self.page_bytes.unwrap_or(OLD_PAGE_BYTES)
    }

    /// Sets the digest and returns the canonical bytes.
    ///
    /// # Errors
    /// Serialisation to memory fails, which no value of the members causes.
    pub fn encode(&mut self) -> Result<Vec<u8>, serde_json::Error> {
        self.digest = String::new();
        let canonical = self.canonical()?;
        self.digest = state_file::hex_digest(&canonical);
        self.canonical()
    }

    fn canonical(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Decodes and checks a manifest; `path` names the snapshot's directory in errors.
    ///
    /// # Errors
    /// The format is not supported, or a byte was changed since the manifest was written.
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let file = path.join("manifest.json");
        let unreadable =
            |e: serde_json::Error| Error::damaged(&file, format!("it is not a manifest: {e}"));
        let probe: FormatProbe = serde_json::from_slice(bytes).map_err(unreadable)?;
        if probe.format > FORMAT {
            return Err(Error::Newer {
                path: path.to_owned(),
                version: probe.format,
                supported: FORMAT,
            });
        }
        if probe.format < OLDEST_FORMAT {
            return Err(Error::Older {
                path: path.to_owned(),
                version: probe.format,
            });
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        let mut copy = manifest.clone();
        let canonical = copy.encode().map_err(unreadable)?;
        if canonical != bytes {
            return Err(Error::damaged(
                &file,
                "it was modified: its checksum does not match",
            ));
        }
        if manifest.page_bytes.is_some() != (manifest.format >= PAGE_BYTES_FORMAT) {
            return Err(Error::damaged(
                &file,
                "its page size is not as its format has it",
            ));
        }
        Ok(manifest)
    }
}

/// Returns the name of the parent in a manifest, without checking its format or other
/// members.
pub(crate) fn parent_in(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Child {
        parent: Option<Named>,
    }
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let child: Child = serde_json::from_slice(bytes).ok()?;
    Some(child.parent?.name)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample() -> Manifest {
        Manifest {
            format: FORMAT,
            layer: Layer::Base,
            created_ms: 1_700_000_000_000,
            sm_version: "0.1.0".into(),
            machine_version: 1,
            memory_bytes: 256 << 20,
            page_bytes: Some(4096),
            vcpus: 2,
            kernel: "k".repeat(64),
            agent: "a".repeat(64),
            protocol: 1,
            cpu: crate::cpu::tests::sample(),
            devices: vec![DeviceEntry {
                slot: 0,
                kind: "vsock".into(),
            }],
            parent: None,
            state: StateEntry::default(),
            memory: MemoryEntry::default(),
            labels: BTreeMap::from([("image".into(), "busybox".into())]),
            digest: String::new(),
        }
    }

    #[test]
    fn a_manifest_round_trips() {
        let mut manifest = sample();
        let bytes = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(Path::new("s"), &bytes).unwrap(), manifest);
    }

    #[test]
    fn the_page_size_is_a_member_from_format_3_on() {
        let decoded = |format, page_bytes| {
            let mut manifest = Manifest {
                format,
                page_bytes,
                ..sample()
            };
            Manifest::decode(Path::new("s"), &manifest.encode().unwrap())
        };
        for format in OLDEST_FORMAT..PAGE_BYTES_FORMAT {
            assert_eq!(decoded(format, None).unwrap().host_page_bytes(), 4096);
            assert!(decoded(format, Some(4096)).is_err());
        }
        let manifest = decoded(FORMAT, Some(1 << 14)).unwrap();
        assert_eq!(manifest.host_page_bytes(), 1 << 14);
        assert!(decoded(FORMAT, None).is_err());
    }

    #[test]
    fn every_single_byte_is_covered() {
        let bytes = sample().encode().unwrap();
        for index in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[index] ^= 1 << bit;
                assert!(
                    Manifest::decode(Path::new("s"), &flipped).is_err(),
                    "bit {bit} of byte {index} ({:?})",
                    char::from(bytes[index])
                );
            }
        }
    }

    #[test]
    fn a_newer_format_is_named_even_if_it_has_other_members() {
        let text = br#"{"format": 7, "surprise": true}"#;
        let error = Manifest::decode(Path::new("dir"), text).unwrap_err();
        assert!(matches!(error, Error::Newer { version: 7, .. }), "{error}");
    }

    proptest! {
        #[test]
        fn labels_and_sizes_round_trip(
            labels in prop::collection::btree_map(".{0,12}", ".{0,24}", 0..5),
            memory in any::<u64>(),
            vcpus in any::<u32>(),
        ) {
            let mut manifest = Manifest { labels, memory_bytes: memory, vcpus, ..sample() };
            let bytes = manifest.encode().unwrap();
            prop_assert_eq!(Manifest::decode(Path::new("s"), &bytes).unwrap(), manifest);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Manifest::decode(Path::new("s"), &bytes).is_err());
        }
    }
}
