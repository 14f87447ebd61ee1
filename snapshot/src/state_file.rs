//! `state.bin`: named sections in one checksummed file.
//!
//! ```text
//! magic "SMSTATE\0" | u32 LE format | u32 LE sections | u64 LE file length
//! section*: u16 LE name length | name | u32 LE version | u64 LE length | payload
//! SHA-256 of everything before it
//! ```
//!
//! The digest is checked before any section is parsed, which detects damage. It is no
//! protection against an attacker, who can compute it: parsers of sections treat their bytes
//! as hostile. The manifest repeats the digest, which ties the two files to each other.

use std::ops::RangeInclusive;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::Error;

const MAGIC: [u8; 8] = *b"SMSTATE\0";
const FORMAT: u32 = 1;
const HEADER_LEN: usize = 24;
const DIGEST_LEN: usize = 32;

/// Maximum size of `state.bin` in bytes (256 MiB). The state of 64 vCPUs and the page
/// index of a guest with 1 TiB are far smaller.
pub const MAX_LEN: u64 = 256 * 1024 * 1024;

/// A named part of a machine's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Name, at most 65,535 bytes.
    pub name: String,
    /// Version of the payload's layout.
    pub version: u32,
    /// The payload.
    pub payload: Vec<u8>,
}

/// The decoded contents of a `state.bin`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateFile {
    /// The sections, in file order.
    pub sections: Vec<Section>,
}

/// Returns the SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
#[must_use]
pub fn hex_digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Returns the SHA-256 of several parts in hexadecimal. The length of each part is hashed
/// before it, so that different splits of the same bytes have different digests.
#[must_use]
pub fn combined_digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a `String` cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl StateFile {
    /// Returns the version and payload of section `name`. The version must be one of
    /// `versions`. Sections that are never requested are ignored.
    ///
    /// # Errors
    /// The section is absent or has another version; `path` names the file in the error.
    pub fn section(
        &self,
        path: &Path,
        name: &str,
        versions: RangeInclusive<u32>,
    ) -> Result<(u32, &[u8]), Error> {
        let section = self
            .sections
            .iter()
            .find(|section| section.name == name)
            .ok_or_else(|| Error::damaged(path, format!("it has no section \"{name}\"")))?;
        if versions.contains(&section.version) {
            return Ok((section.version, &section.payload));
        }
        let (oldest, newest) = (versions.start(), versions.end());
        Err(Error::Incompatible {
            name: path.display().to_string(),
            reason: format!(
                "section \"{name}\" has version {}, and this sm reads {oldest} to {newest}: {}",
                section.version,
                if section.version > *newest {
                    "use a newer sm, or make the snapshot again"
                } else {
                    "make the snapshot again"
                }
            ),
        })
    }

    /// Encodes the file and returns it with its digest in hexadecimal.
    #[must_use]
    pub fn encode(&self) -> (Vec<u8>, String) {
        let body: usize = self
            .sections
            .iter()
            .map(|s| 2 + s.name.len() + 4 + 8 + s.payload.len())
            .sum();
        let total = HEADER_LEN + body + DIGEST_LEN;
        let mut out = Vec::with_capacity(total);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        let count = u32::try_from(self.sections.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&(total as u64).to_le_bytes());
        for section in &self.sections {
            let name_len = u16::try_from(section.name.len()).unwrap_or(u16::MAX);
            let name = &section.name.as_bytes()[..usize::from(name_len)];
            out.extend_from_slice(&name_len.to_le_bytes());
            out.extend_from_slice(name);
            out.extend_from_slice(&section.version.to_le_bytes());
            out.extend_from_slice(&(section.payload.len() as u64).to_le_bytes());
            out.extend_from_slice(&section.payload);
        }
        let digest = Sha256::digest(&out);
        out.extend_from_slice(&digest);
        (out, hex(&digest))
    }

    /// Decodes and checks a file; `path` names it in errors.
    ///
    /// # Errors
    /// The bytes are not an encoding by [`Self::encode`] with this digest.
    pub fn decode(path: &Path, bytes: &[u8], digest: &str) -> Result<Self, Error> {
        let damaged = |reason: &str| Error::damaged(path, reason);
        let Some((body, stored)) = bytes.split_last_chunk::<DIGEST_LEN>() else {
            return Err(damaged("it is too short"));
        };
        let mut reader = Reader(body);
        if reader.array::<8>() != Some(MAGIC) {
            return Err(damaged("it is not a state file"));
        }
        let format = reader.u32().ok_or_else(|| damaged("it is too short"))?;
        if format > FORMAT {
            return Err(Error::Newer {
                path: path.to_owned(),
                version: format,
                supported: FORMAT,
            });
        }
        if format < FORMAT {
            return Err(damaged("it has a format that no version wrote"));
        }
        let count = reader.u32().ok_or_else(|| damaged("it is too short"))?;
        let total = reader.u64().ok_or_else(|| damaged("it is too short"))?;
        if total != bytes.len() as u64 {
            return Err(damaged("it was truncated or extended"));
        }
        let computed = Sha256::digest(body);
        if computed.as_slice() != stored || hex(&computed) != digest {
            return Err(damaged("its checksum does not match"));
        }
        let mut sections = Vec::new();
        for _ in 0..count {
            let section = reader
                .section()
                .ok_or_else(|| damaged("a section does not fit"))?;
            sections.push(section);
        }
        if reader.0.is_empty() {
            Ok(Self { sections })
        } else {
            Err(damaged("there are bytes after the last section"))
        }
    }
}

