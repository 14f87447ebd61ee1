//! When whoever is waited for has been waited for long enough.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

/// Deadlines of tokens, and a timer that becomes readable at the first.
#[derive(Debug)]
pub(crate) struct Deadlines {
    timer: OwnedFd,
    set: BTreeSet<(Instant, u64)>,
    armed: Option<Instant>,
}

impl AsFd for Deadlines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

impl Deadlines {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            set: BTreeSet::new(),
            armed: None,
        })
    }

    /// A deadline for `token`, so long from now. It is needed to remove it.
    pub(crate) fn add(&mut self, token: u64, after: Duration) -> Instant {
        let now = Instant::now();
        // A time beyond what the clock can express is one that nobody sees.
        let at = now
            .checked_add(after)
            .unwrap_or(now + Duration::from_secs(1 << 31));
        self.set.insert((at, token));
        if self.armed.is_none_or(|armed| at < armed) {
            self.arm();
        }
        at
    }

    pub(crate) fn remove(&mut self, at: Instant, token: u64) {
        self.set.remove(&(at, token));
    }

    /// The next token whose deadline is over; call it until there is none, when the
    /// timer is readable.
    pub(crate) fn next_due(&mut self) -> Option<u64> {
        match self.set.first() {
            Some(&(at, token)) if at <= Instant::now() => {
                self.set.pop_first();
                Some(token)
            }
            _ => {
                // Read so that it is not ready any more.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                self.arm();
                None
            }
        }
    }

    /// Has the timer wake us at the first deadline.
    fn arm(&mut self) {
        self.armed = self.set.first().map(|&(at, _)| at);
        let Some(at) = self.armed else {
            return;
        };
        let left = at.saturating_duration_since(Instant::now());
        let value = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                // Not zero: that would disarm it.
                tv_nsec: i64::from(left.subsec_nanos().max(1)),
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value) {
            tracing::warn!(%error, "slow clients cannot be timed");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn wait(deadlines: &Deadlines) {
        let mut fds = [PollFd::new(deadlines, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
    }

    #[test]
    fn the_first_comes_first_and_those_removed_do_not() {
        let mut deadlines = Deadlines::new().unwrap();
        let hour = Duration::from_secs(3600);
        deadlines.add(1, hour);
        let removed = deadlines.add(2, Duration::ZERO);
        deadlines.add(3, Duration::from_millis(2));
        deadlines.add(4, Duration::from_millis(1));
        deadlines.add(5, Duration::MAX);
        deadlines.remove(removed, 2);
        let mut due = Vec::new();
        while due.len() < 2 {
            wait(&deadlines);
            due.extend(std::iter::from_fn(|| deadlines.next_due()));
        }
        assert_eq!(due, [4, 3]);
        let mut fds = [PollFd::new(&deadlines, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec::default())).unwrap(), 0);
    }
}
