//! Authentication with passwords and tokens, by the distribution project's token flow.
//! Tokens are requested when a registry demands them, and renewed when they expire.

use std::io::Read as _;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::SendBody;
use ureq::http::{HeaderMap, Method, StatusCode, Uri, header};

use super::challenge::Challenge;
use super::credentials::{self, Credentials};
use super::failure::{Failure, requested_pause};
use super::http::{Answer, Http, HttpRequest};
use super::url::escape;
use crate::error::{Cause, ErrorKind};

/// Maximum size of an answer of a token server in bytes.
const MAX_TOKEN: u64 = 1 << 20;
const CLIENT_ID: &str = "sm";

/// Authentication state for one repository.
pub(super) struct Authorizer {
    /// Name of the registry in Docker's and Podman's files.
    registry: String,
    repository: String,
    /// Looked up on demand, because helpers are programs that may prompt the user.
    credentials: OnceLock<Option<Credentials>>,
    /// Scopes that tokens must have.
    scopes: Vec<String>,
    /// Value of the `Authorization` header, once known.
    current: Mutex<Option<String>>,
    /// Held by the thread that requests a new value.
    renewing: Mutex<()>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Authorizer {
    pub(super) fn new(registry: &str, repository: &str, scopes: Vec<String>) -> Self {
        Self {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            credentials: OnceLock::new(),
            scopes,
            current: Mutex::default(),
            renewing: Mutex::default(),
        }
    }

    /// Returns the value of the `Authorization` header.
    pub(super) fn header(&self) -> Option<String> {
        lock(&self.current).clone()
    }

    fn credentials(&self) -> Option<&Credentials> {
        let find = || credentials::find(&self.registry, &self.repository);
        self.credentials.get_or_init(find).as_ref()
    }

    /// Explains a refusal, depending on the available credentials.
    pub(super) fn refusal(&self) -> String {
        match self.credentials() {
            Some(_) => format!(
                "it refuses access to {} with the credentials that \"docker login\" has stored",
                self.repository
            ),
            None => format!(
                "it refuses access to {}, or has no such image; if it is private, run \
                 \"docker login {}\" (or \"podman login\")",
                self.repository, self.registry
            ),
        }
    }

    /// Handles a 401 with these headers, which answered a request with the authorization
    /// `used`. If several threads need a new token, only one requests it.
    pub(super) fn renew(
        &self,
        http: &Http,
        base: &Uri,
        used: Option<&str>,
        headers: &HeaderMap,
    ) -> Result<(), Failure> {
        let _renewing = lock(&self.renewing);
        if self.header().as_deref() != used {
            return Ok(());
        }
        let challenges = headers.get_all(header::WWW_AUTHENTICATE).iter();
        let challenges: Vec<&str> = challenges.filter_map(|value| value.to_str().ok()).collect();
        let granted = match Challenge::parse(&challenges.join(", ")) {
            Some(Challenge::Basic) => match self.credentials() {
                Some(Credentials::Password { user, password }) => Some(basic(user, password)),
                _ => None,
            },
            Some(Challenge::Bearer {
                realm,
                service,
                scope,
            }) => Some(self.token(http, base, &realm, service.as_deref(), scope.as_deref())?),
            None => {
                return Err(Failure::last(
                    "it requires an unsupported authentication scheme".to_owned(),
                ));
            }
        };
        *lock(&self.current) = granted;
        Ok(())
    }

    /// Returns the scopes to request: the one in the challenge, and those of the intended
    /// operations unless the challenge covers them.
    fn scopes<'a>(&'a self, requested: Option<&'a str>) -> Vec<&'a str> {
        let reads_only = |scope: &String| scope.ends_with(":pull");
        match requested {
            Some(requested) if self.scopes.iter().all(reads_only) => vec![requested],
            Some(requested) if !self.scopes.iter().any(|scope| scope == requested) => {
                let own = self.scopes.iter().map(String::as_str);
                own.chain([requested]).collect()
            }
            _ => self.scopes.iter().map(String::as_str).collect(),
        }
    }

    fn token(
        &self,
        http: &Http,
        base: &Uri,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<String, Failure> {
        let senseless = || {
            Failure::last(format!(
                "it requires a token from {realm:?}, which is not a valid address"
            ))
        };
        let location: Uri = realm.parse().map_err(|_| senseless())?;
        // The registry chooses the token server. Credentials must not be sent there
        // without TLS, unless the registry itself does without.
        match location.scheme_str() {
            Some("https") => {}
            Some("http") if base.scheme_str() == Some("http") => {}
            Some("http") => {
                return Err(Failure::last(format!(
                    "it requires credentials to be sent to {realm:?} without TLS"
                )));
            }
            _ => return Err(senseless()),
        }
        let scopes = self.scopes(scope);
        let server = location.clone();
        let answer = match self.credentials() {
            Some(Credentials::Identity(token)) => {
                let scope = scopes.join(" ");
                let mut form = vec![
                    ("grant_type", "refresh_token"),
                    ("client_id", CLIENT_ID),
                    ("refresh_token", token),
                    ("scope", &scope),
                ];
                form.extend(service.map(|service| ("service", service)));
                let body = form_encoded(&form);
                let http_request = HttpRequest {
                    method: Method::POST,
                    uri: location,
                    headers: vec![(header::CONTENT_TYPE, "application/x-www-form-urlencoded")],
                    authorization: None,
                };
                http.send(&http_request, SendBody::from_reader(&mut body.as_bytes()))
            }
            credentials => {
                let mut query: Vec<_> = scopes.iter().map(|scope| ("scope", *scope)).collect();
                query.extend(service.map(|service| ("service", service)));
                let separator = if location.query().is_some() { '&' } else { '?' };
                let text = format!("{location}{separator}{}", form_encoded(&query));
                let authorization = match credentials {
                    Some(Credentials::Password { user, password }) => Some(basic(user, password)),
                    _ => None,
                };
                http.send_request(&HttpRequest {
                    method: Method::GET,
                    uri: text.parse().map_err(|_| senseless())?,
                    headers: Vec::new(),
                    authorization,
                })
            }
        }
        .map_err(Failure::from)?;
        // The registry named this server and no other.
        if !answer.is_of(&server) {
            let host = answer.from.host().unwrap_or_default();
            let text =
                format!("its token server redirects to {host}, which is not trusted with tokens");
            return Err(Failure::last(text));
        }
        self.read_token(answer)
    }

    fn read_token(&self, answer: Answer) -> Result<String, Failure> {
        let mut response = answer.response;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            let requested = requested_pause(&response);
            let text = format!("its token server answers {status}");
            return Err(Failure::passing(text, requested));
        }
        if !status.is_success() {
            let kind = match status.as_u16() {
                401 | 403 => ErrorKind::Unauthorized,
                _ => ErrorKind::Service,
            };
            return Err(Failure::last(Cause::new(
                kind,
                format!(
                    "its token server answers {status}: run \"docker login {}\" (or \"podman login\") again",
                    self.registry
                ),
            )));
        }
        let mut bytes = Vec::new();
        let body = response.body_mut().as_reader();
        let read = body.take(MAX_TOKEN).read_to_end(&mut bytes);
        read.map_err(|error| Failure::passing(error, None))?;
        let token: Token = serde_json::from_slice(&bytes).map_err(|error| {
            Failure::last(format!(
                "the answer of its token server is invalid: {error}"
            ))
        })?;
        // The token becomes part of a header.
        let is_token =
            |token: &String| !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
        let token = token.token.filter(is_token).or(token.access_token);
        token
            .filter(is_token)
            .map(|token| format!("Bearer {token}"))
            .ok_or_else(|| Failure::last("its token server gives no token".to_owned()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The values are consistent at all times, even after a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

fn form_encoded(pairs: &[(&str, &str)]) -> String {
    let pairs = pairs
        .iter()
        .map(|(name, value)| format!("{name}={}", escape(value)));
    pairs.collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_requested_with_the_needed_scopes() {
        let scopes = |own: &[&str], requested| {
            let own = own.iter().map(|scope| (*scope).to_owned()).collect();
            let authorizer = Authorizer::new("r", "a", own);
            authorizer.scopes(requested).join(" ")
        };
        assert_eq!(scopes(&["repository:a:pull"], None), "repository:a:pull");
        // A registry that is a proxy may use other scope names.
        assert_eq!(scopes(&["repository:a:pull"], Some("b")), "b");
        let push = ["repository:a:pull,push", "repository:b:pull"];
        assert_eq!(scopes(&push, Some("b")), format!("{} b", push.join(" ")));
        assert_eq!(scopes(&push, Some(push[0])), push.join(" "));
    }

    #[test]
    fn forms_are_encoded() {
        let pairs = [("scope", "repository:a/b:pull,push"), ("x", "a&b=c d")];
        assert_eq!(
            form_encoded(&pairs),
            "scope=repository%3Aa%2Fb%3Apull%2Cpush&x=a%26b%3Dc%20d"
        );
    }
}
