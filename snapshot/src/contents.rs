//! Guest-visible memory of a snapshot, wherever in its chain a page is stored:
//! reading, comparing and flattening without a VMM.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use crate::Error;
use crate::capture;
use crate::chain::Chain;
use crate::extents::{Content, ExtentBuilder, PAGE, Piece, Source};
use crate::manifest::{Manifest, MemoryEntry};
use crate::memory_file::{self, MemoryIndex};
use crate::store::{Draft, SnapshotStore};

/// Pages read at once.
const BATCH: u64 = 64;
const PAGE_LEN: usize = 4096;

/// Calls `visit(first page, bytes)` over all memory, in batches of whole pages.
///
/// # Errors
/// A memory file that cannot be read, or what `visit` returned.
pub fn for_each_batch(
    chain: &Chain,
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut buffer = Vec::new();
    for piece in chain.pieces() {
        let mut page = piece.first;
        while page < piece.first + piece.pages {
            let count = BATCH.min(piece.first + piece.pages - page);
            read(chain, piece, page, count, &mut buffer)?;
            visit(page, &buffer)?;
            page += count;
        }
    }
    Ok(())
}

fn read(
    chain: &Chain,
    piece: &Piece,
    page: u64,
    count: u64,
    buffer: &mut Vec<u8>,
) -> Result<(), Error> {
    let len = usize::try_from(count).unwrap_or(usize::MAX) * PAGE_LEN;
    buffer.clear();
    buffer.resize(len, 0);
    let Source::Member(index) = piece.source else {
        return Ok(());
    };
    let Some(member) = chain.members().get(index) else {
        return Ok(());
    };
    member
        .lease
        .memory()
        .read_exact_at(buffer, page * PAGE)
        .map_err(Error::io("read", &member.lease.dir().join("memory.bin")))
}

/// Reads pages of a chain into `buffer`, which is made as long as they are.
///
/// # Errors
/// A memory file that cannot be read.
pub(crate) fn read_pages(
    chain: &Chain,
    first: u64,
    pages: u64,
    buffer: &mut Vec<u8>,
) -> Result<(), Error> {
    buffer.clear();
    let (mut page, end) = (first, first.saturating_add(pages));
    let pieces = chain.pieces();
    let after = pieces.partition_point(|piece| piece.first <= first);
    let mut part = Vec::new();
    for piece in pieces.iter().skip(after.saturating_sub(1)) {
        if page >= end {
            break;
        }
        let count = (piece.first + piece.pages).min(end) - page;
        read(chain, piece, page, count, &mut part)?;
        buffer.extend_from_slice(&part);
        page += count;
    }
    Ok(())
}

/// How the memory of two snapshots differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Pages of memory in each.
    pub pages: u64,
    /// Pages whose contents differ.
    pub different: u64,
}

/// Compares the guest-visible memory of two snapshots of the same size.
///
/// # Errors
/// Sizes that differ, or a memory file that cannot be read.
pub fn compare(a: &Chain, b: &Chain) -> Result<Difference, Error> {
    let pages = a.tip().index.pages();
    if a.tip().index.regions != b.tip().index.regions {
        return Err(Error::Incompatible {
            name: b.tip().lease.name().to_owned(),
            reason: "the two snapshots have memory of different sizes".to_owned(),
        });
    }
    let other = b.pieces();
    let mut position = other.iter().peekable();
    let mut buffer = Vec::new();
    let mut different = 0;
    for_each_batch(a, |first, bytes| {
        let mut page = first;
        let end = first + (bytes.len() / PAGE_LEN) as u64;
        while page < end {
            let Some(piece) = position.peek() else { break };
            let stop = (piece.first + piece.pages).min(end);
            read(b, piece, page, stop - page, &mut buffer)?;
            let from = usize::try_from(page - first).unwrap_or(0) * PAGE_LEN;
            let pairs = bytes[from..].chunks(PAGE_LEN).zip(buffer.chunks(PAGE_LEN));
            different += pairs.filter(|(x, y)| x != y).count() as u64;
            if piece.first + piece.pages <= end {
                position.next();
            }
            page = stop;
        }
        Ok(())
    })?;
    Ok(Difference { pages, different })
}

/// Writes a copy of a snapshot that builds on nothing, as `name`. The machine in it
/// is the same.
///
/// # Errors
/// The file system refused, or the name is taken.
pub fn flatten_to(store: &SnapshotStore, chain: &Chain, name: &str) -> Result<Manifest, Error> {
    let (draft, manifest) = flat_copy(store, chain)?;
    store.publish(draft, name)?;
    Ok(manifest)
}

/// Makes the snapshot `name` build on nothing. Whoever opens it meanwhile gets the one
/// or the other.
///
/// # Errors
/// It is absent or damaged, a machine or another snapshot uses it, or the file system
/// refused.
pub fn flatten(store: &SnapshotStore, name: &str) -> Result<Manifest, Error> {
    let chain = Chain::open(store, name)?;
    let (draft, manifest) = flat_copy(store, &chain)?;
    // Or it would be in use by us.
    drop(chain);
    store.replace(draft, name)?;
    Ok(manifest)
}

fn flat_copy(store: &SnapshotStore, chain: &Chain) -> Result<(Draft, Manifest), Error> {
    let tip = chain.tip();
    let draft = store.draft()?;
    let path = draft.path().join("memory.bin");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(Error::io("create", &path))?;
    file.set_len(tip.index.pages() * PAGE)
        .map_err(Error::io("set the length of", &path))?;
    let mut builder = ExtentBuilder::new();
    for_each_batch(chain, |first, bytes| {
        for (page, content) in (first..).zip(bytes.chunks(PAGE_LEN)) {
            if content.iter().any(|&byte| byte != 0) {
                builder.push(page, Content::Data);
                file.write_all_at(content, page * PAGE)
                    .map_err(Error::io("write", &path))?;
            }
        }
        Ok(())
    })?;
    let extents = builder.finish();
    let index = MemoryIndex {
        regions: tip.index.regions.clone(),
        digests: memory_file::digests(&file, &path, &extents)?,
        extents,
    };
    let state = capture::encode_state(&path, &index, tip.state.sections.clone())?;
    let mut manifest = Manifest {
        parent: None,
        memory: MemoryEntry {
            len: index.pages() * PAGE,
            data_pages: index.count(Content::Data),
            zero_pages: 0,
        },
        ..tip.lease.manifest().clone()
    };
    capture::write_state(&draft, &state, &mut manifest)?;
    capture::write_manifest(&draft, &mut manifest)?;
    Ok((draft, manifest))
}
