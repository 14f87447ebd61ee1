//! Whom to believe to be a registry: the system's certificates, and those that
//! Docker and Podman are given for single registries.

use std::path::{Path, PathBuf};

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// Largest certificate file read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// TLS for `host`, with its port if it has one.
pub(super) fn tls(host: &str) -> TlsConfig {
    let system = rustls_native_certs::load_native_certs();
    let mut roots: Vec<Certificate<'static>> = system
        .certs
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    for directory in directories(host) {
        roots.extend(certificates(&directory));
    }
    TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .build()
}

fn directories(host: &str) -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let own = home.map(|home| home.join(".config/containers/certs.d"));
    ["/etc/containers/certs.d", "/etc/docker/certs.d"]
        .into_iter()
        .map(PathBuf::from)
        .chain(own)
        .map(|directory| directory.join(host))
        .collect()
}

/// The certificates in the `.crt` files of a directory; none if there is none.
fn certificates(directory: &Path) -> Vec<Certificate<'static>> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "crt"))
        .filter(|path| path.metadata().is_ok_and(|meta| meta.len() <= MAX_FILE))
        .filter_map(|path| std::fs::read(path).ok())
        .flat_map(|pem| {
            let items = parse_pem(&pem).filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            });
            items.collect::<Vec<_>>()
        })
        .collect()
}
