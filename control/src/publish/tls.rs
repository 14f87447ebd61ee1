//! Publications with TLS termination.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{HostEnd, Publication, PublishError, absolute_path};

/// A TLS listener on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsEnd {
    /// Address to listen on. With port 0 the system assigns a port.
    pub address: SocketAddr,
    /// Path of the certificate chain, in PEM. Without a key, the listener creates a
    /// self-signed certificate and reports its path here.
    pub certificate: Option<PathBuf>,
    /// Path of the private key of these certificates, in PEM.
    pub key: Option<PathBuf>,
    /// Names for which a self-signed certificate is valid, besides `localhost` and the
    /// address.
    pub names: Vec<String>,
    /// Application protocols offered (ALPN).
    pub protocols: Vec<String>,
    /// Guest ports for particular server names (SNI).
    pub servers: Vec<(String, u16)>,
}

/// Parses `[[IP:]HOST:]GUEST[,OPTION=VALUE]...`.
pub(super) fn parse(word: &str) -> Result<Publication, PublishError> {
    let bad = |reason| PublishError {
        word: word.to_owned(),
        reason,
    };
    let mut parts = word.split(',');
    let ports: Publication = parts.next().unwrap_or_default().parse()?;
    let HostEnd::Tcp(address) = ports.host else {
        return Err(bad("write [[IP:]HOST:]GUEST first"));
    };
    let mut end = TlsEnd {
        address,
        certificate: None,
        key: None,
        names: Vec::new(),
        protocols: Vec::new(),
        servers: Vec::new(),
    };
    for part in parts {
        let (option, value) = part
            .split_once('=')
            .filter(|(_, value)| !value.is_empty())
            .ok_or_else(|| bad("an option must have the form OPTION=VALUE"))?;
        match option {
            "cert" => end.certificate = Some(absolute_path(word, value)?),
            "key" => end.key = Some(absolute_path(word, value)?),
            "name" => end.names.push(value.to_owned()),
            "alpn" if value.len() < 256 => end.protocols.push(value.to_owned()),
            "sni" => {
                let (name, port) = value.rsplit_once(':').unwrap_or((value, ""));
                match port.parse::<u16>() {
                    Ok(port @ 1..) => end.servers.push((name.to_owned(), port)),
                    _ => return Err(bad("write sni=NAME:GUEST, with a port of the guest")),
                }
            }
            _ => {
                return Err(bad(
                    "the options are cert=FILE and key=FILE, name=NAME, alpn=PROTOCOL and \
                     sni=NAME:GUEST",
                ));
            }
        }
    }
    if end.certificate.is_some() != end.key.is_some() {
        return Err(bad(
            "a certificate needs its key, and a key its certificate: \
                        give cert=FILE and key=FILE, or neither",
        ));
    }
    if end.key.is_some() && !end.names.is_empty() {
        return Err(bad("names cannot be set for a given certificate"));
    }
    Ok(Publication {
        host: HostEnd::Tls(Box::new(end)),
        guest: ports.guest,
    })
}
