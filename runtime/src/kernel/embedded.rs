//! The kernel embedded in this program at build time, which makes a release one file.
//!
//! It is compressed, and unpacked into the cache when a VM first boots from it. Each start
//! compares the digest of the unpacked file, as the cache may have been changed or cut
//! short by a crash; the digest itself is cached (see [`crate::digests`]).

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::digests::file_digest;

/// Name of the embedded kernel in lists and for [`super::choose`].
pub(super) const NAME: &str = "embedded";

/// A kernel compressed with zstd.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed<'a> {
    pub(super) zstd: &'a [u8],
    /// SHA-256 of the kernel, in hexadecimal.
    pub(super) digest: &'a str,
}

/// The kernel embedded by `build.rs`.
#[cfg(sm_embedded_kernel)]
pub(super) const EMBEDDED: Option<Packed<'static>> = Some(Packed {
    zstd: include_bytes!(env!("SM_EMBEDDED_KERNEL")),
    digest: env!("SM_EMBEDDED_KERNEL_SHA256"),
});
#[cfg(not(sm_embedded_kernel))]
pub(super) const EMBEDDED: Option<Packed<'static>> = None;

/// Returns the path of the unpacked kernel below `cache`.
pub(super) fn path(packed: Packed<'_>, cache: &Path) -> PathBuf {
    cache.join("embedded").join(packed.digest).join("vmlinux")
}

/// Returns [`path`], after unpacking the kernel there if it is absent or differs.
///
/// # Errors
/// The cache cannot be written, or the embedded kernel is corrupt.
pub(super) fn unpacked(packed: Packed<'_>, cache: &Path) -> io::Result<PathBuf> {
    let path = path(packed, cache);
    if file_digest(&path, cache).is_ok_and(|digest| digest == packed.digest) {
        return Ok(path);
    }
    let directory = path.parent().unwrap_or(cache);
    fs::create_dir_all(directory)?;
    let random = sm_control::id::hex(&sm_control::id::random::<8>());
    // Other processes may unpack it at the same time; each renames a whole file.
    let draft = directory.join(format!(".{random}"));
    unpack(packed, &draft)
        .and_then(|()| fs::rename(&draft, &path))
        .inspect_err(|_| {
            let _ = fs::remove_file(&draft);
        })?;
    Ok(path)
}

fn unpack(packed: Packed<'_>, to: &Path) -> io::Result<()> {
    let mut file = File::create_new(to)?;
    let mut kernel = zstd::Decoder::with_buffer(packed.zstd)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let bytes = match kernel.read(&mut buffer)? {
            0 => break,
            count => buffer.get(..count).unwrap_or_default(),
        };
        hash.update(bytes);
        file.write_all(bytes)?;
    }
    let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if digest == packed.digest {
        Ok(())
    } else {
        let text = "the kernel embedded in this program is corrupt";
        Err(io::Error::new(io::ErrorKind::InvalidData, text))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use sm_snapshot::state_file::hex_digest;

    use super::*;

    /// Bytes that pass for a kernel, compressed, and their digest.
    pub(in crate::kernel) fn packed() -> (Vec<u8>, String) {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.resize(300_000, 7);
        (
            zstd::encode_all(&kernel[..], 3).unwrap(),
            hex_digest(&kernel),
        )
    }

    #[test]
    fn it_is_unpacked_once_and_again_when_it_differs() {
        let (zstd, digest) = packed();
        let packed = Packed {
            zstd: &zstd,
            digest: &digest,
        };
        let cache = tempfile::tempdir().unwrap();
        let path = unpacked(packed, cache.path()).unwrap();
        let whole = fs::read(&path).unwrap();
        assert_eq!(whole.len(), 300_000);
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&path.metadata().unwrap());
        let first = inode(&path);
        assert_eq!(unpacked(packed, cache.path()).unwrap(), path);
        assert_eq!(inode(&path), first, "unpacked again");

        // A crash cut it short, or somebody changed it.
        for other in [
            &whole[..100],
            &[&whole[..1000], b"!", &whole[1001..]].concat(),
        ] {
            fs::write(&path, other).unwrap();
            unpacked(packed, cache.path()).unwrap();
            assert!(fs::read(&path).unwrap() == whole);
        }
        let entries = fs::read_dir(path.parent().unwrap()).unwrap();
        assert_eq!(entries.count(), 1);
    }

    #[test]
    fn a_corrupt_one_is_refused_and_leaves_nothing() {
        let (mut zstd, digest) = packed();
        let cache = tempfile::tempdir().unwrap();
        let refused = |zstd: &[u8]| {
            let digest = &digest;
            unpacked(Packed { zstd, digest }, cache.path()).unwrap_err();
            let entries = fs::read_dir(cache.path().join("embedded").join(digest)).unwrap();
            assert_eq!(entries.count(), 0);
        };
        refused(&zstd[..zstd.len() / 2]);
        refused(&zstd::encode_all(&b"\x7fELF another"[..], 3).unwrap());
        zstd[0] ^= 1;
        refused(&zstd);
    }
}
