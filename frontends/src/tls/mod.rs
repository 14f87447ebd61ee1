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
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use sm_devices_vsock::MuxerHandle;
use sm_vmm_core::event_loop::{EventLoopHandle, HandlerId};

use self::identity::Identity;
use self::listening::{Counters, Listening};
use crate::tcp::{bind, failed};
use crate::{Error, Target};

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
        }
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
    ) -> Result<TlsFrontendHandle, Error> {
        let identity = Identity::load(self.identity, self.protocols)?;
        let certificate = identity.self_signed().map(str::to_owned);
        let (listener, address) = bind(FRONTEND, self.address)?;
        let counters = Arc::new(Counters::default());
        let listening = Listening::new(
            listener,
            identity,
            self.target,
            self.names,
            muxer,
            Arc::clone(&counters),
        )
        .map_err(failed(FRONTEND, "wait for connections on", address))?;
        let id = event_loop
            .add_handler(Arc::new(Mutex::new(listening)))
            .map_err(failed(FRONTEND, "wait for connections on", address))?;
        Ok(TlsFrontendHandle {
            address,
            certificate,
            counters,
            event_loop: event_loop.clone(),
            id,
        })
    }
}

/// A frontend that listens. Dropping it closes the listener and the connections
/// it decrypts.
#[derive(Debug)]
pub struct TlsFrontendHandle {
    address: SocketAddr,
    certificate: Option<String>,
    counters: Arc<Counters>,
    event_loop: EventLoopHandle,
    id: HandlerId,
}

impl TlsFrontendHandle {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate it has made itself, in PEM, for clients to trust.
    #[must_use]
    pub fn self_signed_certificate(&self) -> Option<&str> {
        self.certificate.as_deref()
    }

    /// Connections whose handshake was completed.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.counters.accepted.load(Ordering::Relaxed)
    }

    /// Connections that did not get that far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.counters.refused.load(Ordering::Relaxed)
    }
}

impl Drop for TlsFrontendHandle {
    fn drop(&mut self) {
        // Fails when the loop has stopped: then nothing listens any more either.
        let _ = self.event_loop.remove_handler(self.id);
    }
}
