//! Errors of the seam.

use std::io;

use thiserror::Error;

/// Why a backend cannot be opened. Each text is a sentence a person can act on.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The device node does not exist.
    #[error(
        "there is no /dev/kvm on this host: load the kvm_intel or kvm_amd module, \
         or enable (nested) virtualisation"
    )]
    Missing,
    /// The device node exists but may not be opened.
    #[error("no permission to open /dev/kvm: add this user to the group that owns it ({group})")]
    Permission {
        /// Name or number of the owning group.
        group: String,
    },
    /// The host's KVM speaks another API, or lacks something required.
    #[error("/dev/kvm cannot be used: {reason}")]
    Unsupported {
        /// What is missing.
        reason: String,
    },
    /// Opening or asking failed otherwise.
    #[error("cannot {operation} on /dev/kvm")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Why an operation on an open backend failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The hypervisor refused an operation.
    #[error("hypervisor cannot {operation}")]
    Os {
        /// What was tried, with its object.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Saved state does not fit this host or this VM.
    #[error("saved state does not fit: {reason}")]
    State {
        /// What does not fit.
        reason: String,
    },
    /// A request outside what the backend offers.
    #[error("not supported by this backend: {what}")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
}
