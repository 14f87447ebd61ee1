//! Paths of the workspace, its build output and the cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Returns the root of the workspace.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable when it runs xtask; the built-in value is for a direct
    // start.
    let crate_directory = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    crate_directory
        .parent()
        .map_or_else(|| crate_directory.clone(), Path::to_owned)
}

/// Returns cargo's build output.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Returns a directory of the cache, created if it is missing.
pub(crate) fn cache(name: &str) -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    let directory = base.join("sm").join(name);
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {:?}", directory.display()))?;
    Ok(directory)
}

/// Takes the lock of a cache directory for creating `done` in it, unless that exists.
pub(crate) fn lock_unless(done: &Path, directory: &Path) -> Result<Option<File>> {
    if done.exists() {
        return Ok(None);
    }
    let lock = lock(directory)?;
    // Another process may have created it in the meantime.
    Ok((!done.exists()).then_some(lock))
}

/// Takes the lock of a cache directory, so that one process at a time creates things in
/// it. The kernel releases it when the value is dropped or the process ends.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.join(".lock");
    let file = File::create(&path).with_context(|| format!("cannot open {:?}", path.display()))?;
    if file.try_lock().is_err() {
        crate::cmd::note(format_args!(
            "waiting for another xtask that works in {}",
            directory.display()
        ));
        file.lock()
            .with_context(|| format!("cannot lock {:?}", path.display()))?;
    }
    Ok(file)
}

/// Removes a directory tree if it exists.
pub(crate) fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {:?}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// Returns a short name for contents: FNV-1a over the parts with their lengths. It names
/// cache entries of this user and is not cryptographic.
pub(crate) fn fingerprint(parts: &[&[u8]]) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut mix = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for part in parts {
        mix(&part.len().to_le_bytes());
        mix(part);
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::fingerprint;

    #[test]
    fn moving_a_byte_between_parts_changes_the_fingerprint() {
        assert_ne!(fingerprint(&[b"ab", b"c"]), fingerprint(&[b"a", b"bc"]));
    }
}
