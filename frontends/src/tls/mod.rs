//! A TCP port of the host that speaks TLS; the guest receives plain bytes.
//!
//! The event loop decrypts a connection between its socket and one end of a socket pair
//! whose other end the muxer has: the bytes of the guest take the same path as those of a
//! plain connection, including the back-pressure of a slow reader. The target of a
//! connection can depend on the requested server name (SNI). No byte of a client reaches
//! the guest before its handshake is complete.

mod identity;
mod listening;
mod session;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use sm_devices_vsock::{Limit, MuxerHandle};
use sm_event_loop::EventLoopHandle;

use self::identity::CurrentIdentity;
use self::listening::{Targets, TlsListener};
use crate::service::FrontendService;
use crate::tcp::{bind, failed};
use crate::{Error, ForwardTarget, FrontendHandle, LocalAddress};

/// Time limit of the handshake, and of closing.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const FRONTEND: &str = "tls";

/// The identity that the frontend presents to its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TlsIdentity {
    /// A chain of certificates and its key, PEM files. They are read again when they
    /// change; if the new ones are invalid, the old ones stay in use.
    Files {
        /// The certificates, the server's own first.
        certificates: PathBuf,
        /// Its private key.
        key: PathBuf,
    },
    /// A key created for this frontend, with a self-signed certificate.
    SelfSigned {
        /// Host names and IP addresses of the certificate.
        names: Vec<String>,
    },
}

/// Builder of a TLS frontend.
#[derive(Clone, Debug)]
pub struct TlsFrontend {
    address: SocketAddr,
    identity: TlsIdentity,
    target: ForwardTarget,
    names: HashMap<String, ForwardTarget>,
    protocols: Vec<Vec<u8>>,
    limit: Limit,
    handshake_timeout: Duration,
}

impl TlsFrontend {
    /// Creates a frontend that will listen on `address` (with port 0, the system chooses
    /// a port) and forward connections to `target`.
    #[must_use]
    pub fn new(address: SocketAddr, identity: TlsIdentity, target: ForwardTarget) -> Self {
        Self {
            address,
            identity,
            target,
            names: HashMap::new(),
            protocols: Vec::new(),
            limit: Limit::none(),
            handshake_timeout: HANDSHAKE_TIMEOUT,
        }
    }

    /// Sets the limit from which each connection takes three descriptors. Connections
    /// beyond it wait in the kernel's backlog.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// Sets the time limit of a client's handshake, and of its closing after the guest
    /// has ended the connection. The default is 10 s.
    #[must_use]
    pub fn handshake_timeout(mut self, handshake_timeout: Duration) -> Self {
        self.handshake_timeout = handshake_timeout;
        self
    }

    /// Forwards connections that request the server `name` (SNI) to another target.
    #[must_use]
    pub fn server_name(mut self, name: &str, target: ForwardTarget) -> Self {
        self.names.insert(name.to_ascii_lowercase(), target);
        self
    }

    /// Offers an application protocol (ALPN), after those offered before. It should be
    /// one that the guest speaks, such as `h2`; without any, none is negotiated.
    #[must_use]
    pub fn protocol(mut self, protocol: &str) -> Self {
        self.protocols.push(protocol.as_bytes().to_vec());
        self
    }

    /// Starts listening.
    ///
    /// # Errors
    /// The certificate or the key cannot be used, the port is in use, the address is not
    /// one of this host, or a system call failed.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<FrontendHandle, Error> {
        let identity = CurrentIdentity::load(self.identity, self.protocols)?;
        let certificate = identity.self_signed().map(str::to_owned);
        let (listener, address) = bind(FRONTEND, self.address)?;
        let service = FrontendService::new(format!("{FRONTEND} {address}"), muxer, self.limit);
        let targets = Targets {
            any: self.target,
            names: self.names,
        };
        let failed = || failed(FRONTEND, "wait for connections on", address);
        let listening = TlsListener::new(
            listener,
            identity,
            targets,
            self.handshake_timeout,
            service.clone(),
        );
        let address = LocalAddress::Tcp(address);
        let handle = FrontendHandle::start(listening, address, None, service, event_loop)
            .map_err(failed())?;
        Ok(handle.with_certificate(certificate))
    }
}
