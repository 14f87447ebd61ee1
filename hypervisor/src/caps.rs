//! Capabilities of a backend, as data.

/// Support for unmodified Linux guests.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinuxSupport {
    /// Guest code runs natively.
    Native,
    /// Guest code cannot run.
    Unusable {
        /// The backend's finding, as a sentence without a full stop.
        reason: String,
        /// The remedy for a person at this host, as a sentence without a full stop.
        remedy: String,
    },
}

impl LinuxSupport {
    /// Returns the sentences for a person whose guest cannot run here; `None` if it can.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        match self {
            Self::Native => None,
            Self::Unusable { reason, remedy } => Some(format!("{reason}. {remedy}")),
        }
    }
}

/// Properties of an opened backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Short name of the backend: `kvm`, `hvf`, `whp`, `fake`.
    pub backend: &'static str,
    /// Largest number of vCPUs in a VM.
    pub max_vcpus: u32,
    /// Support for Linux guests.
    pub linux: LinuxSupport,
}
