//! Ports of the guest, published on the host.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use sm_devices_vsock::MuxerHandle;
use sm_frontends::{
    HandoffFrontend, HandoffFrontendHandle, HybridFrontend, HybridFrontendHandle, Target,
    TcpFrontend, TcpFrontendHandle, UnixFrontend, UnixFrontendHandle,
};
use sm_guest_proto::forward::ForwardHeader;
use sm_vmm_core::event_loop::EventLoopHandle;

use serde::{Deserialize, Serialize};

use crate::doctor::with_causes;

/// How long a connection waits in the guest for somebody to listen, in
/// milliseconds.
const WAIT_MS: u32 = 1000;

/// Where the host listens for a guest's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostEnd {
    /// A TCP address; port 0 is one of the system's choice.
    Tcp(SocketAddr),
    /// A unix socket, which only this user can use.
    Unix(PathBuf),
    /// A unix socket on which a router hands accepted connections over; see
    /// [`sm_frontends::HandoffFrontend`].
    Handoff(PathBuf),
    /// A unix socket on which any vsock port of the guest can be asked for; see
    /// [`sm_frontends::HybridFrontend`].
    Hybrid(PathBuf),
}

impl fmt::Display for HostEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
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
        if protocol != "tcp" {
            return Err(bad("only TCP ports can be published"));
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

/// A published port; it is given back when this is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "it listens while the handle lives")]
enum Listening {
    Tcp(TcpFrontendHandle),
    Unix(UnixFrontendHandle),
    Handoff(HandoffFrontendHandle),
    Hybrid(HybridFrontendHandle),
}

/// All that a machine has published.
#[derive(Debug, Default)]
pub(crate) struct Published {
    listening: Vec<(Listening, Publication)>,
}

impl Published {
    /// Listens for every publication.
    ///
    /// # Errors
    /// One of them is taken or impossible; a sentence.
    pub(crate) fn start(
        wanted: &[Publication],
        muxer: &MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, String> {
        let mut listening = Vec::with_capacity(wanted.len());
        for publication in wanted {
            let header = ForwardHeader {
                port: publication.guest,
                wait_ms: WAIT_MS,
            };
            let target = Target::Tcp(header);
            let failed = |error: sm_frontends::Error| {
                let hint = match error {
                    sm_frontends::Error::PortInUse { .. } => {
                        ": publish it on another port of the host, or leave that out and have one \
                         chosen"
                    }
                    _ => "",
                };
                format!(
                    "cannot publish {} of the guest: {}{hint}",
                    publication.guest_end(),
                    with_causes(&error)
                )
            };
            let (handle, host) = match &publication.host {
                HostEnd::Tcp(address) => {
                    let handle = TcpFrontend::new(*address, target)
                        .start(muxer.clone(), event_loop)
                        .map_err(failed)?;
                    let host = HostEnd::Tcp(handle.address());
                    (Listening::Tcp(handle), host)
                }
                HostEnd::Unix(path) => {
                    let handle = UnixFrontend::new(path, target)
                        .start(muxer.clone(), event_loop)
                        .map_err(failed)?;
                    (Listening::Unix(handle), publication.host.clone())
                }
                HostEnd::Handoff(path) => {
                    let handle = HandoffFrontend::new(path, header)
                        .start(muxer.clone(), event_loop)
                        .map_err(failed)?;
                    (Listening::Handoff(handle), publication.host.clone())
                }
                HostEnd::Hybrid(path) => {
                    let handle = HybridFrontend::new(path)
                        .start(muxer.clone(), event_loop)
                        .map_err(failed)?;
                    (Listening::Hybrid(handle), publication.host.clone())
                }
            };
            let publication = Publication {
                host,
                guest: publication.guest,
            };
            listening.push((handle, publication));
        }
        Ok(Self { listening })
    }

    /// What is published, with the ports that the system has chosen.
    pub(crate) fn list(&self) -> Vec<Publication> {
        let list = self.listening.iter();
        list.map(|(_, publication)| publication.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tcp(address: &str, guest: u16) -> Publication {
        Publication {
            host: HostEnd::Tcp(address.parse().unwrap()),
            guest,
        }
    }

    #[test]
    fn what_docker_takes_is_taken() {
        for (word, host, guest) in [
            ("80", "127.0.0.1:0", 80),
            ("8080:80", "127.0.0.1:8080", 80),
            ("8080:80/tcp", "127.0.0.1:8080", 80),
            ("0.0.0.0:8080:80", "0.0.0.0:8080", 80),
            ("127.0.0.1::80", "127.0.0.1:0", 80),
            ("[::1]:8080:80", "[::1]:8080", 80),
            ("auto", "127.0.0.1:0", 0),
        ] {
            assert_eq!(word.parse(), Ok(tcp(host, guest)), "{word}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for word in [
            "", "0", "80/udp", "x:80", "65536:80", "80:0", "a.b:1:2", "1:2:3:4", "-1",
        ] {
            let error = word.parse::<Publication>().unwrap_err();
            assert!(
                error.to_string().contains(&format!("\"{word}\"")),
                "{error}"
            );
        }
        for word in ["", "80", ":80", "/x:0", "/x:y"] {
            assert!(Publication::unix(word).is_err(), "{word}");
        }
    }

    #[test]
    fn routers_and_vsock_have_sockets_of_their_own() {
        let shown = |publication: Result<Publication, PublishError>| {
            publication.map(|publication| publication.to_string())
        };
        let handoff = |word| shown(Publication::handoff(word)).unwrap();
        assert_eq!(handoff("/run/h:80"), "handoff:/run/h->80/tcp");
        assert_eq!(handoff("/run/h"), "handoff:/run/h->auto/tcp");
        assert_eq!(handoff("/run/a:b"), "handoff:/run/a:b->auto/tcp");
        let hybrid = shown(Publication::hybrid("/run/v")).unwrap();
        assert_eq!(hybrid, "hybrid:/run/v->vsock");
        assert!(Publication::hybrid("").is_err() && Publication::handoff("").is_err());
    }

    #[test]
    fn a_socket_is_where_the_caller_means_it() {
        let here = std::env::current_dir().unwrap();
        let Publication { host, guest } = Publication::unix("a:b:80").unwrap();
        assert_eq!((host, guest), (HostEnd::Unix(here.join("a:b")), 80));
    }

    proptest! {
        #[test]
        fn any_word_is_read_or_refused(word in "[0-9a-z:./\\[\\]-]{0,24}") {
            let _ = word.parse::<Publication>();
        }

        #[test]
        fn what_is_shown_as_an_address_is_read_back(port in any::<u16>(), guest in 1..=u16::MAX) {
            for address in ["127.0.0.1", "[::]"] {
                let parsed: Publication = format!("{address}:{port}:{guest}").parse().unwrap();
                prop_assert_eq!(parsed, tcp(&format!("{address}:{port}"), guest));
            }
        }
    }
}
