//! What a frontend did.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Things that go wrong are logged at most once in so long.
const QUIET: Duration = Duration::from_secs(1);

/// What a frontend did so far, the same for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontendStats {
    /// Connections led to the guest (or handed over, or accepted from it).
    pub accepted: u64,
    /// Connections that live now, those that are not that far yet included.
    pub active: usize,
    /// Connections turned away: of other users, not speaking the protocol, or
    /// more than there is room for.
    pub refused: u64,
    /// Connections hung up on because they took too long to say what they want.
    pub evicted: u64,
    /// Connections that nothing in the guest took.
    pub unanswered: u64,
    /// Bytes sent to the guest.
    pub to_guest: u64,
    /// Bytes that came from the guest.
    pub from_guest: u64,
}

/// Counts for [`FrontendStats`], and says what goes wrong, but not each time.
pub(crate) struct Counters {
    /// Kind and place of the frontend, for the log.
    name: String,
    accepted: AtomicU64,
    refused: AtomicU64,
    evicted: AtomicU64,
    unanswered: AtomicU64,
    said: Mutex<Said>,
}

#[derive(Default)]
struct Said {
    last: Option<Instant>,
    /// Times that nothing was said since.
    unsaid: u64,
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
            said: Mutex::default(),
        }
    }

    pub(crate) fn accept(&self) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self, why: impl fmt::Display) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.say("a connection was refused", why);
    }

    pub(crate) fn evict(&self, why: impl fmt::Display) {
        self.evicted.fetch_add(1, Ordering::Relaxed);
        self.say("a connection was hung up on", why);
    }

    pub(crate) fn leave_unanswered(&self, why: impl fmt::Display) {
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        // A port that nobody listens on is no reason for a warning.
        tracing::debug!(frontend = self.name, %why, "nothing in the guest answers");
    }

    /// Logs what happened, unless there was something to log a moment ago.
    pub(crate) fn say(&self, what: &'static str, why: impl fmt::Display) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.last.is_some_and(|last| last.elapsed() < QUIET) {
            said.unsaid += 1;
            return;
        }
        said.last = Some(Instant::now());
        let before = std::mem::take(&mut said.unsaid);
        drop(said);
        tracing::warn!(frontend = self.name, %why, before, "{what}");
    }

    /// All but what the connections themselves know.
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
