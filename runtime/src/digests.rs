//! SHA-256 of files that are large and seldom change, such as kernels.
//!
//! Computed digests are cached in the user's cache directory. The key identifies the
//! state of a file: device, inode, length, and the times of its last changes. The digest
//! of a file that has just changed is not cached, because file timestamps are coarse:
//! another change could leave them equal.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use sm_snapshot::state_file::hex_digest;

/// Age from which timestamps identify a state: file systems store them in steps of up to
/// two seconds.
const SETTLED: Duration = Duration::from_secs(3);
const LEN: usize = 64;

/// Returns the digest of the file at `path`, in hexadecimal, from the cache below `cache`
/// if possible.
///
/// # Errors
/// The file cannot be read. An unusable cache is no error.
pub(crate) fn file_digest(path: &Path, cache: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    let state = format!(
        "{}:{}:{}:{}.{}:{}.{}",
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec()
    );
    let directory = cache.join("digests");
    let entry = directory.join(hex_digest(state.as_bytes()));
    if let Some(known) = read(&entry) {
        return Ok(known);
    }
    let digest = compute(file)?;
    if is_settled(&meta)
        && let Err(error) = write(&directory, &entry, &digest)
    {
        tracing::debug!(%error, "a digest is not cached");
    }
    Ok(digest)
}

fn compute(mut file: File) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hash.update(buffer.get(..count).unwrap_or_default()),
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

fn is_settled(meta: &fs::Metadata) -> bool {
    let changed = u64::try_from(meta.ctime().max(meta.mtime())).unwrap_or(0);
    let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(changed);
    SystemTime::now()
        .duration_since(changed)
        .is_ok_and(|age| age > SETTLED)
}

fn read(entry: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(entry).ok()?;
    file.take(LEN as u64 + 1).read_to_string(&mut text).ok()?;
    let whole = text.len() == LEN && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    whole.then_some(text)
}

/// Writes an entry by renaming it: readers see all of it or nothing.
fn write(directory: &Path, entry: &Path, digest: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let random = sm_control::id::hex(&sm_control::id::random::<8>());
    let draft = directory.join(format!(".{random}"));
    fs::write(&draft, digest)?;
    fs::rename(&draft, entry).inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn old(path: &Path) {
        // The change time of the inode cannot be set, so the digest of a new file is
        // computed each time.
        let hour = SystemTime::now() - Duration::from_secs(3600);
        File::open(path).unwrap().set_modified(hour).unwrap();
    }

    #[test]
    fn a_digest_is_that_of_the_contents() {
        let directory = tempfile::tempdir().unwrap();
        let (path, cache) = (directory.path().join("f"), directory.path().join("cache"));
        fs::write(&path, "abc").unwrap();
        old(&path);
        assert_eq!(file_digest(&path, &cache).unwrap(), ABC);
        // The file changes to the same length and modification time: the change is
        // detected, because the digest of a new file is not cached.
        fs::write(&path, "abd").unwrap();
        old(&path);
        assert_ne!(file_digest(&path, &cache).unwrap(), ABC);
        assert!(file_digest(&directory.path().join("none"), &cache).is_err());
    }

    #[test]
    fn a_known_digest_is_not_computed_again_and_a_broken_one_is() {
        let directory = tempfile::tempdir().unwrap();
        let cache = directory.path().join("cache");
        // The test program has been unchanged for a while; if not, nothing was cached.
        let path = Path::new("/proc/self/exe");
        let first = file_digest(path, &cache).unwrap();
        let Some(entry) = fs::read_dir(cache.join("digests"))
            .ok()
            .and_then(|mut entries| entries.next())
        else {
            assert!(!is_settled(&File::open(path).unwrap().metadata().unwrap()));
            return;
        };
        let entry = entry.unwrap().path();
        fs::write(&entry, "0".repeat(LEN)).unwrap();
        assert_eq!(file_digest(path, &cache).unwrap(), "0".repeat(LEN));
        fs::write(&entry, "short").unwrap();
        assert_eq!(file_digest(path, &cache).unwrap(), first);
    }
}
