//! Sending on non-blocking sockets, with or without memory to spare.
//!
//! Linux copies each packet of a vsock stream, of up to 64 KiB, into memory that is
//! contiguous. A guest that is short of memory refuses a large one with ENOMEM while a
//! page is still to be had, and a page a moment later: no reason to drop bytes or to end
//! a stream. The socket counts as writable all the while, so readiness cannot say when to
//! try again, and [`crate::reactor::Watched`] waits instead.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

/// Size of the packets that are tried where a larger one was refused, in bytes: with
/// its header, a packet of this size fits into two pages.
const SMALL: usize = 4096;

/// Reason for which a socket took less than it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The peer has to read first; the socket becomes writable then.
    Full,
    /// The kernel lacks memory for the moment.
    Starved,
    /// The connection takes no more, ever.
    Broken,
}

/// Sends `bytes`: the number that the socket took, and the reason if it is not all.
pub(crate) fn send_bytes(socket: BorrowedFd<'_>, bytes: &[u8]) -> (usize, Option<Refusal>) {
    send_with(bytes, |rest| {
        #[cfg(test)]
        shortage::check()?;
        send(socket, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    })
}

fn send_with(
    bytes: &[u8],
    mut send: impl FnMut(&[u8]) -> Result<usize, Errno>,
) -> (usize, Option<Refusal>) {
    let mut count = 0;
    let mut most = usize::MAX;
    while let Some(rest) = bytes.get(count..)
        && !rest.is_empty()
    {
        let piece = &rest[..rest.len().min(most)];
        match send(piece) {
            Ok(sent) => count += sent,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return (count, Some(Refusal::Full)),
            Err(Errno::NOMEM | Errno::NOBUFS) if piece.len() > SMALL => most = SMALL,
            Err(Errno::NOMEM | Errno::NOBUFS) => return (count, Some(Refusal::Starved)),
            Err(_) => return (count, Some(Refusal::Broken)),
        }
    }
    (count, None)
}

/// Lets sends of the current thread fail for want of memory.
#[cfg(test)]
pub(crate) mod shortage {
    use std::cell::Cell;

    use rustix::io::Errno;

    thread_local! {
        static FAILING: Cell<u32> = const { Cell::new(0) };
    }

    /// Refuses the next `count` sends of this thread.
    pub(crate) fn begin(count: u32) {
        FAILING.set(count);
    }

    pub(super) fn check() -> Result<(), Errno> {
        match FAILING.get() {
            0 => Ok(()),
            left => {
                FAILING.set(left - 1);
                Err(Errno::NOMEM)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_packet_that_is_refused_goes_in_small_ones() {
        let mut sizes = Vec::new();
        let outcome = send_with(&[7; 10_000], |piece| {
            sizes.push(piece.len());
            if piece.len() > SMALL {
                Err(Errno::NOMEM)
            } else {
                Ok(piece.len())
            }
        });
        assert_eq!(outcome, (10_000, None));
        assert_eq!(sizes, [10_000, SMALL, SMALL, 10_000 - 2 * SMALL]);
    }

    #[test]
    fn a_shortage_is_no_end() {
        let mut calls = 0;
        let outcome = send_with(&[7; 10_000], |piece| {
            calls += 1;
            if calls == 1 {
                Ok(5000)
            } else {
                assert!(piece.len() <= 5000);
                Err(Errno::NOBUFS)
            }
        });
        assert_eq!(outcome, (5000, Some(Refusal::Starved)));
        assert_eq!(calls, 3);
    }

    #[test]
    fn other_refusals_are_told_apart() {
        let refused = |errno| send_with(b"bytes", |_| Err(errno)).1;
        assert_eq!(refused(Errno::AGAIN), Some(Refusal::Full));
        assert_eq!(refused(Errno::PIPE), Some(Refusal::Broken));
        assert_eq!(refused(Errno::CONNRESET), Some(Refusal::Broken));
    }
}
