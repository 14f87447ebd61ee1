//! A unix socket whose connections go to one place in the guest.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::net::sockopt::socket_peercred;
use sm_devices_vsock::{ConnectOptions, MuxerHandle};
use sm_guest_proto::forward::ForwardHeader;
use sm_guest_proto::port;
use sm_vmm_core::event_loop::{
    EventHandler, EventLoopHandle, HandlerId, Interest, Readiness, Registry,
};

use crate::Error;

/// Connections accepted before other handlers get their turn.
const BATCH: usize = 64;

/// Where a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The agent's exec server: the client speaks the exec protocol itself.
    Exec,
    /// A TCP port in the guest, by the agent's forwarder.
    Tcp(ForwardHeader),
    /// A vsock port in the guest.
    Vsock(u32),
}

impl Target {
    fn frontend(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Tcp(_) | Self::Vsock(_) => "unix",
        }
    }

    /// Vsock port and what is sent first.
    fn open(self) -> (u32, ConnectOptions) {
        match self {
            Self::Exec => (port::EXEC, ConnectOptions::default()),
            Self::Vsock(port) => (port, ConnectOptions::default()),
            Self::Tcp(header) => (
                port::FORWARD,
                ConnectOptions {
                    preamble: header.encode().to_vec(),
                    status_reply: true,
                    on_result: None,
                },
            ),
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
}

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
        let counters = Arc::new(Counters::default());
        let handler = Listening {
            listener,
            target: self.target,
            muxer,
            counters: Arc::clone(&counters),
        };
        let id = event_loop
            .add_handler(Arc::new(Mutex::new(handler)))
            .map_err(failed("wait for connections on"))?;
        Ok(UnixFrontendHandle {
            path: self.path,
            counters,
            event_loop: event_loop.clone(),
            id,
        })
    }
}

fn bind_private(path: &Path) -> io::Result<UnixListener> {
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

/// The frontend's part on the event loop.
struct Listening {
    listener: UnixListener,
    target: Target,
    muxer: MuxerHandle,
    counters: Arc<Counters>,
}

impl Listening {
    fn accept(&self) -> io::Result<()> {
        let (stream, _) = self.listener.accept()?;
        let peer = socket_peercred(&stream)?;
        if peer.uid != rustix::process::geteuid() {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                uid = peer.uid.as_raw(),
                "another user was refused on a frontend's socket"
            );
            return Ok(());
        }
        self.counters.accepted.fetch_add(1, Ordering::Relaxed);
        let (port, options) = self.target.open();
        self.muxer.connect(port, OwnedFd::from(stream), options);
        Ok(())
    }
}

impl EventHandler for Listening {
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        registry.add(&self.listener, 0, Interest::READ)?;
        Ok(())
    }

    fn ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut Registry<'_>) {
        for _ in 0..BATCH {
            match self.accept() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    return;
                }
            }
        }
    }
}

/// A frontend that listens. Dropping it closes the listener and unlinks the
/// socket; connections that were accepted go on.
#[derive(Debug)]
pub struct UnixFrontendHandle {
    path: PathBuf,
    counters: Arc<Counters>,
    event_loop: EventLoopHandle,
    id: HandlerId,
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
        self.counters.accepted.load(Ordering::Relaxed)
    }

    /// Connections of other users, refused so far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.counters.refused.load(Ordering::Relaxed)
    }
}

impl Drop for UnixFrontendHandle {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // Fails when the loop has stopped: then nothing listens any more either.
        let _ = self.event_loop.remove_handler(self.id);
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
}
