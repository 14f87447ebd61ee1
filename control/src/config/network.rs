//! The network of a VM.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Kind of network of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NetworkMode {
    /// The loopback interface only.
    None,
    /// Connections of the guest are those of the VM's process on the host, as far as the
    /// rules allow them.
    #[default]
    User,
    /// A kind that only a later version knows.
    #[serde(other)]
    Other,
}

impl NetworkMode {
    /// Returns its name, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::User => "user",
            Self::Other => "other",
        }
    }
}

/// The address in [`NetworkConfigV1::hosts`] that stands for the host.
pub const HOST_GATEWAY: &str = "host-gateway";

/// The network of a VM: JSON in records, snapshots and launch requests. Members may be added
/// with a default.
///
/// ```
/// use sm_control::config::{NetworkConfigV1, NetworkMode};
///
/// let network = NetworkConfigV1::default();
/// assert_eq!((network.mode, network.mtu), (NetworkMode::User, 1500));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct NetworkConfigV1 {
    /// Its kind.
    pub mode: NetworkMode,
    /// Rules about what the guest may reach, as `sm-devices-net` has them; without any, what
    /// is public.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Rules about what it may not reach, even if another rule allows it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
    /// Name servers; empty for those of the host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// Domains in which short names are searched; empty for those of the host, and `.` for
    /// none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns_search: Vec<String>,
    /// Options of the resolver; empty for those of the host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns_options: Vec<String>,
    /// Further lines of `/etc/hosts`: address or [`HOST_GATEWAY`], and name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<(String, String)>,
    /// MAC address of the guest; absent for another one at each start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Maximum length of an IP packet.
    pub mtu: u16,
    /// Bytes in a second that the guest may send, and as many that it may receive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<NonZeroU64>,
    /// Absolute path of a file to which the guest's frames are written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capture: Option<PathBuf>,
}

impl Default for NetworkConfigV1 {
    fn default() -> Self {
        Self {
            mode: NetworkMode::User,
            allow: Vec::new(),
            deny: Vec::new(),
            dns: Vec::new(),
            dns_search: Vec::new(),
            dns_options: Vec::new(),
            hosts: Vec::new(),
            mac: None,
            mtu: 1500,
            rate: None,
            capture: None,
        }
    }
}

impl NetworkConfigV1 {
    /// Returns that of a VM without a network, as all were in early versions.
    #[must_use]
    pub fn none() -> Self {
        Self {
            mode: NetworkMode::None,
            ..Self::default()
        }
    }

    /// Returns true for [`Self::none`].
    pub(super) fn is_none(&self) -> bool {
        *self == Self::none()
    }
}
