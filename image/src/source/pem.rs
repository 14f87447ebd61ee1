//! Parsing of files with certificates and keys.

use std::path::Path;

use ureq::tls::{Certificate, PemItem, PrivateKey, parse_pem};

/// Maximum size of a file in bytes.
const MAX_FILE: u64 = 1 << 20;

fn items(path: &Path) -> Vec<PemItem<'static>> {
    if path.metadata().is_ok_and(|meta| meta.len() > MAX_FILE) {
        return Vec::new();
    }
    let pem = std::fs::read(path).unwrap_or_default();
    parse_pem(&pem).flatten().collect()
}

/// Returns all certificates in a file; none if it cannot be read.
pub(super) fn certificates(path: &Path) -> Vec<Certificate<'static>> {
    let items = items(path).into_iter();
    items
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect()
}

/// Returns the first private key in a file.
pub(super) fn private_key(path: &Path) -> Option<PrivateKey<'static>> {
    items(path).into_iter().find_map(|item| match item {
        PemItem::PrivateKey(key) => Some(key),
        _ => None,
    })
}
