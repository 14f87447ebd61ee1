//! Errors of reading trees and writing images.

use std::fmt;
use std::io;

/// An error of this crate.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Writing the image failed.
    Write(io::Error),
    /// Reading the contents of a file failed.
    Read(io::Error),
    /// The tree exceeds a limit of the format, which the text names.
    TooLarge(&'static str),
    /// An entry cannot be added to a tree.
    Entry {
        /// The entry's path.
        path: Vec<u8>,
        /// The reason.
        reason: &'static str,
    },
    /// A directory, or a file in it, cannot be read.
    Directory {
        /// The path of the file or directory.
        path: std::path::PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Reading the tar stream failed.
    Tar(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write(_) => f.write_str("cannot write the image"),
            Self::Read(_) => f.write_str("cannot read the contents of a file"),
            Self::TooLarge(what) => write!(f, "the tree does not fit an EROFS image: {what}"),
            Self::Entry { path, reason } => {
                write!(f, "entry \"{}\": {reason}", path.escape_ascii())
            }
            Self::Directory { path, .. } => write!(f, "cannot read {path:?}"),
            Self::Tar(_) => f.write_str("cannot read the tar stream"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Write(source)
            | Self::Read(source)
            | Self::Directory { source, .. }
            | Self::Tar(source) => Some(source),
            Self::TooLarge(_) | Self::Entry { .. } => None,
        }
    }
}
