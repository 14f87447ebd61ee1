//! What can go wrong with a snapshot.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a snapshot cannot be written, read or used.
#[derive(Debug, Error)]
pub enum Error {
    /// The file system refused.
    #[error("cannot {operation} \"{}\"", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No snapshot of that name or identifier.
    #[error("there is no snapshot \"{name}\"")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// The name is taken.
    #[error("a snapshot named \"{name}\" exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// A name that could not be a directory entry, or is reserved.
    #[error("\"{name}\" is not a snapshot name: {reason}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file of the snapshot was cut short, altered or swapped.
    #[error("snapshot file \"{}\" is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// Written by a later version of this software.
    #[error(
        "snapshot \"{}\" has format {found}, and this version reads up to {supported}: \
         use a newer sm, or make the snapshot again", path.display()
    )]
    Newer {
        /// The snapshot's directory.
        path: PathBuf,
        /// Its format version.
        found: u32,
        /// The highest version this code reads.
        supported: u32,
    },
    /// Written by an earlier version whose format is no longer read.
    #[error(
        "snapshot \"{}\" has format {found}, which this version no longer reads: \
         make the snapshot again", path.display()
    )]
    Older {
        /// The snapshot's directory.
        path: PathBuf,
        /// Its format version.
        found: u32,
    },
    /// Whole, but not for this host, kernel or agent.
    #[error("snapshot \"{name}\" cannot be used here: {reason}")]
    Incompatible {
        /// The snapshot.
        name: String,
        /// What does not match.
        reason: String,
    },
    /// The parent a diff builds on is gone or is another one.
    #[error("snapshot \"{name}\" builds on \"{parent}\", which {reason}")]
    Parent {
        /// The snapshot.
        name: String,
        /// The parent it names.
        parent: String,
        /// What is wrong with the parent.
        reason: String,
    },
    /// The chain of parents is too long.
    #[error("snapshot \"{name}\" has more than {limit} ancestors: flatten it first")]
    TooDeep {
        /// The snapshot.
        name: String,
        /// The limit.
        limit: usize,
    },
    /// Its memory is in more pieces than can be mapped.
    #[error(
        "the memory of snapshot \"{name}\" is in {pieces} pieces, and at most {limit} can be \
         mapped: flatten it first"
    )]
    Fragmented {
        /// The snapshot.
        name: String,
        /// How many.
        pieces: usize,
        /// The limit.
        limit: usize,
    },
    /// The caller wanted it no longer.
    #[error("making the snapshot was given up")]
    GivenUp,
    /// Something still uses the snapshot.
    #[error("snapshot \"{name}\" is in use by {user}")]
    InUse {
        /// The snapshot.
        name: String,
        /// By what.
        user: String,
    },
    /// The machine refused.
    #[error("cannot {operation}")]
    Machine {
        /// What was tried.
        operation: &'static str,
        /// The machine's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// An error of the file system.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }

    /// A damaged file.
    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
