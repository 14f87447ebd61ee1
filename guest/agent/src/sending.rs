//! Sending on non-blocking sockets, including while the guest is short of memory.
//!
//! Linux copies each packet of a vsock stream, of up to 64 KiB, into contiguous memory. A
//! guest that is short of memory refuses a large packet with ENOMEM, although it may
//! accept one of a page now or soon, so the error is no reason to drop bytes or to close
//! the stream. The socket remains writable meanwhile, so readiness does not tell when to
//! retry, and [`crate::reactor::Watched`] uses a timer instead.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

/// Size of the packets to which sending falls back after a refusal, in bytes. With its
/// header, a packet of this size fits into two pages.
const SMALL: usize = 4096;

/// The reason why a socket accepted only a part of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The socket's buffer is full; the socket becomes writable once the peer reads.
    Full,
    /// The kernel is temporarily out of memory.
    Starved,
    /// The connection has failed permanently.
    Broken,
}

/// Sends `bytes` and returns the number of bytes accepted, and the reason if it is not
/// all of them.
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

/// Injection of ENOMEM into sends of the current thread.
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

    pub(crate) fn check() -> Result<(), Errno> {
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
    fn a_refused_large_packet_is_sent_in_small_ones() {
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
    fn a_shortage_does_not_end_the_stream() {
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
    fn other_refusals_are_distinguished() {
        let refused = |errno| send_with(b"bytes", |_| Err(errno)).1;
        assert_eq!(refused(Errno::AGAIN), Some(Refusal::Full));
        assert_eq!(refused(Errno::PIPE), Some(Refusal::Broken));
        assert_eq!(refused(Errno::CONNRESET), Some(Refusal::Broken));
    }
}
