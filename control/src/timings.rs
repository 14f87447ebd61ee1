//! Completion times of the phases of a start, and the clocks they are measured with.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A phase of a start and its completion time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
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
        Self::at(name, monotonic_ns())
    }

    /// Creates a phase that was complete at `at_ns` of `CLOCK_MONOTONIC`.
    #[must_use]
    pub fn at(name: &str, at_ns: u64) -> Self {
        Self {
            name: name.to_owned(),
            at_ns,
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

/// Converts nanoseconds since the Unix epoch, as in messages and records, to a time; 0
/// means that there is none.
#[must_use]
pub fn system_time(nanoseconds: u64) -> Option<SystemTime> {
    match nanoseconds {
        0 => None,
        since => Some(UNIX_EPOCH + Duration::from_nanos(since)),
    }
}

/// Returns the time of `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_no_time() {
        assert_eq!(system_time(0), None);
        let second = system_time(1_000_000_000).unwrap();
        assert_eq!(second, UNIX_EPOCH + Duration::from_secs(1));
    }
}
