//! Tokens on the event loop that frontends have in common.

/// With a client's token: its deadline has passed.
pub(crate) const DEADLINE: u64 = 1 << 62;
/// With a client's token: a call that failed for want of memory is due again.
pub(crate) const RETRY: u64 = 1 << 61;
