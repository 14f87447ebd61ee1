//! Guest software, by what is in it.

/// Digests that tell one guest software from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// SHA-256 of the kernel.
    pub kernel: String,
    /// Digest of the initial RAM file system's contents, which are agent and modules.
    pub agent: String,
}
