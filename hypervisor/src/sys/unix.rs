//! Doorbells signal file descriptors.

use std::os::fd::BorrowedFd;
#[cfg(any(feature = "testing", test))]
use std::{io, os::fd::OwnedFd};

/// What a doorbell signals: an eventfd on Linux, elsewhere a descriptor that becomes
/// readable when eight bytes are written to it.
pub type Wake<'a> = BorrowedFd<'a>;

/// A duplicate of a [`Wake`] that the fake backend signals.
#[cfg(any(feature = "testing", test))]
#[derive(Debug)]
pub(crate) struct Waker(OwnedFd);

#[cfg(any(feature = "testing", test))]
impl Waker {
    /// Duplicates `wake`. `None` would mean that this host's cannot be signalled by the
    /// fake.
    pub(crate) fn of(wake: Wake<'_>) -> io::Result<Option<Self>> {
        Ok(Some(Self(wake.try_clone_to_owned()?)))
    }

    pub(crate) fn signal(&self) {
        // A full eventfd counter is still a signal.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}
