//! Requests to one repository of a registry (OCI distribution-spec), with authentication
//! and retries.

use std::io::{self, Read};
use std::net::IpAddr;
use std::sync::OnceLock;

use serde::Deserialize;
use ureq::http::{Method, Response, Uri, header};
use ureq::{Body, SendBody};

use super::super::repository::Repository;
use super::auth::Authorizer;
use super::backoff::{Backoff, NoRetry};
use super::failure::{Failure, is_no_tls, requested_pause};
use super::http::{Answer, Http, HttpError, HttpRequest};
use super::url::is_same_origin;
use crate::Error;
use crate::error::{Cause, ErrorKind};
use crate::source::Session;

/// Maximum size of an error document in bytes.
const MAX_EXPLANATION: u64 = 64 << 10;
/// Maximum number of characters of an error that are shown.
const SHOWN: usize = 200;

/// Client for one repository of one registry.
pub(super) struct Client<'s> {
    repository: Repository,
    pub(super) session: Session<'s>,
    attempts: u32,
    /// Created by the first request.
    connection: OnceLock<Result<Connection, String>>,
    authorizer: Authorizer,
}

struct Connection {
    http: Http,
    /// Scheme, host and port.
    base: Uri,
}

/// A resource of a repository, and how it is requested.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resource<'a> {
    /// `manifests` or `blobs`.
    pub(super) kind: &'a str,
    /// A digest or a tag.
    pub(super) name: &'a str,
    /// Accepted media types, separated by commas.
    pub(super) accept: &'a str,
    /// Offset of the first byte.
    pub(super) from: u64,
}

impl<'s> Client<'s> {
    /// Creates a client for `repository` that makes each request up to `attempts` times.
    /// `scopes` are the permissions that it may need.
    pub(super) fn new(
        repository: Repository,
        session: Session<'s>,
        attempts: u32,
        scopes: Vec<String>,
    ) -> Self {
        let authorizer = Authorizer::new(&repository.registry, &repository.name, scopes);
        Self {
            repository,
            session,
            attempts,
            connection: OnceLock::new(),
            authorizer,
        }
    }

    pub(super) fn repository(&self) -> &Repository {
        &self.repository
    }

    pub(super) fn error(&self, reason: impl Into<Cause>) -> Error {
        Error::Registry {
            registry: self.repository.registry.clone(),
            reason: reason.into(),
        }
    }

    fn connection(&self) -> Result<&Connection, Failure> {
        let connect = || Connection::new(&self.repository, self.session);
        let connection = self.connection.get_or_init(connect).as_ref();
        connection.map_err(|reason| Failure::last(reason.as_str()))
    }

    /// Repeats an operation until it succeeds, or fails permanently.
    pub(super) fn with_retries<T>(
        &self,
        mut once: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Error> {
        let mut backoff = Backoff::new(self.session, self.attempts);
        loop {
            match once() {
                Ok(done) => return Ok(done),
                Err(Failure::Final(reason)) => return Err(self.error(reason)),
                Err(Failure::Passing(reason, requested)) => {
                    let retry = backoff.wait_for_retry(&self.repository.registry, requested);
                    retry.map_err(|no_retry| self.retry_error(&reason, &no_retry))?;
                }
            }
        }
    }

    pub(super) fn retry_error(&self, reason: &Cause, no_retry: &NoRetry) -> Error {
        let reason = reason.followed_by(no_retry);
        self.error(match no_retry {
            NoRetry::Cancelled => reason.of_kind(ErrorKind::Cancelled),
            NoRetry::Attempts(_) | NoRetry::TooLong(_) => reason,
        })
    }

    /// Requests a resource once; `None` if the registry does not have it.
    pub(super) fn get_once(
        &self,
        resource: Resource<'_>,
    ) -> Result<Option<Response<Body>>, Failure> {
        let path = format!("{}/{}", resource.kind, resource.name);
        let range = format!("bytes={}-", resource.from);
        let mut headers = vec![(header::ACCEPT, resource.accept)];
        if resource.from > 0 {
            headers.push((header::RANGE, &range));
        }
        let mut answer = self.send_request(Method::GET, &path, &headers)?;
        match answer.status() {
            200 => Ok(Some(answer.response)),
            206 if resource.from > 0 => Ok(Some(answer.response)),
            404 => Ok(None),
            _ => Err(self.failure(&mut answer)),
        }
    }

    /// Sends a request without a body for `path` in the repository, with the
    /// authentication that the registry demands.
    pub(super) fn send_request(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<Answer, Failure> {
        let connection = self.connection()?;
        let uri = self.uri(path)?;
        self.authorized(connection, |authorization| {
            Ok(connection.http.send_request(&HttpRequest {
                method: method.clone(),
                uri: uri.clone(),
                headers: headers.to_vec(),
                authorization,
            })?)
        })
    }

    /// Sends the body that `open` returns to an address that the registry named, or to
    /// one in the repository. The body is opened again if the registry demands another
    /// token first.
    pub(super) fn send<'b>(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &[(header::HeaderName, &str)],
        mut open: impl FnMut() -> Result<Box<dyn Read + 'b>, Failure>,
    ) -> Result<Answer, Failure> {
        let connection = self.connection()?;
        let ours = is_same_origin(uri, &connection.base);
        self.authorized(connection, |authorization| {
            let http_request = HttpRequest {
                method: method.clone(),
                uri: uri.clone(),
                headers: headers.to_vec(),
                authorization: authorization.filter(|_| ours),
            };
            let mut body = open()?;
            Ok(connection
                .http
                .send(&http_request, SendBody::from_reader(&mut *body))?)
        })
    }

    /// Returns the address of `path` in the repository.
    pub(super) fn uri(&self, path: &str) -> Result<Uri, Failure> {
        let base = &self.connection()?.base;
        let text = format!("{base}v2/{}/{path}", self.repository.name);
        text.parse()
            .map_err(|_| Failure::last(format!("{text:?} is not a valid address")))
    }

    /// Makes a request, and repeats it with a new token if the registry demands one, as
    /// it does for the first request or after a token expired. Only the registry itself
    /// is sent a password or a token, never a host that it redirects to.
    fn authorized(
        &self,
        connection: &Connection,
        mut request: impl FnMut(Option<String>) -> Result<Answer, Failure>,
    ) -> Result<Answer, Failure> {
        let used = self.authorizer.header();
        let answer = request(used.clone())?;
        if answer.status() != 401 || !connection.is_own(&answer) {
            return Ok(answer);
        }
        let (http, base) = (&connection.http, &connection.base);
        let headers = answer.response.headers();
        self.authorizer
            .renew(http, base, used.as_deref(), headers)?;
        request(self.authorizer.header())
    }

    /// Converts an unsuccessful answer to a failure.
    pub(super) fn failure(&self, answer: &mut Answer) -> Failure {
        let status = answer.response.status();
        // Of other hosts only the status is used. Their explanations, pauses and
        // challenges are ignored, because they do not speak for the registry.
        if !self.is_own(answer) {
            let host = answer.from.host().unwrap_or_default();
            let text = format!("{host}, to which it redirects, answers {status}");
            return match is_passing(status.as_u16()) {
                true => Failure::passing(text, None),
                false => Failure::last(text),
            };
        }
        let response = &mut answer.response;
        let requested = requested_pause(response);
        let detail = explanation(response).map_or_else(String::new, |detail| format!(": {detail}"));
        match status.as_u16() {
            401 | 403 => {
                let text = format!("{}{detail}", self.authorizer.refusal());
                Failure::last(Cause::new(ErrorKind::Unauthorized, text))
            }
            code if is_passing(code) => {
                Failure::passing(format!("it answers {status}{detail}"), requested)
            }
            _ => Failure::last(format!("it answers {status}{detail}")),
        }
    }
}

impl Client<'_> {
    /// Returns true if the registry itself has answered, and not a host it redirected to.
    fn is_own(&self, answer: &Answer) -> bool {
        self.connection()
            .is_ok_and(|connection| connection.is_own(answer))
    }

