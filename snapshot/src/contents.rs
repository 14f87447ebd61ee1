//! Guest-visible memory of a snapshot, read and compared without a VMM. Pages are found
//! at any depth of the chain.

use std::os::unix::fs::FileExt as _;

use crate::Error;
use crate::chain::Chain;
use crate::extents::{PAGE, Piece, Source};

/// Number of pages read at a time.
const BATCH: u64 = 64;
/// [`PAGE`] as a `usize`.
pub(crate) const PAGE_LEN: usize = 4096;

/// Calls `visit(first page, bytes)` for all memory, in batches of whole pages.
///
/// # Errors
/// A memory file cannot be read, or `visit` returned an error.
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

/// Reads pages of a chain into `buffer`, which is resized to their length.
///
/// # Errors
/// A memory file cannot be read.
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

/// Difference between the memory of two snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Number of pages in each snapshot.
    pub pages: u64,
    /// Number of pages whose contents differ.
    pub different: u64,
}

/// Compares the guest-visible memory of two snapshots of the same size.
///
/// # Errors
/// The sizes differ, or a memory file cannot be read.
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
