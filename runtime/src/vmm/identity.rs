//! Guest software, by what is in it.

/// Digests that tell one guest software from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// SHA-256 of the kernel.
    pub(crate) kernel: String,
    /// Digest of the initial RAM file system's contents, which are agent and modules.
    pub(crate) agent: String,
}
