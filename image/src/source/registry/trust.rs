//! TLS authorities and client certificates: those of the system, and those configured for
//! single registries in `certs.d/HOST[:PORT]` (containers-certs.d(5)) of Docker and
//! Podman.

use std::path::{Path, PathBuf};

use ureq::tls::{Certificate, ClientCert, RootCerts, TlsConfig};

use super::super::pem::{certificates, private_key};

/// Returns the TLS configuration for `host`, with its port if it has one. For an
/// `insecure` host every certificate is accepted. `SSL_CERT_FILE` and `SSL_CERT_DIR`
/// override the system's authorities.
pub(super) fn tls(host: &str, insecure: bool) -> TlsConfig {
    let system = rustls_native_certs::load_native_certs();
    let mut roots: Vec<Certificate<'static>> = system
        .certs
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    let mut own = None;
    for directory in directories(host) {
        let found = read_directory(&directory);
        roots.extend(found.roots);
        own = own.or(found.own);
    }
    TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .client_cert(own)
        .disable_verification(insecure)
        .build()
}

/// Returns the user's own directories, then the system's.
fn directories(host: &str) -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let home = variable("HOME").map(PathBuf::from);
    let configuration = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| home.map(|home| home.join(".config")));
    let own = configuration.into_iter().flat_map(|configuration| {
        ["containers/certs.d", "docker/certs.d"].map(|name| configuration.join(name))
    });
    let system = ["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from);
    own.chain(system)
        .map(|directory| directory.join(host))
        .collect()
}

#[derive(Default)]
struct DirectoryCertificates {
    roots: Vec<Certificate<'static>>,
    own: Option<ClientCert>,
}

/// Reads a directory: `*.crt` are authorities, `NAME.cert` with `NAME.key` is a client
/// certificate.
fn read_directory(directory: &Path) -> DirectoryCertificates {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return DirectoryCertificates::default();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let mut found = DirectoryCertificates::default();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => found.roots.extend(certificates(&path)),
            Some("cert") if found.own.is_none() => {
                let chain = certificates(&path);
                let key = private_key(&path.with_extension("key"));
                found.own = key
                    .filter(|_| !chain.is_empty())
                    .map(|key| ClientCert::new_with_certs(&chain, key));
            }
            _ => {}
        }
    }
    found
}
