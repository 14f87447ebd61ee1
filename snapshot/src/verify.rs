//! Checking every byte of a snapshot against what was written.

use crate::Error;
use crate::chain::{Chain, Member};
use crate::extents::Content;
use crate::memory_file;

/// What a verification looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Snapshots checked, ancestors included.
    pub snapshots: usize,
    /// Memory pages whose digests were computed.
    pub pages: u64,
}

/// Verifies a snapshot and its ancestors: manifests and state (checked on
/// opening already), and all stored memory.
///
/// # Errors
/// The first thing found that differs.
pub fn verify(chain: &Chain) -> Result<Verified, Error> {
    let mut verified = Verified::default();
    for member in chain.members() {
        verify_memory(member)?;
        verified.snapshots += 1;
        verified.pages += member.index.count(Content::Data);
    }
    Ok(verified)
}

fn verify_memory(member: &Member) -> Result<(), Error> {
    let path = member.lease.dir().join("memory.bin");
    let found = memory_file::digests(member.lease.memory(), &path, &member.index.extents)?;
    if found.len() != member.index.digests.len() {
        return Err(Error::damaged(&path, "its digests are incomplete"));
    }
    let data = member
        .index
        .extents
        .iter()
        .filter(|extent| extent.content == Content::Data);
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
    // The whole file of a root is mapped, so what it does not store has to be zero.
    memory_file::check_holes(member.lease.memory(), &path, &member.index)
}
