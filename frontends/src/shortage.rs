//! Retries after transient memory shortages.
//!
//! Linux fails a call on a socket with ENOBUFS or ENOMEM when it has no memory for it at
//! the moment. The connection is still usable, and no event reports that memory is
//! available again, so the call is repeated after a delay.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::io::Errno;

use crate::deadlines::Deadlines;

/// Delay before a call is repeated.
const RETRY: Duration = Duration::from_millis(10);

/// Returns true if a call failed because the system lacked memory.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOBUFS | Errno::NOMEM)
    )
}

/// Tokens whose calls are repeated. The descriptor is readable when some are due.
pub(crate) struct Retries {
    deadlines: Deadlines,
    /// Tokens with a pending deadline: each has at most one, independent of its events.
    waiting: HashSet<u64>,
}

impl Retries {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            deadlines: Deadlines::new()?,
            waiting: HashSet::new(),
        })
    }

    pub(crate) fn add(&mut self, token: u64) {
        if self.waiting.insert(token) {
            self.deadlines.add(token, RETRY);
        }
    }

    /// Returns the next token that is due, or `None`.
    pub(crate) fn next_due(&mut self) -> Option<u64> {
        let token = self.deadlines.next_due()?;
        self.waiting.remove(&token);
        Some(token)
    }
}

impl AsFd for Retries {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.deadlines.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_waits_once() {
        let mut retries = Retries::new().unwrap();
        for token in [7, 7, 8, 7] {
            retries.add(token);
        }
        let mut due = Vec::new();
        while due.len() < 2 {
            let mut fds = [rustix::event::PollFd::new(
                &retries,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).unwrap();
            due.extend(std::iter::from_fn(|| retries.next_due()));
        }
        assert_eq!(due, [7, 8]);
        assert!(retries.waiting.is_empty());
        retries.add(7);
        assert_eq!(retries.waiting.len(), 1);
    }
}
