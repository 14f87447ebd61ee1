//! Why a request did not bring anything, and whether another one may.

use std::io;
use std::time::{Duration, SystemTime};

use ureq::Body;
use ureq::http::{Response, header};

use super::http::Trouble;
use super::patience::retry_after;

/// Why a single request did not bring anything.
pub(super) enum Failure {
    /// It makes no sense to ask again.
    Final(String),
    /// It may work later; how long to wait, if the registry says so.
    Passing(String, Option<Duration>),
}

impl From<Trouble> for Failure {
    /// A failure below HTTP. Another attempt may succeed, but for
    /// what is wrong with the certificate or the request.
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
                Self::Final("no host has its name".to_owned())
            }
            Trouble::Http(other) => Self::Final(other.to_string()),
        }
    }
}

/// The pause that the registry asks for.
pub(super) fn asked_pause(response: &Response<Body>) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?;
    retry_after(value.to_str().ok()?, SystemTime::now())
}
