//! A unix socket whose connections go to one place in the guest.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::sockopt::socket_peercred;
use sm_devices_vsock::MuxerHandle;
use sm_vmm_core::event_loop::EventLoopHandle;

use crate::listening::{Listener, Served, serve};
use crate::{Error, Target};

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct UnixFrontend {
    path: PathBuf,
    target: Target,
}

impl UnixFrontend {
    /// A frontend that will listen on `path`.
    #[must_use]
    pub fn new(path: &Path, target: Target) -> Self {
        Self {
            path: path.to_owned(),
            target,
        }
    }

    /// Starts listening.
    ///
    /// The socket appears with mode 0600: it is bound inside a directory that
    /// only this user can enter and then moved into place, so there is no moment
    /// at which others could connect. A socket that nobody listens on any more
    /// is replaced, a live one is not.
    ///
    /// # Errors
    /// The place is taken, or the system refused.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<UnixFrontendHandle, Error> {
        let frontend = self.target.frontend();
        let failed = |operation: &'static str| {
            let path = self.path.clone();
            move |source: io::Error| Error::Io {
                frontend,
                operation,
                path,
                source,
            }
        };
        if UnixStream::connect(&self.path).is_ok() {
            return Err(Error::InUse {
                frontend,
                path: self.path,
            });
        }
        let listener = bind_private(&self.path).map_err(failed("listen on"))?;
        let served = serve(Unix(listener), self.target, muxer, event_loop)
            .map_err(failed("wait for connections on"))?;
        Ok(UnixFrontendHandle {
            path: self.path,
            served,
        })
    }
}

pub(crate) fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    // Short names: a socket's path is limited to 107 bytes.
    let private = tempfile::Builder::new().prefix(".s").tempdir_in(parent)?;
    let inside = private.path().join("s");
    let listener = UnixListener::bind(&inside)?;
    listener.set_nonblocking(true)?;
    fs::set_permissions(&inside, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    fs::rename(&inside, path)?;
    Ok(listener)
}

struct Unix(UnixListener);

impl AsFd for Unix {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener for Unix {
    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let (stream, _) = self.0.accept()?;
        Ok(is_our_own(&stream)?.then(|| OwnedFd::from(stream)))
    }
}

/// Whether the peer is of the same user, which a directory that was opened up by
/// mistake does not ensure.
pub(crate) fn is_our_own(stream: &UnixStream) -> io::Result<bool> {
    let peer = socket_peercred(stream)?;
    let ours = peer.uid == rustix::process::geteuid();
    if !ours {
        tracing::warn!(
            uid = peer.uid.as_raw(),
            "another user was refused on a frontend's socket"
        );
    }
    Ok(ours)
}

/// A frontend that listens. Dropping it closes the listener and unlinks the
/// socket; connections that were accepted go on.
#[derive(Debug)]
pub struct UnixFrontendHandle {
    path: PathBuf,
    served: Served,
}

impl UnixFrontendHandle {
    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.served.counters.accepted()
    }

    /// Connections of other users, refused so far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.served.counters.refused()
    }
}

impl Drop for UnixFrontendHandle {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sm_devices_vsock::{Vsock, VsockConfig};
    use sm_vmm_core::event_loop::EventLoop;
    use std::os::unix::fs::PermissionsExt as _;

    fn start(path: &Path, event_loop: &EventLoop) -> Result<UnixFrontendHandle, Error> {
        let (_device, muxer) = Vsock::new(VsockConfig::default()).unwrap();
        UnixFrontend::new(path, Target::Exec).start(muxer, &event_loop.handle())
    }

    #[test]
    fn the_socket_is_private_and_goes_away_with_its_handle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exec.sock");
        let event_loop = EventLoop::spawn("test").unwrap();
        let handle = start(&path, &event_loop).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(handle);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_live_socket_is_not_replaced_and_a_stale_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let event_loop = EventLoop::spawn("test").unwrap();
        drop(UnixListener::bind(&path).unwrap()); // stale: nobody listens
        let first = start(&path, &event_loop).unwrap();
        let error = start(&path, &event_loop).unwrap_err();
        assert!(matches!(error, Error::InUse { .. }), "{error}");
        drop(first);
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let event_loop = EventLoop::spawn("test").unwrap();
        let file = dir.path().join("data");
        fs::write(&file, "precious").unwrap();
        let error = start(&file, &event_loop).unwrap_err();
        assert!(error.to_string().contains("socket"), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
}
