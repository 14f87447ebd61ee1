//! A unix socket whose connections go to one target in the guest.

use std::path::{Path, PathBuf};

use sm_devices_vsock::{Limit, MuxerHandle};
use sm_event_loop::EventLoopHandle;

use crate::listening::FrontendListener;
use crate::service::FrontendService;
use crate::socket_path;
use crate::{Error, ForwardTarget, FrontendHandle, LocalAddress};

/// Builder of a unix socket frontend.
#[derive(Clone, Debug)]
pub struct UnixFrontend {
    path: PathBuf,
    target: ForwardTarget,
    limit: Limit,
}

impl UnixFrontend {
    /// Creates a frontend that will listen on `path`.
    #[must_use]
    pub fn new(path: &Path, target: ForwardTarget) -> Self {
        Self {
            path: path.to_owned(),
            target,
            limit: Limit::none(),
        }
    }

    /// Sets the limit from which each connection takes one descriptor. Connections beyond
    /// it wait in the kernel's backlog.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// Starts listening.
    ///
    /// The socket appears with mode 0600: it is bound inside a directory that only this
    /// user can enter and then renamed, so that others cannot connect at any moment. A
    /// socket of this user without a listener is replaced; a live one and any other file
    /// are left alone. Connections of peers that are neither this user nor root are
    /// closed.
    ///
    /// # Errors
    /// The path is in use, or a system call failed.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<FrontendHandle, Error> {
        let frontend = self.target.frontend();
        let (listener, socket_path) = socket_path::listen(frontend, &self.path)?;
        let name = format!("{frontend} {}", self.path.display());
        let service = FrontendService::new(name, muxer, self.limit);
        let listening = FrontendListener::new(listener, self.target, service.clone());
        let address = LocalAddress::Unix(self.path.clone());
        FrontendHandle::start(listening, address, Some(socket_path), service, event_loop).map_err(
            socket_path::failed(frontend, "wait for connections on", &self.path),
        )
    }
}
