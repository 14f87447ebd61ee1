//! Completion times of the phases of a start, and the clocks they are measured with.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A phase of a start and its completion time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Name of the phase, such as `agent ready`.
    pub name: String,
    /// Time of `CLOCK_MONOTONIC` in nanoseconds, comparable between the processes of a
    /// host.
    pub at_ns: u64,
}

impl Phase {
    /// Creates a phase that is complete now.
    #[must_use]
    pub fn now(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            at_ns: monotonic_ns(),
        }
    }
}

/// Returns the nanoseconds since the Unix epoch, 0 if the clock is before it.
#[must_use]
pub fn unix_nanos() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| u64::try_from(elapsed.as_nanos()).ok())
        .unwrap_or(0)
}

/// Returns the time of `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}
