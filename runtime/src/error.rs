//! Errors of operations on VMs.

use std::io;
use std::path::PathBuf;

use sm_control::ControlError;
use sm_control::workload::WorkloadError;
use thiserror::Error;

use crate::home::HomeError;
use crate::record::{Record, RecordError};

/// An error of this crate.
#[derive(Debug, Error)]
pub enum Error {
    /// The directories cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// A record cannot be created, found or removed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Image and options result in no command.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// No kernel can be booted.
    #[error(transparent)]
    Kernel(#[from] crate::kernel::KernelError),
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] sm_image::Error),
    /// A snapshot cannot be used or removed.
    #[error(transparent)]
    Snapshot(#[from] sm_snapshot::Error),
    /// An option is out of range; a sentence.
    #[error("{0}")]
    Option(String),
    /// The VMM process cannot be started, or the connection to it failed.
    #[error("cannot {operation}")]
    Vmm {
        /// The operation that failed.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file that is needed to start a VM cannot be used.
    #[error("cannot {operation} {path:?}")]
    File {
        /// The operation that failed.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The VM did not start its workload; a sentence, followed by the last lines of the
    /// guest's console if there are any.
    #[error("{message}")]
    Start {
        /// The sentence.
        message: String,
        /// Docker's exit status: 126, 127, or 125.
        status: u32,
    },
    /// The VM is not running.
    #[error("VM \"{0}\" is not running")]
    NotRunning(String),
    /// The VM, or its guest, refused an operation; a sentence.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// Returns the exit status of Docker's command line for this failure.
    #[must_use]
    pub fn exit_status(&self) -> u32 {
        match self {
            Self::Start { status, .. } => *status,
            _ => 125,
        }
    }

    /// Returns the error for a VM whose process does not exist.
    pub(crate) fn not_running(record: &Record) -> Self {
        match record.state() {
            Err(RecordError::NotFound(name)) => RecordError::NotFound(name).into(),
            _ => Self::NotRunning(record.config().name.clone()),
        }
    }
}

impl From<ControlError> for Error {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::NotRunning(name) => Self::NotRunning(name),
            ControlError::Refused(text) => Self::Refused(text),
            ControlError::Io { operation, source } => Self::Vmm { operation, source },
            // A kind of error that was added to the enum later.
            other => Self::Vmm {
                operation: "talk to the VM's process",
                source: io::Error::other(other),
            },
        }
    }
}
