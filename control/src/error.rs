//! Errors of calls to the process of a VM.

use std::io;

use thiserror::Error;

/// Why a call to a VM's process failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Nothing listens on the VM's socket; its name.
    #[error("VM \"{0}\" is not running")]
    NotRunning(String),
    /// The VM, or its guest, refused; a sentence.
    #[error("{0}")]
    Refused(String),
    /// The VM's process cannot be connected to, or talked to.
    #[error("cannot {operation}")]
    Io {
        /// The operation that failed, after "cannot".
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
