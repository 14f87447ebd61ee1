//! Errors of starting a frontend.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

/// An error of starting a frontend: names the frontend, the endpoint and the cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process listens on the socket.
    #[error("the {frontend} frontend cannot listen on \"{}\": another process listens there", path.display())]
    InUse {
        /// Kind of frontend.
        frontend: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error(
        "the {frontend} frontend cannot listen on \"{}\": it exists and is not a socket",
        path.display()
    )]
    NotASocket {
        /// Kind of frontend.
        frontend: &'static str,
        /// The path of the other file.
        path: PathBuf,
    },
    /// The path is a socket of another user.
    #[error(
        "the {frontend} frontend cannot listen on \"{}\": it is a socket of another user",
        path.display()
    )]
    OtherUsers {
        /// Kind of frontend.
        frontend: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// A system call on the socket failed.
    #[error("the {frontend} frontend cannot {operation} \"{}\"", path.display())]
    Io {
        /// Kind of frontend.
        frontend: &'static str,
        /// The operation that failed.
        operation: &'static str,
        /// The socket.
        path: PathBuf,
        /// The error of the system call.
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
    /// A system call on a TCP socket failed.
    #[error("the {frontend} frontend cannot {operation} {address}")]
    Tcp {
        /// Kind of frontend.
        frontend: &'static str,
        /// The operation that failed.
        operation: &'static str,
        /// The address asked for.
        address: SocketAddr,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The certificate or key of the TLS frontend cannot be used.
    #[cfg(feature = "tls")]
    #[error("the tls frontend cannot {operation} \"{}\": {reason}", path.display())]
    Identity {
        /// The operation that failed.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// No self-signed certificate could be created.
    #[cfg(feature = "tls")]
    #[error("the tls frontend cannot create a self-signed certificate: {reason}")]
    SelfSigned {
        /// The cause.
        reason: String,
    },
}
