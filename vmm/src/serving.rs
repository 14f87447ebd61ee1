//! The listeners of a machine.

use std::io;
use std::num::NonZeroU16;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sm_control::config::LaunchConfig;
use sm_control::publish::{HostEnd, PortStats, Publication, PublishedPort, TlsEnd};
use sm_control::with_causes;
use sm_devices_vsock::MuxerHandle;
use sm_event_loop::EventLoopHandle;
use sm_frontends::{
    ForwardTarget, FrontendHandle, FrontendStats, HandoffFrontend, HybridFrontend, Limit,
    TcpFrontend, TlsFrontend, TlsIdentity, UnixFrontend,
};
use sm_guest_proto::forward::ForwardHeader;

/// Dependencies of the listeners.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ListenerDeps<'a> {
    pub(crate) muxer: &'a MuxerHandle,
    pub(crate) event_loop: &'a EventLoopHandle,
    /// Limit of descriptors for connections.
    pub(crate) limit: &'a Limit,
}

/// The published ports of a machine; dropping it closes them.
#[derive(Debug, Default)]
pub(crate) struct Published {
    ports: Vec<(FrontendHandle, Publication)>,
}

impl Published {
    /// Starts a listener for every publication of a VM. Writes self-signed certificates
    /// to `directory`.
    ///
    /// # Errors
    /// An address is in use or unusable; a sentence.
    pub(crate) fn start(
        config: &LaunchConfig,
        directory: &Path,
        deps: ListenerDeps<'_>,
    ) -> Result<Self, String> {
        let mut ports = Vec::with_capacity(config.publish.len());
        for publication in &config.publish {
            let handle = listen(publication, config.publish_wait_ms, deps)
                .map_err(|error| failure(publication, &error))?;
            let host = bound(&handle, &publication.host, directory)?;
            let publication = Publication::new(host, publication.guest);
            ports.push((handle, publication));
        }
        Ok(Self { ports })
    }

    /// Returns the published ports, with the port numbers that the system has chosen.
    pub(crate) fn list(&self) -> Vec<PublishedPort> {
        let ports = self.ports.iter().map(|(handle, publication)| {
            PublishedPort::new(publication.clone(), port_stats(handle.stats()))
        });
        ports.collect()
    }

    /// Closes the listeners; connections continue.
    pub(crate) fn close(&self) {
        for (handle, _) in &self.ports {
            handle.close();
        }
    }

    /// Returns true if bytes of the guest are in flight; `callback` is called when they were
    /// delivered.
    pub(crate) fn when_delivered(&self, callback: impl Fn() + Send + Sync + 'static) -> bool {
        let groups = self.ports.iter().map(|(handle, _)| handle.connections());
        let busy: Vec<_> = groups.filter(|group| group.undelivered() > 0).collect();
        let remaining = Arc::new((AtomicUsize::new(busy.len()), callback));
        for group in &busy {
            let remaining = Arc::clone(&remaining);
            group.when_delivered(move || {
                let (count, callback) = &*remaining;
                if count.fetch_sub(1, Ordering::AcqRel) == 1 {
                    callback();
                }
            });
        }
        !busy.is_empty()
    }
}

/// Converts the counters of a frontend for clients.
fn port_stats(stats: FrontendStats) -> PortStats {
    PortStats {
        accepted: stats.accepted,
        active: stats.active,
        refused: stats.refused,
        evicted: stats.evicted,
        unanswered: stats.unanswered,
        to_guest: stats.to_guest,
        from_guest: stats.from_guest,
    }
}

/// Describes the cause of a failure to publish, with a remedy.
fn failure(publication: &Publication, error: &sm_frontends::Error) -> String {
    let hint = match error {
        sm_frontends::Error::PortInUse { .. } => {
            ": publish it on another port of the host, or leave that out and have one chosen"
        }
        sm_frontends::Error::InUse { .. } | sm_frontends::Error::NotASocket { .. } => {
            ": give another path"
        }
        _ => "",
    };
    let what = publication.guest_end();
    let why = with_causes(error);
    format!("cannot publish {what} of the guest: {why}{hint}")
}

fn listen(
    publication: &Publication,
    wait_ms: u32,
    deps: ListenerDeps<'_>,
) -> Result<FrontendHandle, sm_frontends::Error> {
    let header = |port| ForwardHeader { port, wait_ms };
    // 0 is the first port on which a process listens.
    let guest = publication.guest.map_or(0, NonZeroU16::get);
    let target = ForwardTarget::Tcp(header(guest));
    let (muxer, event_loop) = (deps.muxer.clone(), deps.event_loop);
    match &publication.host {
        HostEnd::Tcp(address) => TcpFrontend::new(*address, target)
            .limit(deps.limit)
            .start(muxer, event_loop),
        HostEnd::Tls(end) => {
            let mut frontend = TlsFrontend::new(end.address, identity(end), target);
            for protocol in &end.protocols {
                frontend = frontend.protocol(protocol);
            }
            for (name, port) in &end.servers {
                frontend = frontend.server_name(name, ForwardTarget::Tcp(header(*port)));
            }
            frontend.limit(deps.limit).start(muxer, event_loop)
        }
        HostEnd::Unix(path) => UnixFrontend::new(path, target)
            .limit(deps.limit)
            .start(muxer, event_loop),
        HostEnd::Handoff(path) => HandoffFrontend::new(path, header(guest))
            .limit(deps.limit)
            .start(muxer, event_loop),
        HostEnd::Hybrid(path) => HybridFrontend::new(path)
            .limit(deps.limit)
            .start(muxer, event_loop),
    }
}

fn identity(end: &TlsEnd) -> TlsIdentity {
    match (&end.certificate, &end.key) {
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
    }
}

/// Returns the address of a listener, in the form of the request.
fn bound(
    handle: &FrontendHandle,
    requested: &HostEnd,
    directory: &Path,
) -> Result<HostEnd, String> {
    Ok(match (requested, handle.local_address().tcp()) {
        (HostEnd::Tcp(_), Some(address)) => HostEnd::Tcp(address),
        (HostEnd::Tls(end), Some(address)) => {
            let end = TlsEnd {
                address,
                ..(**end).clone()
            };
            HostEnd::Tls(Box::new(write_certificate(handle, end, directory)?))
        }
        (other, _) => other.clone(),
    })
}

/// Writes the self-signed certificate of a frontend, if it has one.
fn write_certificate(
    handle: &FrontendHandle,
    mut end: TlsEnd,
    directory: &Path,
) -> Result<TlsEnd, String> {
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
