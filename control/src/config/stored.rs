//! The stored configuration and its parts: JSON that other versions of the program read.
//!
//! The types repeat [`VmConfig`] and those of [`crate::workload`] and [`crate::publish`],
//! so that these can change without changing files. A member may be added with a default;
//! any other change needs a type of the next version.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::life::is_default;
use super::{
    HealthCheck, LaunchConfig, NetworkConfigV1, RestartPolicy, VmConfig, default_wait_ms, from_ns,
    from_wait_ms, to_ms, to_ns, to_wait_ms,
};
use crate::id::VmId;
use crate::privileges::Privileges;
use crate::publish::{HostEnd, Publication, TlsEnd};
use crate::workload::{Rlimit, Sysctl, Workload};

/// The configuration of a VM. Its version is that of the file or section which contains
/// it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredConfigV1 {
    /// Identifier.
    pub id: VmId,
    /// Name.
    pub name: String,
    /// The image reference that the caller gave.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Creation time in nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// The command that runs in the VM.
    pub workload: WorkloadV1,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The part of it that the guest may use, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<u64>,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Path of the kernel image that was booted.
    pub kernel: PathBuf,
    /// The VM's record is removed when the VM exits.
    pub auto_remove: bool,
    /// The root file system has no writable layer.
    pub read_only: bool,
    /// Milliseconds between the stop signal and SIGKILL.
    pub stop_timeout_ms: u64,
    /// Guest ports published on the host, as the caller requested them.
    #[serde(default)]
    pub publish: Vec<PublicationV1>,
    /// Milliseconds that a connection to a published port waits for a listener in the
    /// guest.
    #[serde(default = "default_wait_ms")]
    pub publish_wait_ms: u32,
    /// Labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Condition under which it is started again.
    #[serde(default, skip_serializing_if = "is_default")]
    pub restart: RestartPolicy,
    /// Check of the workload's health.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// Milliseconds that each run may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expire_ms: Option<u64>,
    /// Its network.
    #[serde(
        default = "NetworkConfigV1::none",
        skip_serializing_if = "NetworkConfigV1::is_none"
    )]
    pub network: NetworkConfigV1,
}

/// A [`Workload`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadV1 {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// `NAME=value` entries.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// `user[:group]`, empty for root.
    pub user: String,
    /// Additional groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// Run on a terminal.
    pub tty: bool,
    /// Keep standard input open.
    pub stdin: bool,
    /// Host name of the guest.
    pub hostname: String,
    /// Number of the signal that requests the workload to exit.
    pub stop_signal: u8,
    /// Resource limits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rlimits: Vec<RlimitV1>,
    /// Limits of its privileges in the guest.
    #[serde(default, skip_serializing_if = "Privileges::are_unlimited")]
    pub privileges: Privileges,
    /// Parameters of the guest's kernel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sysctls: Vec<Sysctl>,
}

/// A resource limit of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RlimitV1 {
    /// Lower-case name without the `RLIMIT_` prefix.
    pub name: String,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

/// A [`Publication`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicationV1 {
    /// The listener on the host.
    pub host: HostEndV1,
    /// The guest's port; 0 for the first port on which a process listens.
    pub guest: u16,
}

/// The listener on the host of a [`PublicationV1`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostEndV1 {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A TCP address with TLS.
    Tls(Box<TlsEndV1>),
    /// A unix socket.
    Unix(PathBuf),
    /// A unix socket of a router.
    Handoff(PathBuf),
    /// A unix socket whose clients choose a vsock port.
    Hybrid(PathBuf),
}

/// A TLS listener of a [`HostEndV1`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsEndV1 {
    /// Address to listen on.
    pub address: SocketAddr,
    /// Path of the certificate chain.
    pub certificate: Option<PathBuf>,
    /// Path of the private key.
    pub key: Option<PathBuf>,
    /// Names for which a self-signed certificate is valid.
    pub names: Vec<String>,
    /// Application protocols offered (ALPN).
    pub protocols: Vec<String>,
    /// Guest ports for particular server names (SNI).
    pub servers: Vec<(String, u16)>,
}

impl From<VmConfig> for StoredConfigV1 {
    fn from(config: VmConfig) -> Self {
        let VmConfig {
            id,
            name,
            image,
            image_digest,
            created,
            workload,
            memory_bytes,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout,
            publish,
            publish_wait,
            labels,
            restart,
            health,
            expire,
            network,
        } = config;
        Self {
            id,
            name,
            image,
            image_digest,
            created_ns: to_ns(created),
            workload: workload.into(),
            memory: memory_bytes,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms: to_ms(stop_timeout),
            publish: publish.into_iter().map(Into::into).collect(),
            publish_wait_ms: to_wait_ms(publish_wait),
            labels,
            restart,
            health,
            expire_ms: expire.map(to_ms),
            network,
        }
    }
}

