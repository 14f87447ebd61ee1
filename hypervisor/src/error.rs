//! Errors of the hypervisor interface.

use std::error;
use std::fmt;
use std::io;

use thiserror::Error;

/// Kinds of reasons why a backend cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// The host has no such hypervisor, or it is disabled.
    Missing,
    /// This user or this program has no permission to use it.
    Permission,
    /// The hypervisor lacks something that guests need.
    Unsupported,
    /// A system call failed for another reason.
    Io,
}

/// Failure to open a backend. The backend supplies the texts.
///
/// Displayed as "problem: remedy", or as the problem alone if no remedy is known.
#[derive(Debug)]
pub struct OpenError {
    backend: &'static str,
    kind: OpenErrorKind,
    problem: String,
    remedy: Option<String>,
    source: Option<io::Error>,
}

impl OpenError {
    /// Creates an error of the backend with this short name (see
    /// [`Capabilities::backend`]). `problem` is the backend's finding, without a full stop.
    ///
    /// [`Capabilities::backend`]: crate::Capabilities::backend
    #[must_use]
    pub fn new(backend: &'static str, kind: OpenErrorKind, problem: impl Into<String>) -> Self {
        Self {
            backend,
            kind,
            problem: problem.into(),
            remedy: None,
            source: None,
        }
    }

    /// Adds the remedy for a person at this host.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Adds the operating system's error.
    #[must_use]
    pub fn with_source(mut self, source: io::Error) -> Self {
        self.source = Some(source);
        self
    }

    /// Short name of the backend.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.backend
    }

    /// The kind of the problem.
    #[must_use]
    pub fn kind(&self) -> OpenErrorKind {
        self.kind
    }

    /// The backend's finding.
    #[must_use]
    pub fn problem(&self) -> &str {
        &self.problem
    }

    /// The remedy for a person at this host, if the backend knows one.
    #[must_use]
    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)?;
        match &self.remedy {
            Some(remedy) => write!(f, ": {remedy}"),
            None => Ok(()),
        }
    }
}

impl error::Error for OpenError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        let source = self.source.as_ref()?;
        Some(source)
    }
}

/// Failure of an operation on an open backend.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The hypervisor refused an operation.
    #[error("hypervisor cannot {operation}")]
    Os {
        /// The operation and its object.
        operation: &'static str,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// Saved state does not fit this host or this VM.
    #[error("saved state does not fit: {reason}")]
    State {
        /// The element that does not fit, and the reason.
        reason: String,
    },
    /// A token of a restore belongs to another VM.
    #[error("the restore token of vCPU {vcpu} belongs to another virtual machine")]
    ForeignToken {
        /// Index of the vCPU, in that other VM.
        vcpu: u32,
    },
    /// A request that the backend does not support.
    #[error("not supported by this backend: {what}")]
    Unsupported {
        /// The request.
        what: String,
    },
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn an_error_shows_problem_and_remedy() {
        let error = OpenError::new("whp", OpenErrorKind::Missing, "there is no hypervisor");
        assert_eq!(error.to_string(), "there is no hypervisor");
        assert!(error.source().is_none() && error.remedy().is_none());
        let error = error
            .with_remedy("switch it on")
            .with_source(io::ErrorKind::NotFound.into());
        assert_eq!(error.to_string(), "there is no hypervisor: switch it on");
        assert!(error.source().is_some());
        assert_eq!(
            (error.backend(), error.kind()),
            ("whp", OpenErrorKind::Missing)
        );
    }
}
