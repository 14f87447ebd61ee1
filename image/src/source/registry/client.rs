//! Requests to one repository of a registry (OCI distribution-spec), with
//! authentication and patience.

use std::io::{self, Read};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

use super::challenge::Challenge;
use super::credentials::Credentials;
use super::trust;
use crate::Error;
use crate::source::Session;

/// How often a request is made before it is given up.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause that a registry may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a registry may say nothing.
const SILENCE: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: u32 = 10;
/// Largest answer of a token server, in bytes.
const MAX_TOKEN: u64 = 1 << 20;
const CLIENT_ID: &str = "sm";

/// One repository of one registry.
pub(super) struct Client<'a> {
    agent: Agent,
    /// The registry, for people.
    registry: String,
    /// Scheme, host and port.
    base: String,
    repository: String,
    credentials: Option<Credentials>,
    session: Session<'a>,
    /// What the `Authorization` header says, once it is known.
    authorization: Mutex<Option<String>>,
}

/// A place in a registry, and what is expected there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// `manifests` or `blobs`.
    pub(super) kind: &'a str,
    /// A digest or a tag.
    pub(super) name: &'a str,
    /// Media types, separated by commas.
    pub(super) accept: &'a str,
    /// First byte.
    pub(super) from: u64,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Why a single request did not bring anything.
enum Failure {
    /// It makes no sense to ask again.
    Final(String),
    /// It may work later; how long to wait at least.
    Passing(String, Option<Duration>),
}

