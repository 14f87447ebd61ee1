//! When each phase of a start was reached.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A phase and the moment it was complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What was complete, such as `agent ready`.
    pub name: String,
    /// `CLOCK_MONOTONIC` in nanoseconds: comparable between the processes of a host.
    pub at_ns: u64,
}

impl Phase {
    /// `name`, complete now.
    #[must_use]
    pub fn now(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            at_ns: monotonic_ns(),
        }
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}
