//! Ports of the guest, published on the host.

mod ports;
mod tls;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use self::ports::Ports;
pub use self::tls::TlsEnd;

/// How long a connection waits for somebody in the guest to listen unless something
/// else is asked for, in milliseconds.
pub const DEFAULT_WAIT_MS: u32 = 1000;

/// A port that is published, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Where it is published, with the ports that the system has chosen.
    #[serde(flatten)]
    pub publication: Publication,
    /// What its clients did.
    pub connections: PortStats,
}

/// Counters of the clients of a published port, as the frontends of `sm-frontends` keep them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStats {
    /// Connections led to the guest.
    pub accepted: u64,
    /// Connections that live now.
    pub active: usize,
    /// Connections turned away on the host.
    pub refused: u64,
    /// Connections hung up on because they took too long to say what they want.
    pub evicted: u64,
    /// Connections that nothing in the guest took.
    pub unanswered: u64,
    /// Bytes sent to the guest.
    pub to_guest: u64,
    /// Bytes that came from the guest.
    pub from_guest: u64,
}

/// Where the host listens for a guest's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostEnd {
    /// A TCP address; port 0 is one of the system's choice.
    Tcp(SocketAddr),
    /// A TCP address that speaks TLS; the guest sees plain bytes.
    Tls(Box<TlsEnd>),
    /// A unix socket, which only this user can use.
    Unix(PathBuf),
    /// A unix socket on which a router hands accepted connections over; see
    /// `HandoffFrontend` of `sm-frontends`.
    Handoff(PathBuf),
    /// A unix socket on which any vsock port of the guest can be asked for; see
    /// `HybridFrontend` of `sm-frontends`.
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

/// A TCP port of the guest that is reached from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Where the host listens.
    pub host: HostEnd,
    /// The guest's port; 0 for the first on which something listens.
    pub guest: u16,
}

impl fmt::Display for Publication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}->{}", self.host, self.guest_end())
    }
}

/// Why a word does not say what to publish; a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{word}\" does not say what to publish: {reason}")]
pub struct PublishError {
    word: String,
    reason: &'static str,
}

impl FromStr for Publication {
    type Err = PublishError;

    /// Reads `[[IP:]HOST:]GUEST[/tcp]` or `auto`, as `docker run --publish` has
    /// it but for the address, which is 127.0.0.1 unless one is given. Without
    /// a host port the system chooses one.
    fn from_str(word: &str) -> Result<Self, PublishError> {
        let bad = |reason| PublishError {
            word: word.to_owned(),
            reason,
        };
        let (ports, protocol) = word.rsplit_once('/').unwrap_or((word, "tcp"));
        match protocol {
            "tcp" => {}
            "udp" | "sctp" => {
                return Err(bad(
                    "only TCP ports can be published: streams are what a VM is reached by",
                ));
            }
            _ => return Err(bad("the protocol is tcp")),
        }
        let tcp = |address: IpAddr, port| HostEnd::Tcp(SocketAddr::new(address, port));
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        if ports == "auto" {
            let host = tcp(local, 0);
            return Ok(Self { host, guest: 0 });
        }
        let (front, guest) = ports.rsplit_once(':').unwrap_or(("", ports));
        let guest = match guest.parse::<u16>() {
            Ok(port @ 1..) => port,
            _ => return Err(bad("the guest's port is a number from 1 to 65535")),
        };
        let (address, port) = front.rsplit_once(':').unwrap_or(("", front));
        let port = match port {
            "" => 0,
            digits => digits
                .parse()
                .map_err(|_| bad("the host's port is a number up to 65535"))?,
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
    /// What of the guest is reached: `80/tcp`, `auto/tcp` or `vsock`.
    #[must_use]
    pub fn guest_end(&self) -> String {
        match (&self.host, self.guest) {
            (HostEnd::Hybrid(_), _) => "vsock".to_owned(),
            (_, 0) => "auto/tcp".to_owned(),
            (_, port) => format!("{port}/tcp"),
        }
    }

    /// A socket for routers, from `PATH[:GUEST]`; without a port, for the first on
    /// which the guest listens.
    ///
    /// # Errors
    /// It is not that.
    pub fn handoff(word: &str) -> Result<Self, PublishError> {
        let (path, guest) = match word.rsplit_once(':') {
            Some((path, port)) => match port.parse::<u16>() {
                Ok(port @ 1..) => (path, port),
                _ => (word, 0),
            },
            None => (word, 0),
        };
        let host = HostEnd::Handoff(place(word, path)?);
        Ok(Self { host, guest })
    }

    /// A socket for the guest's vsock ports, from its path.
    ///
    /// # Errors
    /// It is empty.
    pub fn hybrid(path: &str) -> Result<Self, PublishError> {
        let host = HostEnd::Hybrid(place(path, path)?);
        Ok(Self { host, guest: 0 })
    }

    /// A TLS listener, from
    /// `[[IP:]HOST:]GUEST[,cert=FILE,key=FILE][,name=NAME][,alpn=PROTOCOL][,sni=NAME:GUEST]`.
    ///
    /// # Errors
    /// It is not that.
    pub fn tls(word: &str) -> Result<Self, PublishError> {
        tls::parse(word)
    }

    /// A unix socket for a guest's port, from `PATH:GUEST`.
    ///
    /// # Errors
    /// It is not that.
    pub fn unix(word: &str) -> Result<Self, PublishError> {
        let bad = |reason| PublishError {
            word: word.to_owned(),
            reason,
        };
        let (path, guest) = word
            .rsplit_once(':')
            .ok_or_else(|| bad("write PATH:GUEST"))?;
        let path = place(word, path)?;
        match guest.parse::<u16>() {
            Ok(guest @ 1..) => Ok(Self {
                host: HostEnd::Unix(path),
                guest,
            }),
            _ => Err(bad("the guest's port is a number from 1 to 65535")),
        }
    }
}

/// The absolute path of a socket: the VMM works in another directory.
fn place(word: &str, path: &str) -> Result<PathBuf, PublishError> {
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
