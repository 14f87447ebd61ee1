//! A snapshot with all its ancestors, opened for use.

use std::path::Path;

use crate::Error;
use crate::extents::{Extent, ExtentKind, MemoryIndex, PAGE, Piece, flatten, is_well_formed};
use crate::runs::{Run, union};
use crate::state_file::{self, StateFile};
use crate::store::{Lease, SnapshotStore, read_capped};

/// Maximum number of snapshots in a chain, including the full one at its root. Creation
/// of a deeper chain fails; the parent must be flattened first.
pub const MAX_DEPTH: usize = 8;

/// Maximum number of pieces that the memory of a chain is mapped from. Linux allows a
/// process about 65,000 mappings (`vm.max_map_count`), and each costs time. Snapshots
/// that would exceed the limit are stored in full.
pub const MAX_PIECES: usize = 16 * 1024;

/// Name and layout version of the section that holds the [`MemoryIndex`].
pub const MEMORY_SECTION: (&str, u32) = ("memory", 1);

/// One snapshot of a chain.
#[derive(Debug)]
pub struct ChainMember {
    /// Lease that prevents removal of the snapshot.
    pub lease: Lease,
    /// Machine state of the snapshot.
    pub state: StateFile,
    /// Index of the snapshot's memory file.
    pub index: MemoryIndex,
}

/// A snapshot and its ancestors, root first.
#[derive(Debug)]
pub struct Chain {
    members: Vec<ChainMember>,
    pieces: Vec<Piece>,
}

impl Chain {
    /// Opens `name` and all its ancestors, and checks that each child matches its parent.
    ///
    /// # Errors
    /// One of them is absent, corrupt or of another format, its manifest, page index and
    /// memory are of different sizes, or a parent is not the snapshot that its child was
    /// created from.
    pub fn open(store: &SnapshotStore, name: &str) -> Result<Self, Error> {
        let mut members = vec![open_member(store, name)?];
        while let Some(child) = members.last() {
            let Some(parent) = child.lease.manifest().parent.clone() else {
                break;
            };
            if members.len() >= MAX_DEPTH {
                return Err(Error::TooDeep {
                    name: name.to_owned(),
                    limit: MAX_DEPTH - 1,
                });
            }
            let child_name = child.lease.name().to_owned();
            let wrong = |reason: String| Error::Parent {
                name: child_name.clone(),
                parent: parent.name.clone(),
                reason,
            };
            let regions = child.index.regions.clone();
            let member = match open_member(store, &parent.name) {
                Err(Error::NotFound { .. }) => return Err(wrong("does not exist".to_owned())),
                other => other?,
            };
            if member.lease.manifest().digest != parent.digest {
                return Err(wrong(
                    "is not the snapshot that it was created from".to_owned(),
                ));
            }
            if member.index.regions != regions {
                return Err(wrong("has another memory layout".to_owned()));
            }
            members.push(member);
        }
        members.reverse();
        let pieces = pieces(&members, &[]);
        Ok(Self { members, pieces })
    }

    /// Returns the members, root first. There is at least one.
    #[must_use]
    pub fn members(&self) -> &[ChainMember] {
        &self.members
    }

    /// Returns the snapshot that the chain was opened for.
    ///
    /// # Panics
    /// Never: a chain has at least one member.
    #[must_use]
    #[expect(clippy::expect_used, reason = "open() puts the first member in")]
    pub fn tip(&self) -> &ChainMember {
        self.members.last().expect("a chain is not empty")
    }

    /// Returns the pieces to map, in RAM order. Their sources are indices into
    /// [`Self::members`].
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Returns the number of pieces of a child that records `extents`.
    #[must_use]
    pub fn pieces_of_child(&self, extents: &[Extent]) -> usize {
        pieces(&self.members, &[extents]).len()
    }

    /// Returns the pages that at least one member stores. All other pages are zero.
    #[must_use]
    pub fn stored(&self) -> Vec<Run> {
        self.members.iter().fold(Vec::new(), |all, member| {
            let data = member.index.extents.iter();
            let data = data.filter(|extent| extent.content == ExtentKind::Data);
            let data: Vec<Run> = data.map(|extent| (extent.first, extent.pages)).collect();
            union(&all, &data)
        })
    }
}

fn pieces(members: &[ChainMember], more: &[&[Extent]]) -> Vec<Piece> {
    let lists = members.iter().map(|member| &*member.index.extents);
    let lists: Vec<&[Extent]> = lists.chain(more.iter().copied()).collect();
    let pages = members.last().map_or(0, |tip| tip.index.pages());
    flatten(pages, &lists)
}

fn open_member(store: &SnapshotStore, name: &str) -> Result<ChainMember, Error> {
    let lease = store.lease(name)?;
    let path = lease.dir().join("state.bin");
    let entry = &lease.manifest().state;
    if entry.len > state_file::MAX_LEN {
        return Err(Error::damaged(&path, "it is too long"));
    }
    let bytes = read_capped(&path, state_file::MAX_LEN)?;
    if bytes.len() as u64 != entry.len {
        let reason = format!(
            "it has {} bytes, and the manifest says {}",
            bytes.len(),
            entry.len
        );
        return Err(Error::damaged(&path, reason));
    }
    let state = StateFile::decode(&path, &bytes, &entry.digest)?;
    let index = memory_index(&path, &state)?;
    let (manifest, pages) = (lease.manifest(), index.pages());
    // Formats 1 to 3 have the same size in both members.
    if manifest.memory_bytes != manifest.memory.len {
        let reason = format!(
            "it has a machine with {} bytes of memory, and a file with {}",
            manifest.memory_bytes, manifest.memory.len
        );
        return Err(Error::damaged(&lease.dir().join("manifest.json"), reason));
    }
    if pages.checked_mul(PAGE) != Some(manifest.memory.len)
        || !is_well_formed(&index.extents, pages)
    {
        return Err(Error::damaged(
            &path,
            "its page index does not fit its memory",
        ));
    }
    Ok(ChainMember {
        lease,
        state,
        index,
    })
}

fn memory_index(path: &Path, state: &StateFile) -> Result<MemoryIndex, Error> {
    let (name, version) = MEMORY_SECTION;
    let (_, payload) = state.section(path, name, version..=version)?;
    let (index, rest) = postcard::take_from_bytes(payload)
        .map_err(|e| Error::damaged(path, format!("its page index cannot be read: {e}")))?;
    if rest.is_empty() {
        return Ok(index);
    }
    let reason = format!("{} bytes follow its page index", rest.len());
    Err(Error::damaged(path, reason))
}
