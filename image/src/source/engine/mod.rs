//! `docker-daemon:`: images of a Docker engine, through its API. Podman's service has the
//! same API.

mod host;
mod unix;

use std::io::{self, Read};
use std::sync::OnceLock;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::Response;
use ureq::tls::{ClientCert, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use self::host::{Host, Tls};
use self::unix::{NoResolver, UnixConnector};
use super::bundle::Bundle;
use super::choice::Choice;
use super::{Session, Source, SourceImage, SourceLayer, pem};
use crate::Error;
use crate::digest::Digest;
use crate::error::{Cause, ErrorKind};
use crate::platform::Platform;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum time without data from an engine. An engine collects all layers before it
/// sends the first byte.
const IDLE_TIMEOUT: Duration = Duration::from_secs(1800);
/// Maximum size of an answer other than an image, in bytes.
const MAX_ANSWER: u64 = 4 << 20;
/// Maximum number of characters of an error that are shown.
const SHOWN: usize = 200;

/// An image of an engine.
pub(super) struct Engine<'s> {
    agent: Agent,
    host: Host,
    /// Base URL of the API.
    base: String,
    /// A name with its tag, or an ID.
    name: String,
    session: Session<'s>,
    /// The image, once it has been received.
    bundle: OnceLock<Bundle>,
}

impl<'s> Engine<'s> {
    /// Finds the engine and checks that it has the image `name`.
    pub(super) fn open(name: &str, session: Session<'s>) -> Result<Self, Error> {
        let host = Host::find().map_err(|reason| Error::Engine {
            engine: "docker".to_owned(),
            reason: reason.into(),
        })?;
        Self::at(host, name, session)
    }

    fn at(host: Host, name: &str, session: Session<'s>) -> Result<Self, Error> {
        let config = |tls: TlsConfig| {
            Agent::config_builder()
                .http_status_as_error(false)
                .user_agent(concat!("sm/", env!("CARGO_PKG_VERSION")))
                .timeout_connect(Some(CONNECT_TIMEOUT))
                .timeout_recv_response(Some(IDLE_TIMEOUT))
                .timeout_per_read(Some(IDLE_TIMEOUT))
                .max_redirects(0)
                .max_redirects_will_error(false)
                .proxy(None)
                .tls_config(tls)
                .build()
        };
        let (agent, base) = match &host {
            Host::Unix(path) => {
                let connector = UnixConnector(path.clone());
                let config = config(TlsConfig::default());
                let agent = Agent::with_parts(config, connector, NoResolver);
                (agent, "http://engine".to_owned())
            }
            Host::Tcp(address, None) => {
                let agent = Agent::new_with_config(config(TlsConfig::default()));
                (agent, format!("http://{address}"))
            }
            Host::Tcp(address, Some(tls)) => {
                let agent = Agent::new_with_config(config(tls_config(tls)));
                (agent, format!("https://{address}"))
            }
        };
        let ended = agent.clone();
        session.cancel.on_cancel(move || ended.shutdown());
        let mut engine = Self {
            agent,
            host,
            base,
            name: name.to_owned(),
            session,
            bundle: OnceLock::new(),
        };
        // Engines have removed paths without a version, and old versions.
        let ping = engine.get("/_ping")?;
        if let Some(version) = ping.headers().get("api-version")
            && let Ok(version) = version.to_str()
            && version
                .bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.')
        {
            engine.base = format!("{}/v{version}", engine.base);
        }
        Ok(engine)
    }

    fn error(&self, reason: impl Into<Cause>) -> Error {
        Error::Engine {
            engine: self.host.to_string(),
            reason: reason.into(),
        }
    }

