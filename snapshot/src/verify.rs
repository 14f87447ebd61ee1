//! Verification of every byte of a snapshot.

use crate::Error;
use crate::chain::{Chain, ChainMember};
use crate::extents::ExtentKind;
use crate::memory_file;

/// Statistics of a verification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifiedSnapshot {
    /// Number of verified snapshots, including ancestors.
    pub snapshots: usize,
    /// Number of memory pages whose digests were computed.
    pub pages: u64,
}

/// Verifies a snapshot and its ancestors: all stored memory, in addition to manifests and
/// state, which were checked when the chain was opened.
///
/// # Errors
/// The first difference found.
pub fn verify(chain: &Chain) -> Result<VerifiedSnapshot, Error> {
    let mut verified = VerifiedSnapshot::default();
    for member in chain.members() {
        verify_memory(member)?;
        verified.snapshots += 1;
        verified.pages += member.index.count(ExtentKind::Data);
    }
    Ok(verified)
}

fn verify_memory(member: &ChainMember) -> Result<(), Error> {
    let path = member.lease.dir().join("memory.bin");
    let found = memory_file::digests(member.lease.memory(), &path, &member.index.extents)?;
    if found.len() != member.index.digests.len() {
        return Err(Error::damaged(&path, "its digests are incomplete"));
    }
    let data = member
        .index
        .extents
        .iter()
        .filter(|extent| extent.content == ExtentKind::Data);
    for ((extent, found), stored) in data.zip(&found).zip(&member.index.digests) {
        if found != stored {
            let reason = format!(
                "pages {}..{} are not what was written",
                extent.first,
                extent.end()
            );
            return Err(Error::damaged(&path, reason));
        }
    }
    // The file of a root is mapped as a whole, so the pages that it does not store must
    // be zero.
    memory_file::check_holes(member.lease.memory(), &path, &member.index)
}
