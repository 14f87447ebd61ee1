//! A TCP port of the host whose connections go to one place in the guest.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use sm_devices_vsock::MuxerHandle;
use sm_vmm_core::event_loop::EventLoopHandle;

use crate::listening::{Listener, Served, serve};
use crate::{Error, Target};

const FRONTEND: &str = "tcp";

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct TcpFrontend {
    address: SocketAddr,
    target: Target,
}

impl TcpFrontend {
    /// A frontend that will listen on `address`; with port 0, on a port of the
    /// system's choice. Whoever reaches the address reaches the guest: use a
    /// loopback address unless that is wanted.
    #[must_use]
    pub fn new(address: SocketAddr, target: Target) -> Self {
        Self { address, target }
    }

    /// Starts listening.
    ///
    /// # Errors
    /// The port is taken, the address is not this host's, or the system refused.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<TcpFrontendHandle, Error> {
        let (listener, bound) = bind(FRONTEND, self.address)?;
        let served = serve(Tcp(listener), self.target, muxer, event_loop).map_err(failed(
            FRONTEND,
            "wait for connections on",
            bound,
        ))?;
        Ok(TcpFrontendHandle {
            address: bound,
            served,
        })
    }
}

/// A listener that does not block, and its address.
pub(crate) fn bind(
    frontend: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), Error> {
    let listener = TcpListener::bind(address).map_err(failed(frontend, "listen on", address))?;
    listener
        .set_nonblocking(true)
        .map_err(failed(frontend, "listen on", address))?;
    let bound = listener
        .local_addr()
        .map_err(failed(frontend, "tell the address of", address))?;
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

struct Tcp(TcpListener);

impl AsFd for Tcp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener for Tcp {
    fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let (stream, _) = self.0.accept()?;
        // What the guest sent together is sent at once. Not a reason to refuse.
        let _ = stream.set_nodelay(true);
        Ok(Some(OwnedFd::from(stream)))
    }
}

/// A frontend that listens. Dropping it closes the listener; connections that
/// were accepted go on.
#[derive(Debug)]
pub struct TcpFrontendHandle {
    address: SocketAddr,
    served: Served,
}

impl TcpFrontendHandle {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.served.counters.accepted()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpStream};

    use sm_devices_vsock::{Vsock, VsockConfig};
    use sm_vmm_core::event_loop::EventLoop;

    use super::*;

    #[test]
    fn a_port_is_chosen_used_once_and_given_back() {
        let event_loop = EventLoop::spawn("test").unwrap();
        let start = |address: SocketAddr| {
            let (_device, muxer) = Vsock::new(VsockConfig::default()).unwrap();
            TcpFrontend::new(address, Target::Vsock(1)).start(muxer, &event_loop.handle())
        };
        let first = start((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = first.address();
        assert_ne!(address.port(), 0);
        let error = start(address).unwrap_err();
        assert!(matches!(error, Error::PortInUse { .. }), "{error}");
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        TcpStream::connect(address).unwrap();
        drop(first);
        assert!(TcpStream::connect(address).is_err());
        start(address).unwrap();
    }
}
