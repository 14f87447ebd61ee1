//! Publication of guest ports on the host.

mod ports;
mod tls;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use self::ports::Ports;
pub use self::tls::TlsEnd;

/// Default time that a connection waits for a listener in the guest, in milliseconds.
pub const DEFAULT_WAIT_MS: u32 = 1000;

/// A published port and its connection counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PublishedPort {
    /// The publication, with the ports that the system assigned.
    #[serde(flatten)]
    pub publication: Publication,
    /// Connection counters.
    pub connections: PortStats,
}

impl PublishedPort {
    /// Creates the report of a published port.
    #[must_use]
    pub fn new(publication: Publication, connections: PortStats) -> Self {
        Self {
            publication,
            connections,
        }
    }
}

/// Connection counters of a published port, as the frontends of `sm-frontends` maintain
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStats {
    /// Connections forwarded to the guest.
    pub accepted: u64,
    /// Connections that are open.
    pub active: usize,
    /// Connections refused on the host.
    pub refused: u64,
    /// Connections closed because their request did not arrive in time.
    pub evicted: u64,
    /// Connections for which nothing in the guest listened.
    pub unanswered: u64,
    /// Bytes sent to the guest.
    pub to_guest: u64,
    /// Bytes received from the guest.
    pub from_guest: u64,
}

/// The listener on the host for a guest port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostEnd {
    /// A TCP address. With port 0 the system assigns a port.
    Tcp(SocketAddr),
    /// A TCP address with TLS, which is terminated on the host.
    Tls(Box<TlsEnd>),
    /// A unix socket that only this user can connect to.
    Unix(PathBuf),
    /// A unix socket over which a router passes accepted connections; see
    /// `HandoffFrontend` of `sm-frontends`.
    Handoff(PathBuf),
    /// A unix socket whose clients choose a vsock port of the guest; see `HybridFrontend`
    /// of `sm-frontends`.
    Hybrid(PathBuf),
}

impl fmt::Display for HostEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Tls(end) => write!(f, "tls:{}", end.address),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Handoff(path) => write!(f, "handoff:{}", path.display()),
            Self::Hybrid(path) => write!(f, "hybrid:{}", path.display()),
        }
    }
}

/// Publication of a TCP port of the guest on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Publication {
    /// The listener on the host.
    pub host: HostEnd,
    /// The guest's port; `None` for the first port on which a process listens. Serialized
    /// as 0 in this case.
    #[serde(with = "port_or_zero")]
    pub guest: Option<NonZeroU16>,
}

mod port_or_zero {
    use std::num::NonZeroU16;

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    #[expect(clippy::ref_option, reason = "the signature that serde expects")]
    pub(super) fn serialize<S: Serializer>(
        port: &Option<NonZeroU16>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        port.map_or(0, NonZeroU16::get).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<NonZeroU16>, D::Error> {
        u16::deserialize(from).map(NonZeroU16::new)
    }
}

impl fmt::Display for Publication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}->{}", self.host, self.guest_end())
    }
}

/// Failure to parse a publication.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot publish \"{word}\": {reason}")]
pub struct PublishError {
    word: String,
    reason: &'static str,
}

impl FromStr for Publication {
    type Err = PublishError;

    /// Parses `[[IP:]HOST:]GUEST[/tcp]` or `auto`. The syntax is that of `docker run
    /// --publish`, except that the address defaults to 127.0.0.1. Without a host port the
    /// system assigns one.
    fn from_str(word: &str) -> Result<Self, PublishError> {
        let bad = |reason| PublishError {
            word: word.to_owned(),
            reason,
        };
        let (ports, protocol) = word.rsplit_once('/').unwrap_or((word, "tcp"));
        match protocol {
            "tcp" => {}
            "udp" | "sctp" => {
                return Err(bad("only TCP ports can be published"));
            }
            _ => return Err(bad("the protocol must be tcp")),
        }
        let tcp = |address: IpAddr, port| HostEnd::Tcp(SocketAddr::new(address, port));
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        if ports == "auto" {
            let host = tcp(local, 0);
            return Ok(Self { host, guest: None });
        }
        let (front, guest) = ports.rsplit_once(':').unwrap_or(("", ports));
        let guest = match guest.parse::<NonZeroU16>() {
            Ok(port) => Some(port),
            Err(_) => return Err(bad("the guest's port must be a number from 1 to 65535")),
        };
        let (address, port) = front.rsplit_once(':').unwrap_or(("", front));
        let port = match port {
            "" => 0,
            digits => digits
                .parse()
                .map_err(|_| bad("the host's port must be a number up to 65535"))?,
        };
        let bare = address
            .strip_prefix('[')
            .and_then(|inner| inner.strip_suffix(']'));
        let address = match bare.unwrap_or(address) {
            "" => local,
            text => text
                .parse()
                .map_err(|_| bad("the address is not an IP address"))?,
        };
        let host = tcp(address, port);
        Ok(Self { host, guest })
    }
}

