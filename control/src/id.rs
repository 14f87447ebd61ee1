//! Identifiers and names of virtual machines.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Length of an abbreviated identifier, in characters.
pub const SHORT_LEN: usize = 12;

/// 64 lower-case hexadecimal digits that identify a virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(String);

impl VmId {
    /// Generates an identifier from the system's random source.
    #[must_use]
    pub fn generate() -> Self {
        Self(hex(&random::<32>()))
    }

    /// Parses an identifier; `None` unless `text` is 64 lower-case hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let valid =
            text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        valid.then(|| Self(text.to_owned()))
    }

    /// All 64 digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 digits.
    #[must_use]
    pub fn short(&self) -> &str {
        self.0.get(..SHORT_LEN).unwrap_or(&self.0)
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns `N` bytes from the system's random source.
///
/// `getrandom(2)` blocks until the kernel's generator is seeded and cannot fail
/// afterwards. On a kernel without the system call the bytes derive from UUIDs.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => {
                for (byte, random) in rest.iter_mut().zip(uuid::Uuid::new_v4().as_bytes()) {
                    *byte = *random;
                    filled += 1;
                }
            }
        }
    }
    bytes
}

/// Formats `bytes` as lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(*byte)])
        .collect()
}

/// Returns whether `name` is a valid VM name: a letter or digit, then letters, digits,
/// `_`, `.` or `-`, at most 64 characters in total.
#[must_use]
pub fn is_valid_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 64
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Generates a name such as `quiet_heron`. An `attempt` greater than 0 appends a number,
/// for callers whose earlier names were already in use.
#[must_use]
pub fn generate_name(attempt: u32) -> String {
    let [a, b, c, d] = random::<4>();
    let pick = |list: &[&'static str], high: u8, low: u8| {
        let index = usize::from(u16::from_be_bytes([high, low]));
        list.get(index % list.len()).copied().unwrap_or("vm")
    };
    let (adjective, noun) = (pick(&ADJECTIVES, a, b), pick(&NOUNS, c, d));
    match attempt {
        0 => format!("{adjective}_{noun}"),
        n => format!("{adjective}_{noun}{n}"),
    }
}

const ADJECTIVES: [&str; 48] = [
    "amber", "bold", "brave", "bright", "brisk", "calm", "clear", "clever", "cosy", "crisp",
    "daring", "deft", "eager", "early", "fair", "fleet", "fond", "fresh", "gentle", "glad",
    "golden", "grand", "happy", "hardy", "honest", "jolly", "keen", "kind", "light", "lively",
    "loyal", "lucid", "mellow", "merry", "neat", "noble", "patient", "plucky", "proud", "quick",
    "quiet", "rapid", "silver", "steady", "sunny", "swift", "warm", "witty",
];

const NOUNS: [&str; 48] = [
    "badger", "beaver", "bison", "crane", "curlew", "dolphin", "eagle", "egret", "falcon",
    "ferret", "finch", "fox", "gannet", "gecko", "goose", "hare", "heron", "ibex", "jackal", "jay",
    "kestrel", "kite", "lark", "lemur", "linnet", "lynx", "magpie", "marten", "merlin", "mole",
    "newt", "osprey", "otter", "owl", "panda", "pika", "plover", "puffin", "quail", "raven",
    "robin", "seal", "stoat", "swan", "tern", "vole", "wombat", "wren",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_hexadecimal_and_differ() {
        let (a, b) = (VmId::generate(), VmId::generate());
        assert_ne!(a, b);
        assert_eq!(VmId::parse(a.as_str()), Some(a.clone()));
        assert_eq!(a.short().len(), SHORT_LEN);
        assert_eq!(VmId::parse(&"A".repeat(64)), None);
        assert_eq!(VmId::parse("../../etc"), None);
    }

    #[test]
    fn generated_names_are_valid() {
        for attempt in 0..3 {
            assert!(is_valid_name(&generate_name(attempt)));
        }
        for bad in ["", "-a", "a/b", ".", "a b", &"x".repeat(65)] {
            assert!(!is_valid_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn hex_keeps_the_order_of_digits() {
        assert_eq!(hex(&[0x0f, 0xa0]), "0fa0");
    }
}
