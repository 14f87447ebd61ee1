//! Names of directory entries that come from a guest.

use std::ffi::CStr;

use rustix::io::Errno;

/// Maximum length of a name in bytes.
pub(crate) const MAX_NAME: usize = 255;

/// A name of a directory entry: 1 to 255 bytes, without `/`, and neither `.` nor `..`. It
/// leads neither out of its directory nor to a directory below an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    /// `ENAMETOOLONG`, or `EINVAL`.
    pub(crate) fn new(name: &'a CStr) -> Result<Self, Errno> {
        let bytes = name.to_bytes();
        if bytes.len() > MAX_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(Self(name))
    }

    /// Returns the name for a system call.
    pub(crate) fn as_c_str(self) -> &'a CStr {
        self.0
    }

    /// Returns the bytes of the name.
    pub(crate) fn bytes(self) -> &'a [u8] {
        self.0.to_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_directory() {
        let long = [b'x'; 256];
        let check = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            bytes.push(0);
            let name = CStr::from_bytes_with_nul(&bytes).unwrap();
            Name::new(name).map(|name| name.bytes().to_vec())
        };
        for bad in [&b""[..], b".", b"..", b"/", b"a/b", b"../a", b"a/", b"/etc"] {
            assert_eq!(check(bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(check(&long), Err(Errno::NAMETOOLONG));
        for good in [&b"a"[..], b"...", b".a", b"a..", b"\xff\n", &long[1..]] {
            assert_eq!(check(good).unwrap(), good);
        }
    }
}
