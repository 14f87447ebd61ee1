//! Errors of operations on files.

use std::io;
use std::path::PathBuf;

use sm_tar::ExtractionError;
use thiserror::Error;

/// The cause of an [`crate::Error::Files`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FilesError {
    /// The guest could not perform the operation.
    #[error("{message}")]
    Guest {
        /// The kind of its failure.
        kind: io::ErrorKind,
        /// A sentence of the guest.
        message: String,
    },
    /// A file of the guest cannot be created on the host.
    #[error(transparent)]
    Extract(#[from] ExtractionError),
    /// A file of the host cannot be used.
    #[error("cannot {operation} {path:?}")]
    Local {
        /// The operation that failed.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A directory would be copied to another file.
    #[error("cannot copy a directory to the file \"{0}\"")]
    DirectoryToFile(String),
    /// The destination is to be a directory, and there is none.
    #[error("the destination directory \"{0}\" does not exist")]
    NoDirectory(String),
    /// The source is to be a directory, and is another file.
    #[error("\"{0}\" is not a directory")]
    NotADirectory(String),
    /// The data to be sent cannot be read.
    #[error("cannot read the data to be sent")]
    Input(#[source] io::Error),
    /// The guest's answer is not one.
    #[error("the guest answered with {0}")]
    Answer(String),
    /// The connection to the guest failed.
    #[error("the connection to the guest failed")]
    Connection(#[source] io::Error),
}

impl FilesError {
    /// Returns the kind of the failure, as for a file of the host.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Guest { kind, .. } => *kind,
            Self::Extract(ExtractionError::Io { source, .. })
            | Self::Local { source, .. }
            | Self::Input(source)
            | Self::Connection(source) => source.kind(),
            Self::Extract(ExtractionError::Conflict { .. }) | Self::DirectoryToFile(_) => {
                io::ErrorKind::AlreadyExists
            }
            Self::Extract(_) | Self::Answer(_) => io::ErrorKind::InvalidData,
            Self::NoDirectory(_) => io::ErrorKind::NotFound,
            Self::NotADirectory(_) => io::ErrorKind::NotADirectory,
        }
    }
}

impl From<FilesError> for io::Error {
    fn from(error: FilesError) -> Self {
        Self::new(error.kind(), error)
    }
}

/// Returns the error that a reader of this crate has wrapped, or one about the connection.
pub(super) fn of_reader(error: io::Error) -> FilesError {
    match error.downcast() {
        Ok(error) => error,
        Err(error) => FilesError::Connection(error),
    }
}