impl From<StoredConfigV1> for VmConfig {
    fn from(config: StoredConfigV1) -> Self {
        let StoredConfigV1 {
            id,
            name,
            image,
            image_digest,
            created_ns,
            workload,
            memory,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout_ms,
            publish,
            publish_wait_ms,
            labels,
            restart,
            health,
            expire_ms,
            network,
        } = config;
        Self {
            id,
            name,
            image,
            image_digest,
            created: from_ns(created_ns),
            workload: workload.into(),
            memory_bytes: memory,
            memory_limit,
            cpus,
            kernel,
            auto_remove,
            read_only,
            stop_timeout: Duration::from_millis(stop_timeout_ms),
            publish: publish.into_iter().map(Into::into).collect(),
            publish_wait: from_wait_ms(publish_wait_ms),
            labels,
            restart,
            health,
            expire: expire_ms.map(Duration::from_millis),
            network,
        }
    }
}

impl From<LaunchConfig> for StoredConfigV1 {
    fn from(config: LaunchConfig) -> Self {
        VmConfig::from(config).into()
    }
}

impl From<Workload> for WorkloadV1 {
    fn from(workload: Workload) -> Self {
        let Workload {
            argv,
            env,
            cwd,
            user,
            groups,
            tty,
            stdin,
            hostname,
            stop_signal,
            rlimits,
            privileges,
            sysctls,
        } = workload;
        let rlimits = rlimits.into_iter();
        Self {
            argv,
            env,
            cwd,
            user,
            groups,
            tty,
            stdin,
            hostname,
            stop_signal,
            privileges,
            sysctls,
            rlimits: rlimits
                .map(|Rlimit { name, soft, hard }| RlimitV1 { name, soft, hard })
                .collect(),
        }
    }
}

impl From<WorkloadV1> for Workload {
    fn from(workload: WorkloadV1) -> Self {
        let WorkloadV1 {
            argv,
            env,
            cwd,
            user,
            groups,
            tty,
            stdin,
            hostname,
            stop_signal,
            rlimits,
            privileges,
            sysctls,
        } = workload;
        let rlimits = rlimits.into_iter();
        Self {
            argv,
            env,
            cwd,
            user,
            groups,
            tty,
            stdin,
            hostname,
            stop_signal,
            privileges,
            sysctls,
            rlimits: rlimits
                .map(|RlimitV1 { name, soft, hard }| Rlimit { name, soft, hard })
                .collect(),
        }
    }
}

impl From<Publication> for PublicationV1 {
    fn from(publication: Publication) -> Self {
        let Publication { host, guest } = publication;
        let host = match host {
            HostEnd::Tcp(address) => HostEndV1::Tcp(address),
            HostEnd::Tls(end) => HostEndV1::Tls(Box::new((*end).into())),
            HostEnd::Unix(path) => HostEndV1::Unix(path),
            HostEnd::Handoff(path) => HostEndV1::Handoff(path),
            HostEnd::Hybrid(path) => HostEndV1::Hybrid(path),
        };
        let guest = guest.map_or(0, NonZeroU16::get);
        Self { host, guest }
    }
}

impl From<PublicationV1> for Publication {
    fn from(publication: PublicationV1) -> Self {
        let PublicationV1 { host, guest } = publication;
        let host = match host {
            HostEndV1::Tcp(address) => HostEnd::Tcp(address),
            HostEndV1::Tls(end) => HostEnd::Tls(Box::new((*end).into())),
            HostEndV1::Unix(path) => HostEnd::Unix(path),
            HostEndV1::Handoff(path) => HostEnd::Handoff(path),
            HostEndV1::Hybrid(path) => HostEnd::Hybrid(path),
        };
        Self::new(host, NonZeroU16::new(guest))
    }
}

impl From<TlsEnd> for TlsEndV1 {
    fn from(end: TlsEnd) -> Self {
        let TlsEnd {
            address,
            certificate,
            key,
            names,
            protocols,
            servers,
        } = end;
        Self {
            address,
            certificate,
            key,
            names,
            protocols,
            servers,
        }
    }
}

impl From<TlsEndV1> for TlsEnd {
    fn from(end: TlsEndV1) -> Self {
        let TlsEndV1 {
            address,
            certificate,
            key,
            names,
            protocols,
            servers,
        } = end;
        Self {
            address,
            certificate,
            key,
            names,
            protocols,
            servers,
        }
    }
}
