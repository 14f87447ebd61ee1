//! Replies: a header, and a body if the operation succeeded.

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::abi::{OUT_HEADER_LEN, OutHeader};
use crate::buffers::Buffers;

/// Writes a header for `len` bytes of body, which are there already; returns the length of
/// the reply, or 0 if there is no space for a header.
fn header(buffers: &mut impl Buffers, unique: u64, error: Option<Errno>, len: usize) -> usize {
    let total = OUT_HEADER_LEN + len;
    let header = OutHeader {
        // A reply has less than 4 GiB: bodies are bounded by the sizes that requests name.
        len: u32::try_from(total).unwrap_or(u32::MAX),
        error: error.map_or(0, |errno| -errno.raw_os_error()),
        unique,
    };
    if buffers.write_reply(0, header.as_bytes()) {
        total
    } else {
        0
    }
}

/// Writes a reply with `body`, or with an error.
pub(crate) fn bytes(
    buffers: &mut impl Buffers,
    unique: u64,
    result: Result<&[u8], Errno>,
) -> usize {
    match result {
        Ok(body) if buffers.write_reply(OUT_HEADER_LEN, body) => {
            header(buffers, unique, None, body.len())
        }
        // The driver leaves space for what it requests.
        Ok(_) => header(buffers, unique, Some(Errno::INVAL), 0),
        Err(errno) => header(buffers, unique, Some(errno), 0),
    }
}

/// Writes a reply with a structure, or with an error.
pub(crate) fn structure<T: IntoBytes + Immutable>(
    buffers: &mut impl Buffers,
    unique: u64,
    result: Result<T, Errno>,
) -> usize {
    match result {
        Ok(body) => bytes(buffers, unique, Ok(body.as_bytes())),
        Err(errno) => bytes(buffers, unique, Err(errno)),
    }
}

/// Writes a reply without a body.
pub(crate) fn empty(buffers: &mut impl Buffers, unique: u64, result: Result<(), Errno>) -> usize {
    header(buffers, unique, result.err(), 0)
}

/// Writes a reply with contents that are in the buffers already.
pub(crate) fn contents(
    buffers: &mut impl Buffers,
    unique: u64,
    result: Result<usize, Errno>,
) -> usize {
    match result {
        Ok(len) => header(buffers, unique, None, len),
        Err(errno) => header(buffers, unique, Some(errno), 0),
    }
}