/// Reads values of fixed size from the front of a slice.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn section(&mut self) -> Option<Section> {
        let name_len = self.array().map(u16::from_le_bytes)?;
        let name = std::str::from_utf8(self.take(usize::from(name_len))?)
            .ok()?
            .to_owned();
        let version = self.u32()?;
        let len = usize::try_from(self.u64()?).ok()?;
        let payload = self.take(len)?.to_vec();
        Some(Section {
            name,
            version,
            payload,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_combined_digest_depends_on_the_split() {
        let digest = |parts: &[&str]| {
            let parts: Vec<_> = parts.iter().map(|part| part.as_bytes()).collect();
            combined_digest(&parts)
        };
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
        assert_ne!(digest(&["a"]), digest(&["a", ""]));
        // Snapshot names contain this digest: after a change of it, existing snapshots
        // would no longer be found.
        let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest(&[]), nothing);
        assert_eq!(digest(&["abc"]), hex_digest(b"\x03\0\0\0\0\0\0\0abc"));
    }

    fn arbitrary() -> impl Strategy<Value = StateFile> {
        let section = (
            "[a-z]{1,12}",
            any::<u32>(),
            prop::collection::vec(any::<u8>(), 0..200),
        )
            .prop_map(|(name, version, payload)| Section {
                name,
                version,
                payload,
            });
        prop::collection::vec(section, 0..5).prop_map(|sections| StateFile { sections })
    }

    proptest! {
        #[test]
        fn files_round_trip(file in arbitrary()) {
            let (bytes, digest) = file.encode();
            let read = StateFile::decode(Path::new("state.bin"), &bytes, &digest).unwrap();
            prop_assert_eq!(read, file);
        }

        #[test]
        fn any_flip_or_cut_is_detected(file in arbitrary(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (bytes, digest) = file.encode();
            let mut flipped = bytes.clone();
            let index = at.index(bytes.len());
            flipped[index] ^= 1 << bit;
            prop_assert!(StateFile::decode(Path::new("s"), &flipped, &digest).is_err());
            prop_assert!(StateFile::decode(Path::new("s"), &bytes[..index], &digest).is_err());
            let mut longer = bytes;
            longer.push(0);
            prop_assert!(StateFile::decode(Path::new("s"), &longer, &digest).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = StateFile::decode(Path::new("s"), &bytes, "");
        }
    }

    #[test]
    fn only_format_1_is_read() {
        let refused = |format: u32| {
            let (mut bytes, _) = StateFile::default().encode();
            bytes[8..12].copy_from_slice(&format.to_le_bytes());
            let body = bytes.len() - DIGEST_LEN;
            let digest = Sha256::digest(&bytes[..body]);
            bytes[body..].copy_from_slice(&digest);
            StateFile::decode(Path::new("state.bin"), &bytes, &hex(&digest)).err()
        };
        assert!(refused(1).is_none());
        let older = refused(0).unwrap();
        assert!(matches!(older, Error::Damaged { .. }), "{older}");
        let newer = refused(2).unwrap();
        assert!(matches!(newer, Error::Newer { version: 2, .. }), "{newer}");
    }

    #[test]
    fn a_section_of_another_version_is_refused_by_number() {
        let section = |name: &str, version| Section {
            name: name.to_owned(),
            version,
            payload: vec![7],
        };
        let file = StateFile {
            sections: vec![section("new", 9), section("a", 2)],
        };
        let path = Path::new("state.bin");
        assert_eq!(file.section(path, "a", 1..=2).unwrap(), (2, &[7][..]));
        for (versions, advice) in [(3..=4, "make the snapshot again"), (1..=1, "a newer sm")] {
            let error = file.section(path, "a", versions).unwrap_err().to_string();
            assert!(
                error.contains("version 2") && error.contains(advice),
                "{error}"
            );
        }
        assert!(file.section(path, "b", 1..=1).is_err());
    }
}
