//! The file mode creation mask of a thread.

#![expect(
    unsafe_code,
    reason = "unshare(2) is unsafe in general, because of CLONE_FILES"
)]

use std::io;

use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

/// Gives the calling thread a file mode creation mask of its own, which is 0: the guest's
/// kernel has applied that of its process. The rest of the process keeps its mask.
///
/// Threads that call [`Server::serve`](crate::Server::serve) should call it first, or modes
/// of new files are reduced by the mask of this process. It also separates the thread's
/// working directory from that of the process.
///
/// # Errors
/// The operating system's error; the mask is unchanged.
pub fn own_umask() -> io::Result<()> {
    // SAFETY: only the working directory, root and mask of this thread are separated; no
    // descriptor is affected.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_the_calling_thread_has_the_mask() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let path = folder.path().join(name);
            rustix::fs::mkdir(&path, Mode::from_raw_mode(0o777)).unwrap();
            path.metadata().unwrap().permissions().mode() & 0o777
        };
        let before = mode("before");
        let path = folder.path().to_owned();
        let own = std::thread::spawn(move || {
            own_umask().unwrap();
            let path = path.join("own");
            rustix::fs::mkdir(&path, Mode::from_raw_mode(0o777)).unwrap();
            path.metadata().unwrap().permissions().mode() & 0o777
        });
        assert_eq!(own.join().unwrap(), 0o777);
        assert_eq!(mode("after"), before);
    }
}