    fn get(&self, path: &str) -> Result<Response<Body>, Error> {
        let url = format!("{}{path}", self.base);
        self.agent.get(url).call().map_err(|error| match error {
            // Cancellation disconnects the agent.
            _ if self.session.cancel.is_cancelled() => Error::Cancelled,
            ureq::Error::Io(error) => self.error(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Cause::new(
                    ErrorKind::Unreachable,
                    "no engine listens there; is it running? (DOCKER_HOST says where it is; \
                     images of Podman are containers-storage:NAME)",
                ),
                io::ErrorKind::PermissionDenied => Cause::new(
                    ErrorKind::Unauthorized,
                    "you may not use it; people in the group of its socket (\"docker\", \
                     usually) may",
                ),
                _ => Cause::of(&error),
            }),
            ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed | ureq::Error::HostNotFound => {
                self.error(Cause::new(ErrorKind::Unreachable, error.to_string()))
            }
            other => self.error(other.to_string()),
        })
    }

    /// Requests data about the image at `path`.
    fn send_request(&self, path: &str) -> Result<Response<Body>, Error> {
        let mut response = self.get(&format!("/images/{}/{path}", self.name))?;
        let status = response.status().as_u16();
        match status {
            200 => Ok(response),
            404 => Err(Error::unknown(
                format_args!("docker-daemon:{}", self.name),
                format!("the engine at {} has none", self.host),
            )),
            401 | 403 => {
                let detail = explanation(&mut response);
                let text = format!("it answers {status}{detail}");
                Err(self.error(Cause::new(ErrorKind::Unauthorized, text)))
            }
            _ => {
                let detail = explanation(&mut response);
                Err(self.error(format!("it answers {status}{detail}")))
            }
        }
    }

    /// Returns the image, and receives it from the engine on the first call.
    fn bundle(&self) -> Result<&Bundle, Error> {
        if let Some(bundle) = self.bundle.get() {
            return Ok(bundle);
        }
        let response = self.send_request("get")?;
        let label = format!("docker-daemon:{}", self.name);
        (self.session.message)(&format!("receiving {} from {}", self.name, self.host));
        let body = Received(response.into_body().into_reader());
        let bundle = Bundle::read(body, &label, self.session).map_err(|error| {
            match self.session.cancel.is_cancelled() {
                true => Error::Cancelled,
                false => error,
            }
        })?;
        Ok(self.bundle.get_or_init(|| bundle))
    }
}

/// The body of an engine's answer. Its errors are those of the connection.
struct Received<R>(R);

impl<R: Read> Read for Received<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            if error.kind() == io::ErrorKind::Interrupted {
                return error;
            }
            let text = format!("the connection broke: {error}");
            io::Error::other(Cause::new(ErrorKind::Unreachable, text))
        })
    }
}

impl Source for Engine<'_> {
    fn identity(&self) -> Result<Option<Digest>, Error> {
        #[derive(Deserialize)]
        struct Inspected {
            #[serde(rename = "Id")]
            id: String,
        }
        let mut bytes = Vec::new();
        let mut response = self.send_request("json")?;
        let body = response.body_mut().as_reader();
        let read = body.take(MAX_ANSWER).read_to_end(&mut bytes);
        read.map_err(|error| self.error(Cause::of(&error)))?;
        let inspected: Inspected = serde_json::from_slice(&bytes)
            .map_err(|error| self.error(format!("its answer is invalid: {error}")))?;
        let id = inspected.id;
        // Podman omits the algorithm.
        Ok(Digest::parse(&id).or_else(|| Digest::parse(&format!("sha256:{id}"))))
    }

    fn image(&self, platform: Option<&Platform>) -> Result<SourceImage, Error> {
        self.bundle()?.chosen(Choice::Only).image(platform)
    }

    fn layer<'a>(&'a self, layer: &SourceLayer) -> Result<Box<dyn Read + Send + 'a>, Error> {
        self.bundle()?.layer(layer)
    }
}

fn tls_config(tls: &Tls) -> TlsConfig {
    let file = |name: &str| tls.directory.join(name);
    let chain = pem::certificates(&file("cert.pem"));
    let key = pem::private_key(&file("key.pem"));
    let own = key.filter(|_| !chain.is_empty());
    TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&pem::certificates(&file(
            "ca.pem",
        ))))
        .client_cert(own.map(|key| ClientCert::new_with_certs(&chain, key)))
        .disable_verification(!tls.verify)
        .build()
}

/// Returns an engine's description of an error, without control characters.
fn explanation(response: &mut Response<Body>) -> String {
    #[derive(Deserialize)]
    struct Explained {
        message: String,
    }
    let mut bytes = Vec::new();
    let body = response.body_mut().as_reader();
    if body.take(MAX_ANSWER).read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    let Ok(explained) = serde_json::from_slice::<Explained>(&bytes) else {
        return String::new();
    };
    let shown = explained.message.chars().take(SHOWN);
    let shown: String = shown
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    format!(": {}", shown.trim())
}

#[cfg(test)]
mod tests;
