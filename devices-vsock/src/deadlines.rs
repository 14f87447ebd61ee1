//! When connections stop waiting, or try again: one timer for all of them.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// What is due for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Due {
    /// Trying again what failed for want of memory.
    Retry(u32),
    /// The end of waiting.
    End(u32),
}

/// Times at which something is due, each thing at most once, and the timer for the
/// first.
pub(crate) struct Deadlines {
    by_time: BTreeSet<(Instant, Due)>,
    pub(crate) timer: OwnedFd,
    /// When the timer goes off, not later than the first deadline.
    armed: Option<Instant>,
}

impl Deadlines {
    /// # Errors
    /// No descriptors to be had.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            by_time: BTreeSet::new(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed: None,
        })
    }

    /// Replaces the time of something.
    pub(crate) fn set(&mut self, due: Due, old: Option<Instant>, new: Option<Instant>) {
        if let Some(old) = old {
            self.by_time.remove(&(old, due));
        }
        if let Some(new) = new {
            self.by_time.insert((new, due));
            // Most are never reached: the timer is set back when it went off.
            if self.armed.is_none_or(|armed| new < armed) {
                self.arm(new);
            }
        }
    }

    /// Forgets all of them.
    pub(crate) fn clear(&mut self) {
        self.by_time.clear();
    }

    fn arm(&mut self, at: Instant) {
        // At least one: zero would disarm it.
        let left = at.saturating_duration_since(Instant::now());
        let left = left.max(Duration::from_nanos(1));
        let value = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            },
        };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value) {
            Ok(_) => self.armed = Some(at),
            Err(error) => tracing::error!(%error, "a deadline cannot be set"),
        }
    }

    /// Takes something whose time has come; when there is nothing, sets the timer
    /// for the next.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Due> {
        let first = self.by_time.first().copied();
        match first {
            Some((at, due)) if at <= now => {
                self.by_time.remove(&(at, due));
                return Some(due);
            }
            Some((at, _)) => self.arm(at),
            None => self.armed = None,
        }
        None
    }
}
