//! Why a frontend does not listen.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

/// Why a frontend cannot be started. Names frontend, endpoint and cause.
#[derive(Debug, Error)]
pub enum Error {
    /// Another process listens there.
    #[error("the {frontend} frontend cannot listen on \"{}\": another process does", path.display())]
    InUse {
        /// Kind of frontend.
        frontend: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// Something else than a socket is there.
    #[error(
        "the {frontend} frontend cannot listen on \"{}\": there is something that is not a socket",
        path.display()
    )]
    NotASocket {
        /// Kind of frontend.
        frontend: &'static str,
        /// What is there.
        path: PathBuf,
    },
    /// A socket of another user is there.
    #[error(
        "the {frontend} frontend cannot listen on \"{}\": there is a socket of another user",
        path.display()
    )]
    OtherUsers {
        /// Kind of frontend.
        frontend: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// The system refused.
    #[error("the {frontend} frontend cannot {operation} \"{}\"", path.display())]
    Io {
        /// Kind of frontend.
        frontend: &'static str,
        /// What was tried.
        operation: &'static str,
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Another process listens on the TCP port.
    #[error("the {frontend} frontend cannot listen on {address}: the port is in use")]
    PortInUse {
        /// Kind of frontend.
        frontend: &'static str,
        /// The address asked for.
        address: SocketAddr,
    },
    /// The system refused a TCP socket.
    #[error("the {frontend} frontend cannot {operation} {address}")]
    Tcp {
        /// Kind of frontend.
        frontend: &'static str,
        /// What was tried.
        operation: &'static str,
        /// The address asked for.
        address: SocketAddr,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// What the TLS frontend was to show its clients is of no use.
    #[cfg(feature = "tls")]
    #[error("the tls frontend cannot {operation} \"{}\": {reason}", path.display())]
    Identity {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// No certificate could be made.
    #[cfg(feature = "tls")]
    #[error("the tls frontend cannot sign a certificate of its own: {reason}")]
    SelfSigned {
        /// Why not.
        reason: String,
    },
}
