//! The name of a node, with its NUL.

use std::ffi::CStr;

/// Length of the longest short name, with its NUL. Then an enum of both takes 24 bytes.
const SHORT: usize = 23;

/// A name. Most are short, and cause no allocation with each LOOKUP and FORGET.
#[derive(Debug)]
pub(super) enum NodeName {
    /// Filled up with NULs, of which there is at least one.
    Short([u8; SHORT]),
    Long(Box<[u8]>),
}

impl Default for NodeName {
    fn default() -> Self {
        Self::Short([0; SHORT])
    }
}

impl NodeName {
    /// Copies a name without a NUL.
    pub(super) fn new(name: &[u8]) -> Self {
        let mut short = [0; SHORT];
        match short[..SHORT - 1].get_mut(..name.len()) {
            Some(bytes) => {
                bytes.copy_from_slice(name);
                Self::Short(short)
            }
            None => {
                let mut bytes = Vec::with_capacity(name.len() + 1);
                bytes.extend_from_slice(name);
                bytes.push(0);
                Self::Long(bytes.into_boxed_slice())
            }
        }
    }

    pub(super) fn as_c_str(&self) -> &CStr {
        let bytes = match self {
            Self::Short(bytes) => &bytes[..],
            Self::Long(bytes) => bytes,
        };
        CStr::from_bytes_until_nul(bytes).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_lengths_are_stored() {
        for len in 0..=255 {
            let name = vec![b'n'; len];
            let stored = NodeName::new(&name);
            assert_eq!(stored.as_c_str().to_bytes(), name);
            assert_eq!(matches!(stored, NodeName::Short(_)), len <= 22, "{len}");
        }
        assert_eq!(NodeName::default().as_c_str(), c"");
        assert_eq!(size_of::<NodeName>(), 24);
    }
}
