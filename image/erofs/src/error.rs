//! Why there is no image.

use std::fmt;
use std::io;

/// An error of this crate.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The image cannot be written.
    Write(io::Error),
    /// Contents of a file cannot be read.
    Read(io::Error),
    /// The tree does not fit the format; says what is too large.
    TooLarge(&'static str),
    /// An entry has no place in a tree.
    Entry {
        /// The entry's path.
        path: Vec<u8>,
        /// Why.
        reason: &'static str,
    },
    /// A directory, or something in it, cannot be read.
    Directory {
        /// The path.
        path: std::path::PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A tar stream cannot be read.
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
