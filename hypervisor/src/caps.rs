//! What a backend can do, as data.

/// Whether an unmodified Linux guest can run, and how fast.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinuxSupport {
    /// Guest code runs natively.
    Native,
    /// It cannot: the sentence says what was found.
    Unusable {
        /// What the probe saw, for a person to read.
        reason: String,
    },
}

/// Properties of an opened backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Short name of the backend: `kvm`, `hvf`, `whp`, `fake`.
    pub backend: &'static str,
    /// Largest number of vCPUs in a VM.
    pub max_vcpus: u32,
    /// Whether and how Linux guests run.
    pub linux: LinuxSupport,
}
