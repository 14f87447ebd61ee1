//! Errors of snapshot operations.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Failure to write, read or use a snapshot.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A file system operation failed.
    #[error("cannot {operation} \"{}\"", path.display())]
    Io {
        /// The operation, after "cannot".
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No snapshot has this name.
    #[error("there is no snapshot \"{name}\"")]
    NotFound {
        /// The requested name.
        name: String,
    },
    /// The name is in use.
    #[error("a snapshot named \"{name}\" exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// A name that cannot be a directory entry, or is reserved.
    #[error("\"{name}\" is not a snapshot name: {reason}")]
    BadName {
        /// The name.
        name: String,
        /// The reason why the name is invalid.
        reason: &'static str,
    },
    /// A file of the snapshot was truncated, modified or replaced.
    #[error("snapshot file \"{}\" is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The difference that was detected.
        reason: String,
    },
    /// Written by a later version of this software.
    #[error(
        "snapshot \"{}\" has format {version}, and this version reads up to {supported}: \
         use a newer sm, or make the snapshot again", path.display()
    )]
    Newer {
        /// The snapshot's directory.
        path: PathBuf,
        /// Its format version.
        version: u32,
        /// The highest version this code reads.
        supported: u32,
    },
    /// Written by an earlier version in a format that is no longer supported.
    #[error(
        "snapshot \"{}\" has format {version}, which this version no longer reads: \
         make the snapshot again", path.display()
    )]
    Older {
        /// The snapshot's directory.
        path: PathBuf,
        /// Its format version.
        version: u32,
    },
    /// The snapshot is intact, but does not match this host, kernel or agent.
    #[error("snapshot \"{name}\" cannot be used here: {reason}")]
    Incompatible {
        /// The snapshot.
        name: String,
        /// The mismatch.
        reason: String,
    },
    /// The parent of a diff is missing or was replaced.
    #[error("snapshot \"{name}\" builds on \"{parent}\", which {reason}")]
    Parent {
        /// The snapshot.
        name: String,
        /// The name of its parent.
        parent: String,
        /// The problem with the parent.
        reason: String,
    },
    /// The chain of parents is too long.
    #[error("snapshot \"{name}\" has more than {limit} ancestors: flatten it first")]
    TooDeep {
        /// The snapshot.
        name: String,
        /// The maximum number of ancestors.
        limit: usize,
    },
    /// The memory consists of more pieces than can be mapped.
    #[error(
        "the memory of snapshot \"{name}\" is in {pieces} pieces, and at most {limit} can be \
         mapped: flatten it first"
    )]
    Fragmented {
        /// The snapshot.
        name: String,
        /// Number of pieces.
        pieces: usize,
        /// Maximum number of pieces.
        limit: usize,
    },
    /// The caller cancelled the operation.
    #[error("the creation of the snapshot was cancelled")]
    Cancelled,
    /// The snapshot is in use.
    #[error("snapshot \"{name}\" is in use by {user}")]
    InUse {
        /// The snapshot.
        name: String,
        /// The user of the snapshot.
        user: String,
    },
    /// An operation of the machine failed.
    #[error("cannot {operation}")]
    Machine {
        /// The operation, after "cannot".
        operation: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// Creates a file system error.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }

    /// Creates an error for a corrupt file.
    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
