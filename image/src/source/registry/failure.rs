//! Failures of requests, and their classification as permanent or temporary.

use std::io;
use std::time::{Duration, SystemTime};

use ureq::Body;
use ureq::http::{Response, header};

use super::backoff::retry_after;
use super::http::Trouble;

/// Failure of a single request.
pub(super) enum Failure {
    /// A repetition would fail too.
    Final(String),
    /// A repetition may succeed. The pause is that requested by the registry, if any.
    Passing(String, Option<Duration>),
}

impl From<Trouble> for Failure {
    /// Converts a failure below HTTP. Another attempt may succeed, except after problems
    /// with the certificate or the request.
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Astray(reason) => Self::Final(reason),
            Trouble::Http(ureq::Error::Timeout(_)) => {
                Self::Passing("it does not answer".to_owned(), None)
            }
            Trouble::Http(ureq::Error::Io(error)) if error.kind() != io::ErrorKind::InvalidData => {
                Self::Passing(format!("cannot talk to it: {error}"), None)
            }
            Trouble::Http(ureq::Error::ConnectionFailed) => {
                Self::Passing("cannot connect to it".to_owned(), None)
            }
            Trouble::Http(ureq::Error::HostNotFound) => {
                Self::Final("its host name does not resolve".to_owned())
            }
            Trouble::Http(other) => Self::Final(other.to_string()),
        }
    }
}

/// Returns the pause that the registry requests.
pub(super) fn asked_pause(response: &Response<Body>) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?;
    retry_after(value.to_str().ok()?, SystemTime::now())
}
