//! Counters of frontends.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shortest interval between two warnings of a frontend.
const WARNING_INTERVAL: Duration = Duration::from_secs(1);

/// Counters of a frontend, the same for all kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendStats {
    /// Connections forwarded to the guest, handed over by routers, or accepted from the
    /// guest.
    pub accepted: u64,
    /// Open connections, including those whose target is not known yet.
    pub active: usize,
    /// Connections refused: from other users, with a protocol error, or beyond a limit.
    pub refused: u64,
    /// Connections closed because a client exceeded its time limit.
    pub evicted: u64,
    /// Connections that no listener in the guest accepted.
    pub unanswered: u64,
    /// Bytes sent to the guest.
    pub to_guest: u64,
    /// Bytes received from the guest.
    pub from_guest: u64,
}

/// Counts events for [`FrontendStats`], and logs failures at a limited rate.
pub(crate) struct Counters {
    /// Kind and address of the frontend, for the log.
    name: String,
    accepted: AtomicU64,
    refused: AtomicU64,
    evicted: AtomicU64,
    unanswered: AtomicU64,
    throttle: Mutex<WarningThrottle>,
}

#[derive(Default)]
struct WarningThrottle {
    last: Option<Instant>,
    /// Warnings suppressed since the last one.
    suppressed: u64,
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counters")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Counters {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            throttle: Mutex::default(),
        }
    }

    pub(crate) fn accept(&self) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self, why: impl fmt::Display) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.warn("a connection was refused", why);
    }

    pub(crate) fn evict(&self, why: impl fmt::Display) {
        self.evicted.fetch_add(1, Ordering::Relaxed);
        self.warn("a connection was closed", why);
    }

    pub(crate) fn count_unanswered(&self, why: impl fmt::Display) {
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        // A port without a listener in the guest is an ordinary case.
        tracing::debug!(frontend = self.name, %why, "the guest did not accept a connection");
    }

    /// Logs a warning, unless the last one was less than [`WARNING_INTERVAL`] ago.
    pub(crate) fn warn(&self, what: &'static str, why: impl fmt::Display) {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        if throttle
            .last
            .is_some_and(|last| last.elapsed() < WARNING_INTERVAL)
        {
            throttle.suppressed += 1;
            return;
        }
        throttle.last = Some(Instant::now());
        let before = std::mem::take(&mut throttle.suppressed);
        drop(throttle);
        tracing::warn!(frontend = self.name, %why, before, "{what}");
    }

    /// Returns the counters, except those that the connections have.
    pub(crate) fn stats(&self) -> FrontendStats {
        FrontendStats {
            accepted: self.accepted.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
            unanswered: self.unanswered.load(Ordering::Relaxed),
            ..FrontendStats::default()
        }
    }
}
