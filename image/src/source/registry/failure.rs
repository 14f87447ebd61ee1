//! Failures of requests, and their classification as permanent or temporary.

use std::io;
use std::time::{Duration, SystemTime};

use ureq::Body;
use ureq::http::{Response, header};

use super::backoff::retry_after;
use super::http::HttpError;
use crate::error::{Cause, ErrorKind};

/// Failure of a single request.
pub(super) enum Failure {
    /// A repetition would fail too.
    Final(Cause),
    /// A repetition may succeed. The pause is that requested by the registry, if any.
    Passing(Cause, Option<Duration>),
}

impl Failure {
    pub(super) fn last(reason: impl Into<Cause>) -> Self {
        Self::Final(reason.into())
    }

    pub(super) fn passing(reason: impl Into<Cause>, pause: Option<Duration>) -> Self {
        Self::Passing(reason.into(), pause)
    }
}

impl From<HttpError> for Failure {
    /// Converts a failure below HTTP. Another attempt may succeed, except after problems
    /// with the certificate or the request.
    fn from(error: HttpError) -> Self {
        let unreachable = |text: &str| Cause::new(ErrorKind::Unreachable, text);
        match error {
            HttpError::ForbiddenRedirect(reason) => Self::last(reason),
            HttpError::Http(ureq::Error::Timeout(_)) => {
                Self::Passing(unreachable("it does not answer"), None)
            }
            HttpError::Http(ureq::Error::Io(error)) if is_no_tls(&error) => {
                Self::last("it does not answer by TLS, and is not declared as insecure")
            }
            HttpError::Http(ureq::Error::Io(error))
                if error.kind() != io::ErrorKind::InvalidData =>
            {
                Self::Passing(unreachable(&format!("cannot talk to it: {error}")), None)
            }
            HttpError::Http(ureq::Error::ConnectionFailed) => {
                Self::Passing(unreachable("cannot connect to it"), None)
            }
            HttpError::Http(ureq::Error::HostNotFound) => {
                Self::Final(unreachable("its host name does not resolve"))
            }
            HttpError::Http(other) => Self::last(other.to_string()),
        }
    }
}

/// Returns true if a TLS handshake failed because the peer sent something other than TLS.
pub(super) fn is_no_tls(error: &io::Error) -> bool {
    let inner = error.get_ref();
    let inner = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidMessage(_)))
}

/// Returns the pause that the registry requests.
pub(super) fn requested_pause(response: &Response<Body>) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?;
    retry_after(value.to_str().ok()?, SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `ureq` reports it: the error of rustls in an error of the connection.
    #[test]
    fn a_registry_without_tls_is_named_as_such_and_not_asked_again() {
        let garbled = rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType);
        let other = rustls::Error::DecryptError;
        for (error, is_named) in [(garbled, true), (other, false)] {
            let error = io::Error::new(io::ErrorKind::InvalidData, error);
            let failure = Failure::from(HttpError::Http(ureq::Error::Io(error)));
            let Failure::Final(cause) = failure else {
                panic!("it is asked again");
            };
            assert_eq!(format!("{cause:?}").contains("by TLS"), is_named);
        }
    }
}
