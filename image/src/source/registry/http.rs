//! HTTP requests to a host and along its redirections.

use std::time::Duration;

use ureq::http::{Method, Request, Response, Uri, header};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body, Proxy, SendBody};

use super::proxy::Proxies;
use super::trust;
use super::url::{is_same_origin, join};
use crate::cancel::Cancel;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum time without receiving or sending data.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: u32 = 10;

/// HTTP agents for a host, directly or through proxies.
pub(super) struct Http {
    direct: Agent,
    /// Agent for `https` through a proxy, or the reason why the proxy cannot be used.
    secure: Result<Option<Agent>, String>,
    /// Agent for `http` through a proxy, or the reason why the proxy cannot be used.
    http: Result<Option<Agent>, String>,
    proxies: Proxies,
    insecure: bool,
}

/// Failure of a request.
pub(super) enum HttpError {
    Http(ureq::Error),
    /// The server redirects to an address that is not permitted, for this reason.
    ForbiddenRedirect(String),
}

impl From<ureq::Error> for HttpError {
    fn from(error: ureq::Error) -> Self {
        Self::Http(error)
    }
}

/// An answer and its origin. After redirections the origin differs from the requested
/// host, and must not make demands in its name.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    /// The address that answered.
    pub(super) from: Uri,
    /// Another host has chosen the address, even if it is one of the requested host.
    left_origin: bool,
}

impl Answer {
    /// Returns true if the answer is from the origin of `base`, at an address that no other
    /// host has chosen.
    pub(super) fn is_of(&self, base: &Uri) -> bool {
        !self.left_origin && is_same_origin(&self.from, base)
    }

    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }
}

/// A request without a body.
#[derive(Clone, Debug)]
pub(super) struct HttpRequest<'a> {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: Vec<(header::HeaderName, &'a str)>,
    /// Sent only to the original host, and not after a redirection through another one.
    pub(super) authorization: Option<String>,
}

impl Http {
    /// Creates agents for `host`, with its port if it has one. An `insecure` host may
    /// have any certificate, and redirect to addresses without TLS. Cancellation closes
    /// all connections.
    pub(super) fn new(host: &str, insecure: bool, cancel: &Cancel) -> Self {
        let proxies = Proxies::from_env();
        Self::with(trust::tls(host, insecure), proxies, insecure, cancel)
    }

    /// Creates agents with these certificates and proxies.
    pub(super) fn with(tls: TlsConfig, proxies: Proxies, insecure: bool, cancel: &Cancel) -> Self {
        let agent = |proxy: Option<Proxy>| {
            let config = Agent::config_builder()
                .http_status_as_error(false)
                .user_agent(concat!("sm/", env!("CARGO_PKG_VERSION")))
                // A layer is stored with its own compression.
                .accept_encoding("identity")
                .timeout_connect(Some(CONNECT_TIMEOUT))
                .timeout_recv_response(Some(IDLE_TIMEOUT))
                .timeout_per_read(Some(IDLE_TIMEOUT))
                .timeout_per_write(Some(IDLE_TIMEOUT))
                // Redirections are followed here, with rules for credentials and
                // protocols.
                .max_redirects(0)
                .max_redirects_will_error(false)
                .tls_config(tls.clone())
                .proxy(proxy)
                .build();
            let agent = Agent::new_with_config(config);
            let ended = agent.clone();
            cancel.on_cancel(move || ended.shutdown());
            agent
        };
        let proxied = |proxy: &Result<Option<Proxy>, String>| match proxy {
            Ok(proxy) => Ok(proxy.clone().map(|proxy| agent(Some(proxy)))),
            Err(reason) => Err(reason.clone()),
        };
        Self {
            direct: agent(None),
            secure: proxied(&proxies.secure),
            http: proxied(&proxies.http),
            proxies,
            insecure,
        }
    }

    fn agent(&self, uri: &Uri) -> Result<&Agent, HttpError> {
        if self.proxies.spare(uri) {
            return Ok(&self.direct);
        }
        let proxied = match uri.scheme_str() {
            Some("https") => &self.secure,
            _ => &self.http,
        };
        match proxied {
            Ok(proxied) => Ok(proxied.as_ref().unwrap_or(&self.direct)),
            Err(reason) => Err(HttpError::ForbiddenRedirect(reason.clone())),
        }
    }

    /// Sends a request and follows redirections: without authorization from the first one
    /// to another host on, and never from `https` to `http` unless the host is insecure.
    pub(super) fn send_request(&self, original: &HttpRequest<'_>) -> Result<Answer, HttpError> {
        let mut uri = original.uri.clone();
        let mut left_origin = false;
        for _ in 0..=MAX_REDIRECTS {
            let authorization = original.authorization.as_deref();
            left_origin |= !is_same_origin(&uri, &original.uri);
            let authorization = authorization.filter(|_| !left_origin);
            let request = request(
                original.method.clone(),
                &uri,
                &original.headers,
                authorization,
            );
            let request = request.body(()).map_err(ureq::Error::from)?;
            let response = self.agent(&uri)?.run(request)?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer {
                    response,
                    from: uri,
                    left_origin,
                });
            }
            let location = response.headers().get(header::LOCATION);
            let next = location.and_then(|location| join(&uri, location.to_str().ok()?));
            let next = next.ok_or_else(|| {
                HttpError::ForbiddenRedirect("it redirects to an invalid address".to_owned())
            })?;
            self.check_leading(&uri, &next)
                .map_err(HttpError::ForbiddenRedirect)?;
            uri = next;
        }
        let text = format!("it redirects more than {MAX_REDIRECTS} times");
        Err(HttpError::ForbiddenRedirect(text))
    }

    /// Checks that an answer from `from` may lead to `next`. A step from `https` to
    /// `http` is only permitted for an insecure host.
    pub(super) fn check_leading(&self, from: &Uri, next: &Uri) -> Result<(), String> {
        let is_secure = |uri: &Uri| uri.scheme_str() == Some("https");
        if is_secure(from) && !is_secure(next) && !self.insecure {
            let host = next.host().unwrap_or_default();
            return Err(format!("it redirects to {host}, without TLS"));
        }
        Ok(())
    }

    /// Makes one request without following redirections, to probe an address.
    pub(super) fn probe(&self, uri: &Uri) -> Result<(), HttpError> {
        let request = request(Method::GET, uri, &[], None);
        let request = request.body(()).map_err(ureq::Error::from)?;
        self.agent(uri)?.run(request)?;
        Ok(())
    }

    /// Sends a body without following redirections.
    pub(super) fn send(
        &self,
        http_request: &HttpRequest<'_>,
        body: SendBody<'_>,
    ) -> Result<Answer, HttpError> {
        let authorization = http_request.authorization.as_deref();
        let request = request(
            http_request.method.clone(),
            &http_request.uri,
            &http_request.headers,
            authorization,
        );
        let request = request.body(body).map_err(ureq::Error::from)?;
        Ok(Answer {
            response: self.agent(&http_request.uri)?.run(request)?,
            from: http_request.uri.clone(),
            left_origin: false,
        })
    }
}

fn request(
    method: Method,
    uri: &Uri,
    headers: &[(header::HeaderName, &str)],
    authorization: Option<&str>,
) -> ureq::http::request::Builder {
    let mut request = Request::builder().method(method).uri(uri.clone());
    for (name, value) in headers {
        request = request.header(name, *value);
    }
    if let Some(authorization) = authorization {
        request = request.header(header::AUTHORIZATION, authorization);
    }
    request
}