    /// Checks that an upload may continue at `location`, which `answer` names. The registry
    /// may name any address. Another host may only name itself, so that it cannot direct
    /// requests with credentials back to the registry.
    pub(super) fn check_location(&self, answer: &Answer, location: &Uri) -> Result<(), Failure> {
        let connection = self.connection()?;
        if !connection.is_own(answer) && !is_same_origin(location, &answer.from) {
            let host = answer.from.host().unwrap_or_default();
            return Err(Failure::last(format!(
                "{host}, to which it redirects, continues an upload at another host"
            )));
        }
        let leading = connection.http.check_leading(&answer.from, location);
        leading.map_err(Failure::last)
    }
}

/// Returns true if the error with this status may be temporary.
fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 500..=599)
}

impl Connection {
    fn is_own(&self, answer: &Answer) -> bool {
        answer.is_of(&self.base)
    }

    fn new(repository: &Repository, session: Session<'_>) -> Result<Self, String> {
        let host = &repository.host;
        let http = Http::new(host, repository.insecure, session.cancel);
        let base = |scheme: &str| {
            let text = format!("{scheme}://{host}/");
            text.parse::<Uri>()
                .map_err(|_| format!("{text:?} is not a valid address"))
        };
        let mut connection = Self {
            http,
            base: base("https")?,
        };
        // As in Docker, a registry on this host may do without TLS, and so may an
        // insecure registry.
        if (repository.insecure || is_loopback(host)) && connection.does_without_tls() {
            connection.base = base("http")?;
        }
        Ok(connection)
    }

    /// Returns true if the registry demonstrably does not support TLS: it answered a TLS
    /// greeting with something else, or the default `https` port refused the connection.
    /// Any other failure, such as a reset, could be caused by an attacker who wants to
    /// see plain traffic.
    fn does_without_tls(&self) -> bool {
        let Ok(uri) = format!("{}v2/", self.base).parse::<Uri>() else {
            return false;
        };
        match self.http.probe(&uri) {
            Err(HttpError::Http(ureq::Error::Io(error))) => {
                is_no_tls(&error)
                    || error.kind() == io::ErrorKind::ConnectionRefused && uri.port().is_none()
            }
            _ => false,
        }
    }
}

/// Returns the registry's description of an error (distribution-spec, "Error Codes"),
/// without control characters.
fn explanation(response: &mut Response<Body>) -> Option<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Explained>,
    }
    #[derive(Deserialize)]
    struct Explained {
        message: String,
    }
    let mut bytes = Vec::new();
    let body = response.body_mut().as_reader();
    body.take(MAX_EXPLANATION).read_to_end(&mut bytes).ok()?;
    let errors: Errors = serde_json::from_slice(&bytes).ok()?;
    let message = errors.errors.into_iter().next()?.message;
    let shown: String = message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SHOWN)
        .collect();
    Some(shown.trim().to_owned()).filter(|shown| !shown.is_empty())
}

/// Returns true if `host`, with or without a port, is this host.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost"
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts_are_recognised() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example",
            "128.0.0.1",
            "[::2]:1",
            "r.example:5000",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
