//! The listeners of a machine.

use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use sm_devices_vsock::MuxerHandle;
use sm_frontends::{
    HandoffFrontend, HandoffFrontendHandle, HybridFrontend, HybridFrontendHandle, Target,
    TcpFrontend, TcpFrontendHandle, TlsFrontend, TlsFrontendHandle, TlsIdentity, UnixFrontend,
    UnixFrontendHandle,
};
use sm_guest_proto::forward::ForwardHeader;
use sm_vmm_core::event_loop::EventLoopHandle;

use super::{HostEnd, Publication, TlsEnd};
use crate::doctor::with_causes;

/// How long a connection waits in the guest for somebody to listen, in
/// milliseconds.
const WAIT_MS: u32 = 1000;

/// A published port; it is given back when this is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "it listens while the handle lives")]
enum Listening {
    Tcp(TcpFrontendHandle),
    Tls(TlsFrontendHandle),
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
    /// Listens for every publication. Certificates that are made for it are put
    /// into `directory`.
    ///
    /// # Errors
    /// One of them is taken or impossible; a sentence.
    pub(crate) fn start(
        wanted: &[Publication],
        directory: &Path,
        muxer: &MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, String> {
        let mut listening = Vec::with_capacity(wanted.len());
        for publication in wanted {
            let target = to_port(publication.guest);
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
                HostEnd::Tls(end) => {
                    let handle = tls_frontend(end, target)
                        .start(muxer.clone(), event_loop)
                        .map_err(failed)?;
                    let end = keep_certificate(&handle, end, directory)?;
                    (Listening::Tls(handle), HostEnd::Tls(Box::new(end)))
                }
                HostEnd::Unix(path) => {
                    let handle = UnixFrontend::new(path, target)
                        .start(muxer.clone(), event_loop)
                        .map_err(failed)?;
                    (Listening::Unix(handle), publication.host.clone())
                }
                HostEnd::Handoff(path) => {
                    let handle = HandoffFrontend::new(path, header(publication.guest))
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

fn header(port: u16) -> ForwardHeader {
    ForwardHeader {
        port,
        wait_ms: WAIT_MS,
    }
}

fn to_port(port: u16) -> Target {
    Target::Tcp(header(port))
}

fn tls_frontend(end: &TlsEnd, target: Target) -> TlsFrontend {
    let identity = match (&end.certificate, &end.key) {
        (Some(certificates), Some(key)) => TlsIdentity::Files {
            certificates: certificates.clone(),
            key: key.clone(),
        },
        _ => {
            let mut names = vec!["localhost".to_owned(), end.address.ip().to_string()];
            names.extend(end.servers.iter().map(|(name, _)| name.clone()));
            names.extend(end.names.iter().cloned());
            TlsIdentity::SelfSigned { names }
        }
    };
    let mut frontend = TlsFrontend::new(end.address, identity, target);
    for protocol in &end.protocols {
        frontend = frontend.protocol(protocol);
    }
    for (name, port) in &end.servers {
        frontend = frontend.server_name(name, to_port(*port));
    }
    frontend
}

/// Where the frontend listens, with the certificate that it may have made.
fn keep_certificate(
    handle: &TlsFrontendHandle,
    end: &TlsEnd,
    directory: &Path,
) -> Result<TlsEnd, String> {
    let mut end = TlsEnd {
        address: handle.address(),
        ..end.clone()
    };
    if let Some(certificate) = handle.self_signed_certificate() {
        let path = directory.join(format!("tls-{}.pem", end.address.port()));
        write_private(&path, certificate)
            .map_err(|error| format!("cannot write the certificate {path:?}: {error}"))?;
        end.certificate = Some(path);
    }
    Ok(end)
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())
}
