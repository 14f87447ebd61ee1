//! Errors of calls to the process of a VM.

use std::io;

use thiserror::Error;

/// Failure of a call to a VM's process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Nothing listens on the socket of the VM with this name.
    #[error("VM \"{0}\" is not running")]
    NotRunning(String),
    /// The VM or its guest refused the call, for this reason.
    #[error("{0}")]
    Refused(String),
    /// Connecting to the VM's process, or exchanging messages with it, failed.
    #[error("cannot {operation}")]
    Io {
        /// The operation that failed, after "cannot".
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
