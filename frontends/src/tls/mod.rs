//! A TCP port of the host that speaks TLS; the guest sees plain bytes.
//!
//! A connection is decrypted on the event loop, between its socket and one end of
//! a socket pair whose other end the muxer has: what the guest gets and sends
//! takes the same way as a plain connection, and so does a slow reader's
//! back-pressure. Where a connection goes can depend on the server name it asked
//! for. Nothing of a client reaches the guest before its handshake is complete.

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

use self::identity::Identity;
use self::listening::{Listening, Targets};
use crate::service::Service;
use crate::tcp::{bind, failed};
use crate::{Error, FrontendHandle, LocalAddress, Target};

/// Time that a handshake, and hanging up at the end, may take.
const PATIENCE: Duration = Duration::from_secs(10);
const FRONTEND: &str = "tls";

/// What the frontend shows its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsIdentity {
    /// A chain of certificates and its key, PEM files. They are read again when
    /// they change; as long as they then make no sense, the old ones stay.
    Files {
        /// The certificates, the server's own first.
        certificates: PathBuf,
        /// Its private key.
        key: PathBuf,
    },
    /// A key made for this frontend, signed by itself.
    SelfSigned {
        /// Host names and IP addresses it is for.
        names: Vec<String>,
    },
}

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct TlsFrontend {
    address: SocketAddr,
    identity: TlsIdentity,
    target: Target,
    names: HashMap<String, Target>,
    protocols: Vec<Vec<u8>>,
    limit: Limit,
    patience: Duration,
}

impl TlsFrontend {
    /// A frontend that will listen on `address` (with port 0, on a port of the
    /// system's choice) and send connections to `target`.
    #[must_use]
    pub fn new(address: SocketAddr, identity: TlsIdentity, target: Target) -> Self {
        Self {
            address,
            identity,
            target,
            names: HashMap::new(),
            protocols: Vec::new(),
            limit: Limit::none(),
            patience: PATIENCE,
        }
    }

    /// Takes descriptors, three for each connection, from this limit. When there
    /// are none left, connections wait in the system's backlog.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// How long a client may take for its handshake, and for hanging up when the
    /// guest has ended the connection: 10 s unless this is called.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sends connections that ask for the server `name` (SNI) to another target.
    #[must_use]
    pub fn server_name(mut self, name: &str, target: Target) -> Self {
        self.names.insert(name.to_ascii_lowercase(), target);
        self
    }

    /// Offers an application protocol (ALPN), after those offered before. Offer
    /// what the guest speaks, such as `h2`; without any, none is negotiated.
    #[must_use]
    pub fn protocol(mut self, protocol: &str) -> Self {
        self.protocols.push(protocol.as_bytes().to_vec());
        self
    }

    /// Starts listening.
    ///
    /// # Errors
    /// The certificate or the key is of no use, the port is taken, the address is
    /// not this host's, or the system refused.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<FrontendHandle, Error> {
        let identity = Identity::load(self.identity, self.protocols)?;
        let certificate = identity.self_signed().map(str::to_owned);
        let (listener, address) = bind(FRONTEND, self.address)?;
        let service = Service::new(format!("{FRONTEND} {address}"), muxer, self.limit);
        let targets = Targets {
            any: self.target,
            names: self.names,
        };
        let failed = || failed(FRONTEND, "wait for connections on", address);
        let listening = Listening::new(listener, identity, targets, self.patience, service.clone())
            .map_err(failed())?;
        let address = LocalAddress::Tcp(address);
        let handle = FrontendHandle::start(listening, address, None, service, event_loop)
            .map_err(failed())?;
        Ok(handle.with_certificate(certificate))
    }
}
