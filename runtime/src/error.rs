//! What can go wrong between a caller and a VM.

use std::io;
use std::path::PathBuf;

use sm_control::ControlError;
use sm_control::workload::WorkloadError;
use thiserror::Error;

use crate::home::HomeError;
use crate::record::{Record, RecordError};

/// Why an operation of this crate failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The directories cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// A record cannot be made, found or removed.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Image and options do not make a command.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// There is no kernel to boot.
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
    /// The VMM process cannot be started or talked to.
    #[error("cannot {operation}")]
    Vmm {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file that starting a VM needs cannot be used.
    #[error("cannot {operation} {path:?}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The VM did not come to run its workload; a sentence, with the last
    /// lines of the guest's console where there are any.
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
    /// The VM, or its guest, refused; a sentence.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// The exit status that Docker's command line gives such a failure.
    #[must_use]
    pub fn exit_status(&self) -> u32 {
        match self {
            Self::Start { status, .. } => *status,
            _ => 125,
        }
    }

    /// The error for a VM that is not there to be asked.
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
            // A kind of failure that this version does not know apart.
            other => Self::Vmm {
                operation: "talk to the VM's process",
                source: io::Error::other(other),
            },
        }
    }
}
