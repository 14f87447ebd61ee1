//! A TCP port of the host whose connections go to one target in the guest.

use std::io;
use std::net::{SocketAddr, TcpListener};

use sm_devices_vsock::{Limit, MuxerHandle};
use sm_event_loop::EventLoopHandle;

use crate::acceptor::BACKLOG;
use crate::listening::FrontendListener;
use crate::service::FrontendService;
use crate::{Error, ForwardTarget, FrontendHandle, LocalAddress};

const FRONTEND: &str = "tcp";

/// Builder of a TCP frontend.
#[derive(Clone, Debug)]
pub struct TcpFrontend {
    address: SocketAddr,
    target: ForwardTarget,
    limit: Limit,
}

impl TcpFrontend {
    /// Creates a frontend that will listen on `address`; with port 0, the system chooses
    /// a port. Everyone who reaches the address reaches the guest: use a loopback address
    /// unless that is intended.
    #[must_use]
    pub fn new(address: SocketAddr, target: ForwardTarget) -> Self {
        Self {
            address,
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
    /// # Errors
    /// The port is in use, the address is not one of this host, or a system call failed.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<FrontendHandle, Error> {
        let (listener, bound) = bind(FRONTEND, self.address)?;
        let service = FrontendService::new(format!("{FRONTEND} {bound}"), muxer, self.limit);
        let listening = FrontendListener::new(listener, self.target, service.clone());
        FrontendHandle::start(
            listening,
            LocalAddress::Tcp(bound),
            None,
            service,
            event_loop,
        )
        .map_err(failed(FRONTEND, "wait for connections on", bound))
    }
}

/// Creates a non-blocking listener, and returns it with its address.
pub(crate) fn bind(
    frontend: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), Error> {
    let listener = TcpListener::bind(address).map_err(failed(frontend, "listen on", address))?;
    let prepared = listener.set_nonblocking(true).and_then(|()| {
        // The standard library's backlog of 128 is too short for bursts.
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(())
    });
    prepared.map_err(failed(frontend, "listen on", address))?;
    let bound = listener
        .local_addr()
        .map_err(failed(frontend, "read the address of", address))?;
    Ok((listener, bound))
}

pub(crate) fn failed(
    frontend: &'static str,
    operation: &'static str,
    address: SocketAddr,
) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::AddrInUse => Error::PortInUse { frontend, address },
        _ => Error::Tcp {
            frontend,
            operation,
            address,
            source,
        },
    }
}
