//! A unix socket whose connections go to one place in the guest.

use std::path::{Path, PathBuf};

use sm_devices_vsock::{Limit, MuxerHandle};
use sm_event_loop::EventLoopHandle;

use crate::listening::Listening;
use crate::place;
use crate::service::Service;
use crate::{Error, FrontendHandle, LocalAddress, Target};

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct UnixFrontend {
    path: PathBuf,
    target: Target,
    limit: Limit,
}

impl UnixFrontend {
    /// A frontend that will listen on `path`.
    #[must_use]
    pub fn new(path: &Path, target: Target) -> Self {
        Self {
            path: path.to_owned(),
            target,
            limit: Limit::none(),
        }
    }

    /// Takes descriptors, one for each connection, from this limit. When there are
    /// none left, connections wait in the system's backlog.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// Starts listening.
    ///
    /// The socket appears with mode 0600: it is bound inside a directory that
    /// only this user can enter and then moved into place, so there is no moment
    /// at which others could connect. A socket of this user that nobody listens on
    /// any more is replaced; a live one is not, and nothing else is. Peers of other
    /// users than this one and root are hung up on.
    ///
    /// # Errors
    /// The place is taken, or the system refused.
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
