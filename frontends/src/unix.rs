//! A unix socket whose connections go to one target in the guest.

use std::path::{Path, PathBuf};

use sm_devices_vsock::{Limit, MuxerHandle};
use sm_event_loop::EventLoopHandle;

use crate::listening::Listening;
use crate::place;
use crate::service::Service;
use crate::{Error, FrontendHandle, LocalAddress, Target};

/// Builder of a unix socket frontend.
#[derive(Clone, Debug)]
pub struct UnixFrontend {
    path: PathBuf,
    target: Target,
    limit: Limit,
}

impl UnixFrontend {
    /// Creates a frontend that will listen on `path`.
    #[must_use]
    pub fn new(path: &Path, target: Target) -> Self {
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
        let (listener, place) = place::listen(frontend, &self.path)?;
        let name = format!("{frontend} {}", self.path.display());
        let service = Service::new(name, muxer, self.limit);
        let listening = Listening::new(listener, self.target, service.clone());
        let address = LocalAddress::Unix(self.path.clone());
        FrontendHandle::start(listening, address, Some(place), service, event_loop).map_err(
            place::failed(frontend, "wait for connections on", &self.path),
        )
    }
}
