//! Classification of errors.

use std::fmt;
use std::io;

use super::Error;

/// The kind of an [`Error`](enum@crate::Error).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A reference, a name or a platform is invalid.
    InvalidName,
    /// There is no such image, or none for the platform.
    NotFound,
    /// Several images match.
    Ambiguous,
    /// A registry or an engine refuses access, with or without credentials.
    Unauthorized,
    /// A host cannot be found or reached, or the connection to it broke.
    Unreachable,
    /// A registry or an engine reports an error, or does not follow its protocol.
    Service,
    /// Data of an image is malformed, or does not match its digest.
    Damaged,
    /// An image exceeds a limit of its format or of [`Limits`](crate::Limits).
    LimitExceeded,
    /// A source or a format is not supported.
    Unsupported,
    /// A snapshot needs the image.
    InUse,
    /// There is not enough space.
    NoSpace,
    /// The operation was cancelled.
    Cancelled,
    /// A file of the host cannot be read or written.
    Io,
    /// None of the other kinds.
    Other,
}

/// The reason of an [`Error`](enum@crate::Error): a sentence, which [`fmt::Display`] writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    text: String,
    /// `None` for the usual kind of the error.
    kind: Option<ErrorKind>,
}

impl Cause {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            kind: Some(kind),
        }
    }

    /// Creates the cause with the text of an I/O error.
    pub(crate) fn of(error: &io::Error) -> Self {
        Self::with(error.to_string(), error)
    }

    /// Creates a cause with a text about an I/O error.
    pub(crate) fn with(text: impl Into<String>, error: &io::Error) -> Self {
        Self {
            text: text.into(),
            kind: kind_of(error),
        }
    }

    /// Creates the cause with the text of an error of reading a stream, which is of the
    /// kind [`ErrorKind::Damaged`] if its contents are malformed or end too early.
    #[cfg(feature = "archive")]
    pub(crate) fn of_stream(error: &io::Error) -> Self {
        use io::ErrorKind as Kind;

        let damaged = [Kind::InvalidData, Kind::InvalidInput, Kind::UnexpectedEof];
        Self::of(error).or(match damaged.contains(&error.kind()) {
            true => ErrorKind::Damaged,
            false => ErrorKind::Io,
        })
    }

    /// Sets the kind, if there is none.
    pub(crate) fn or(self, kind: ErrorKind) -> Self {
        Self {
            kind: self.kind.or(Some(kind)),
            ..self
        }
    }

    /// Returns the kind, if it differs from the usual one of the error.
    pub(super) fn kind(&self) -> Option<ErrorKind> {
        self.kind
    }

    /// Prepends the path of the file that it is about.
    #[cfg(feature = "archive")]
    pub(crate) fn after(self, path: &std::path::Path) -> Self {
        Self {
            text: format!("{path:?}: {self}"),
            ..self
        }
    }

    /// Appends to the text.
    #[cfg(feature = "registry")]
    pub(crate) fn followed_by(&self, text: impl fmt::Display) -> Self {
        Self {
            text: format!("{self}{text}"),
            kind: self.kind,
        }
    }

    /// Replaces the kind.
    #[cfg(feature = "registry")]
    pub(crate) fn of_kind(self, kind: ErrorKind) -> Self {
        Self {
            kind: Some(kind),
            ..self
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Streams report it as the source of an [`io::Error`].
impl std::error::Error for Cause {}

impl From<String> for Cause {
    fn from(text: String) -> Self {
        Self { text, kind: None }
    }
}

impl From<&str> for Cause {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        Self::of(&error)
    }
}

impl From<sm_tar::TarReason> for Cause {
    fn from(reason: sm_tar::TarReason) -> Self {
        match reason {
            sm_tar::TarReason::Io(error) => Self::of(&error),
            other => other.to_string().into(),
        }
    }
}

impl From<serde_json::Error> for Cause {
    fn from(error: serde_json::Error) -> Self {
        error.to_string().into()
    }
}

/// Returns the kind of an I/O error: that of the error of this crate in it, or one that
/// its own kind implies.
pub(super) fn kind_of(error: &io::Error) -> Option<ErrorKind> {
    use io::ErrorKind as Kind;

    if let Some(inner) = error.get_ref() {
        if let Some(error) = inner.downcast_ref::<Error>() {
            return Some(error.kind());
        }
        if let Some(cause) = inner.downcast_ref::<Cause>() {
            return cause.kind;
        }
    }
    match error.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => Some(ErrorKind::NoSpace),
        Kind::ConnectionRefused
        | Kind::ConnectionReset
        | Kind::ConnectionAborted
        | Kind::HostUnreachable
        | Kind::NetworkUnreachable
        | Kind::NotConnected
        | Kind::TimedOut => Some(ErrorKind::Unreachable),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn kinds_survive_streams_and_texts() {
        let refused = Error::Registry {
            registry: "r".to_owned(),
            reason: Cause::new(ErrorKind::Unauthorized, "no"),
        };
        let cause = Cause::of(&io::Error::other(refused));
        assert_eq!(cause.to_string(), "registry r: no");
        assert_eq!(Error::unknown("x", cause).kind(), ErrorKind::Unauthorized);
        let limit = Cause::new(ErrorKind::LimitExceeded, "too large");
        let read = Error::file("read", Path::new("/x"))(io::Error::other(limit));
        assert_eq!(read.kind(), ErrorKind::LimitExceeded);
    }

    #[test]
    fn errors_of_the_system_have_kinds() {
        let kind = |kind: io::ErrorKind| {
            let layer = Error::Layer {
                layer: "x".to_owned(),
                reason: Cause::of(&kind.into()),
            };
            (layer.kind(), Error::MetadataImage(kind.into()).kind())
        };
        let full = io::ErrorKind::StorageFull;
        assert_eq!(kind(full), (ErrorKind::NoSpace, ErrorKind::NoSpace));
        let denied = io::ErrorKind::PermissionDenied;
        assert_eq!(kind(denied), (ErrorKind::Damaged, ErrorKind::Io));
        let refused = io::ErrorKind::ConnectionRefused;
        assert_eq!(kind(refused).0, ErrorKind::Unreachable);
    }
}
