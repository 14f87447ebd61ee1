//! A lack of memory that passes.
//!
//! Linux refuses a call on a socket when it has no memory for it at the moment, which
//! is no fault of the peer's and no end of the connection. Nothing tells when there is
//! memory again, so the call is repeated after a while.

use std::io;
use std::time::Duration;

use rustix::io::Errno;

/// Time until a call is repeated.
pub(crate) const RETRY: Duration = Duration::from_millis(10);

/// Returns true if a call failed for want of memory.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOBUFS | Errno::NOMEM)
    )
}
