//! When connections stop waiting: one timer for all of them.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Deadlines of slots, each with at most one, and the timer for the first.
pub(crate) struct Deadlines {
    by_time: BTreeSet<(Instant, u32)>,
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

    /// Replaces the deadline of a slot.
    pub(crate) fn set(&mut self, slot: u32, old: Option<Instant>, new: Option<Instant>) {
        if let Some(old) = old {
            self.by_time.remove(&(old, slot));
        }
        if let Some(new) = new {
            self.by_time.insert((new, slot));
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

    /// Takes a slot whose deadline has passed; when there is none, sets the timer
    /// for the next.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<u32> {
        let first = self.by_time.first().copied();
        match first {
            Some((at, slot)) if at <= now => {
                self.by_time.remove(&(at, slot));
                return Some(slot);
            }
            Some((at, _)) => self.arm(at),
            None => self.armed = None,
        }
        None
    }
}
