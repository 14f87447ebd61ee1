//! Certificates and keys, and their renewal.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::TlsIdentity;
use crate::Error;

/// Longest certificate or key file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Attributes that distinguish versions of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

fn version(path: &Path) -> io::Result<Version> {
    let meta = std::fs::metadata(path)?;
    Ok(Version {
        device: meta.dev(),
        inode: meta.ino(),
        size: meta.len(),
        modified: (meta.mtime(), meta.mtime_nsec()),
    })
}

#[derive(Debug)]
struct CertificateFiles {
    certificates: PathBuf,
    key: PathBuf,
    /// Versions of both files at the last read.
    versions: Option<[Version; 2]>,
}

impl CertificateFiles {
    fn versions(&self) -> Option<[Version; 2]> {
        Some([version(&self.certificates).ok()?, version(&self.key).ok()?])
    }

    fn read(&self, protocols: &[Vec<u8>]) -> Result<Arc<ServerConfig>, Error> {
        let failed = |operation: &'static str, path: &Path, reason: String| Error::Identity {
            operation,
            path: path.to_owned(),
            reason,
        };
        let read =
            |path: &Path| read(path).map_err(|error| failed("read", path, error.to_string()));
        let text = read(&self.certificates)?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .map_err(|error| failed("use", &self.certificates, error.to_string()))?;
        if chain.is_empty() {
            let reason = "there is no certificate in it (PEM is what is read)";
            return Err(failed("use", &self.certificates, reason.to_owned()));
        }
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .map_err(|error| failed("use the key", &self.key, error.to_string()))?;
        config(chain, key, protocols)
            .map_err(|error| failed("use", &self.certificates, error.to_string()))
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let mut file = File::open(path)?.take(MAX_FILE + 1);
    file.read_to_end(&mut text)?;
    match file.limit() {
        0 => Err(io::Error::other("it is longer than 1 MiB")),
        _ => Ok(text),
    }
}

fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    protocols: &[Vec<u8>],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = protocols.to_vec();
    Ok(Arc::new(config))
}

/// The current certificate and key of a frontend.
#[derive(Debug)]
pub(super) struct CurrentIdentity {
    config: Arc<ServerConfig>,
    protocols: Vec<Vec<u8>>,
    files: Option<CertificateFiles>,
    self_signed: Option<String>,
}

impl CurrentIdentity {
    pub(super) fn load(identity: TlsIdentity, protocols: Vec<Vec<u8>>) -> Result<Self, Error> {
        match identity {
            TlsIdentity::Files { certificates, key } => {
                let mut files = CertificateFiles {
                    certificates,
                    key,
                    versions: None,
                };
                files.versions = files.versions();
                Ok(Self {
                    config: files.read(&protocols)?,
                    protocols,
                    files: Some(files),
                    self_signed: None,
                })
            }
            TlsIdentity::SelfSigned { names } => {
                let failed = |reason: String| Error::SelfSigned { reason };
                let made = rcgen::generate_simple_self_signed(names)
                    .map_err(|error| failed(error.to_string()))?;
                let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
                let config = config(vec![made.cert.der().clone()], key.into(), &protocols)
                    .map_err(|error| failed(error.to_string()))?;
                Ok(Self {
                    config,
                    protocols,
                    files: None,
                    self_signed: Some(made.cert.pem()),
                })
            }
        }
    }

    pub(super) fn self_signed(&self) -> Option<&str> {
        self.self_signed.as_deref()
    }

    /// Returns the configuration for the next connection. Costs two calls of `stat`
    /// unless the files have changed.
    pub(super) fn current(&mut self) -> Arc<ServerConfig> {
        if let Some(files) = &mut self.files {
            let found = files.versions();
            if found.is_some() && found != files.versions {
                match files.read(&self.protocols) {
                    Ok(config) => {
                        tracing::info!(path = %files.certificates.display(), "new certificate");
                        self.config = config;
                    }
                    // One of the two files may not have been replaced yet.
                    Err(error) => tracing::warn!(%error, "the old certificate stays"),
                }
                files.versions = found;
            }
        }
        Arc::clone(&self.config)
    }
}