impl<'a> Client<'a> {
    /// A client for `repository` of `registry`, which answers at `host`.
    pub(super) fn new(
        registry: &str,
        host: &str,
        repository: &str,
        credentials: Option<Credentials>,
        session: Session<'a>,
    ) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("sm/", env!("CARGO_PKG_VERSION")))
            // A layer is stored as it is compressed.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .max_redirects(MAX_REDIRECTS)
            .tls_config(trust::tls(host))
            .build();
        let agent = Agent::new_with_config(config);
        let ended = agent.clone();
        session.cancel.on_cancel(move || ended.shutdown());
        let secure = format!("https://{host}");
        // As Docker does it: on this host, a registry may do without TLS. One that
        // has a certificate that is not trusted does not.
        let speaks_plain = |error: &ureq::Error| !error.to_string().contains("certificate");
        let probed = is_loopback(host).then(|| agent.get(format!("{secure}/v2/")).call());
        let plain = matches!(&probed, Some(Err(error)) if speaks_plain(error));
        let base = match plain {
            true => format!("http://{host}"),
            false => secure,
        };
        Self {
            agent,
            registry: registry.to_owned(),
            base,
            repository: repository.to_owned(),
            credentials,
            session,
            authorization: Mutex::default(),
        }
    }

    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
        Error::Registry {
            registry: self.registry.clone(),
            reason: reason.into(),
        }
    }

    /// Asks for something; `None` if the registry does not have it.
    pub(super) fn get(&self, wanted: Wanted<'_>) -> Result<Option<Response<Body>>, Error> {
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            match self.once(wanted) {
                Ok(response) => return Ok(response),
                Err(Failure::Final(reason)) => return Err(self.error(reason)),
                Err(Failure::Passing(reason, _)) if attempt == ATTEMPTS => {
                    return Err(self.error(format!("{reason} ({ATTEMPTS} times)")));
                }
                Err(Failure::Passing(_, asked)) => {
                    // The registry wants to be left alone for a while.
                    let pause_now = asked.unwrap_or(pause).min(LONGEST_PAUSE);
                    if asked.is_some() && !pause_now.is_zero() {
                        (self.session.notice)(&format!(
                            "waiting {} s as {} asks",
                            pause_now.as_secs(),
                            self.registry
                        ));
                    }
                    if !self.session.cancel.wait(pause_now) {
                        return Err(self.error("given up"));
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    attempt += 1;
                }
            }
        }
    }

    fn once(&self, wanted: Wanted<'_>) -> Result<Option<Response<Body>>, Failure> {
        let mut response = self.send(wanted)?;
        if response.status() == StatusCode::UNAUTHORIZED {
            // The first request, or the token has expired.
            self.authorize(&response)?;
            response = self.send(wanted)?;
        }
        let status = response.status();
        match status.as_u16() {
            200 | 206 => Ok(Some(response)),
            404 => Ok(None),
            401 | 403 => Err(Failure::Final(match self.credentials {
                Some(_) => format!(
                    "it refuses access to {} with the credentials that \"docker login\" has stored",
                    self.repository
                ),
                None => format!(
                    "it refuses access to {}, or has no such image; if it is private, run \"docker login {}\" (or \"podman login\")",
                    self.repository, self.registry
                ),
            })),
            429 | 500..=599 => {
                let asked = response
                    .headers()
                    .get(header::RETRY_AFTER)
                    .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                    .map(Duration::from_secs);
                Err(Failure::Passing(format!("it answers {status}"), asked))
            }
            _ => Err(Failure::Final(format!("it answers {status}"))),
        }
    }

    fn send(&self, wanted: Wanted<'_>) -> Result<Response<Body>, Failure> {
        let Wanted { kind, name, .. } = wanted;
        let url = format!("{}/v2/{}/{kind}/{name}", self.base, self.repository);
        let mut request = self.agent.get(url).header(header::ACCEPT, wanted.accept);
        if wanted.from > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", wanted.from));
        }
        let authorization = self.lock().clone();
        if let Some(authorization) = authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.call().map_err(passing)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        // Nothing panics while it holds this.
        self.authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what the registry's 401 asks for.
    fn authorize(&self, response: &Response<Body>) -> Result<(), Failure> {
        let header = response.headers().get(header::WWW_AUTHENTICATE);
        let challenge = header.and_then(|value| Challenge::parse(value.to_str().ok()?));
        let granted = match challenge {
            Some(Challenge::Basic) => match &self.credentials {
                Some(Credentials::Password { user, password }) => Some(basic(user, password)),
                _ => None,
            },
            Some(Challenge::Bearer {
                realm,
                service,
                scope,
            }) => Some(self.token(&realm, service.as_deref(), scope.as_deref())?),
            None => {
                return Err(Failure::Final(
                    "it wants an authentication that sm does not know".to_owned(),
                ));
            }
        };
        *self.lock() = granted;
        Ok(())
    }

    /// Gets a token, as the distribution project's token flow has it.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<String, Failure> {
        // The registry chooses the place: it must not be one where credentials
        // travel in the open, unless the registry itself is.
        if !realm.starts_with("https://") && !self.base.starts_with("http://") {
            return Err(Failure::Final(format!(
                "it wants credentials sent to {realm:?} without TLS"
            )));
        }
        let ours = format!("repository:{}:pull", self.repository);
        let scope = scope.unwrap_or(&ours);
        let mut response = match &self.credentials {
            Some(Credentials::Identity(token)) => {
                let mut form = vec![
                    ("grant_type", "refresh_token"),
                    ("client_id", CLIENT_ID),
                    ("refresh_token", token),
                    ("scope", scope),
                ];
                form.extend(service.map(|service| ("service", service)));
                self.agent.post(realm).send_form(form).map_err(passing)?
            }
            credentials => {
                let mut request = self.agent.get(realm).query("scope", scope);
                if let Some(service) = service {
                    request = request.query("service", service);
                }
                if let Some(Credentials::Password { user, password }) = credentials {
                    request = request.header(header::AUTHORIZATION, basic(user, password));
                }
                request.call().map_err(passing)?
            }
        };
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(Failure::Passing(
                format!("its token server answers {status}"),
                None,
            ));
        }
        if !status.is_success() {
            return Err(Failure::Final(format!(
                "its token server answers {status}: run \"docker login {}\" (or \"podman login\") again",
                self.registry
            )));
        }
        let mut bytes = Vec::new();
        let read = response
            .body_mut()
            .as_reader()
            .take(MAX_TOKEN)
            .read_to_end(&mut bytes);
        read.map_err(|error| Failure::Passing(error.to_string(), None))?;
        let token: Token = serde_json::from_slice(&bytes)
            .map_err(|error| Failure::Final(format!("its token server makes no sense: {error}")))?;
        let token = token
            .token
            .or(token.access_token)
            .filter(|token| !token.is_empty());
        token
            .map(|token| format!("Bearer {token}"))
            .ok_or_else(|| Failure::Final("its token server gives no token".to_owned()))
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// What went wrong below HTTP. Another attempt may find it mended, but for what
/// is wrong with the certificate or the request.
fn passing(error: ureq::Error) -> Failure {
    match error {
        ureq::Error::Timeout(_) => Failure::Passing("it does not answer".to_owned(), None),
        ureq::Error::Io(error) if error.kind() != io::ErrorKind::InvalidData => {
            Failure::Passing(format!("cannot talk to it: {error}"), None)
        }
        ureq::Error::ConnectionFailed => Failure::Passing("cannot connect to it".to_owned(), None),
        ureq::Error::HostNotFound => Failure::Final("no host has its name".to_owned()),
        other => Failure::Final(other.to_string()),
    }
}

/// Whether `host`, with a port or without, is this one.
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
    fn this_host_is_told_from_others() {
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
