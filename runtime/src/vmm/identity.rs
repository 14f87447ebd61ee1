//! Guest software, by what is in it.

use sm_control::launch::LaunchRequest;

use crate::digests::file_digest;
use crate::initramfs::Initramfs;

/// Digests that tell one guest software from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// SHA-256 of the kernel.
    pub(crate) kernel: String,
    /// Digest of the initial RAM file system's contents, which are agent and modules.
    pub(crate) agent: String,
}

impl Identity {
    /// The identity of what `request` boots.
    ///
    /// # Errors
    /// The kernel cannot be read; a clause.
    pub(crate) fn of(request: &LaunchRequest, initramfs: &Initramfs) -> Result<Self, String> {
        Ok(Self {
            kernel: file_digest(&request.config.kernel, &request.cache)
                .map_err(|error| format!("cannot read the kernel: {error}"))?,
            agent: initramfs.digest(),
        })
    }
}