impl Publication {
    /// Publishes a port of the guest; `None` stands for the first port on which a process
    /// listens.
    #[must_use]
    pub fn new(host: HostEnd, guest: Option<NonZeroU16>) -> Self {
        Self { host, guest }
    }

    /// Formats the guest's side: `80/tcp`, `auto/tcp` or `vsock`.
    #[must_use]
    pub fn guest_end(&self) -> String {
        match (&self.host, self.guest) {
            (HostEnd::Hybrid(_), _) => "vsock".to_owned(),
            (_, None) => "auto/tcp".to_owned(),
            (_, Some(port)) => format!("{port}/tcp"),
        }
    }

    /// Parses `PATH[:GUEST]`, a unix socket over which a router passes connections.
    /// Without a port, connections go to the first port on which the guest listens.
    ///
    /// # Errors
    /// The path is empty, or cannot be made absolute.
    pub fn handoff(word: &str) -> Result<Self, PublishError> {
        let (path, guest) = match word.rsplit_once(':') {
            Some((path, port)) => match port.parse::<NonZeroU16>() {
                Ok(port) => (path, Some(port)),
                Err(_) => (word, None),
            },
            None => (word, None),
        };
        let host = HostEnd::Handoff(absolute_path(word, path)?);
        Ok(Self { host, guest })
    }

    /// Publishes all vsock ports of the guest on the unix socket at `path`.
    ///
    /// # Errors
    /// The path is empty, or cannot be made absolute.
    pub fn hybrid(path: &str) -> Result<Self, PublishError> {
        let host = HostEnd::Hybrid(absolute_path(path, path)?);
        Ok(Self { host, guest: None })
    }

    /// Parses a TLS listener:
    /// `[[IP:]HOST:]GUEST[,cert=FILE,key=FILE][,name=NAME][,alpn=PROTOCOL][,sni=NAME:GUEST]`.
    ///
    /// # Errors
    /// The text does not have this form.
    pub fn tls(word: &str) -> Result<Self, PublishError> {
        tls::parse(word)
    }

    /// Parses `PATH:GUEST`, a unix socket for one port of the guest.
    ///
    /// # Errors
    /// The text does not have this form.
    pub fn unix(word: &str) -> Result<Self, PublishError> {
        let bad = |reason| PublishError {
            word: word.to_owned(),
            reason,
        };
        let (path, guest) = word
            .rsplit_once(':')
            .ok_or_else(|| bad("write PATH:GUEST"))?;
        let path = absolute_path(word, path)?;
        match guest.parse::<NonZeroU16>() {
            Ok(guest) => Ok(Self {
                host: HostEnd::Unix(path),
                guest: Some(guest),
            }),
            Err(_) => Err(bad("the guest's port must be a number from 1 to 65535")),
        }
    }
}

/// Makes the path of a socket absolute, because the VMM runs in another directory.
fn absolute_path(word: &str, path: &str) -> Result<PathBuf, PublishError> {
    let bad = |reason| PublishError {
        word: word.to_owned(),
        reason,
    };
    if path.is_empty() {
        return Err(bad("the socket's path is empty"));
    }
    std::path::absolute(path).map_err(|_| bad("the current directory is unknown"))
}

#[cfg(test)]
mod tests;
