//! End of a machine: the first reason that is reported stays.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use serde::{Deserialize, Serialize};
use sm_hypervisor::{FaultInfo, Kicker};

/// Reason why a machine no longer runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MachineExit {
    /// The guest powered itself off.
    PowerOff,
    /// The guest requested a reset, which the owner's policy interprets; with `panic=-1` on
    /// the command line, a kernel panic ends like this too.
    Reset,
    /// A vCPU could not deliver a fault (x86 shutdown state).
    TripleFault {
        /// Index of the vCPU.
        vcpu: u32,
    },
    /// A vCPU halted and nothing can wake it.
    Halted {
        /// Index of the vCPU.
        vcpu: u32,
    },
    /// The hypervisor cannot continue to run a vCPU.
    Fault {
        /// Index of the vCPU.
        vcpu: u32,
        /// The hypervisor's report.
        info: FaultInfo,
    },
    /// The host failed, not the guest.
    Failed {
        /// The failure, with its causes.
        reason: String,
    },
    /// [`crate::machine::Machine::stop`] was called.
    Stopped,
}

/// Stores the first [`MachineExit`], makes all vCPUs leave the guest, and notifies waiters
/// through a file descriptor.
#[derive(Debug)]
pub struct ExitLatch {
    reason: OnceLock<MachineExit>,
    event: OwnedFd,
    kickers: OnceLock<Vec<Arc<dyn Kicker>>>,
}

impl ExitLatch {
    /// Creates a latch without a reason.
    ///
    /// # Errors
    /// No file descriptor is available.
    pub fn new() -> std::io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            reason: OnceLock::new(),
            event: rustix::event::eventfd(0, flags)?,
            kickers: OnceLock::new(),
        })
    }

    /// Sets the vCPUs that have to leave the guest. Later calls have no effect.
    pub(crate) fn set_kickers(&self, kickers: Vec<Arc<dyn Kicker>>) {
        // The machine sets them once; a second set would contain the same vCPUs.
        let _ = self.kickers.set(kickers);
    }

    /// Records `reason`, unless one is recorded already.
    pub fn report(&self, reason: MachineExit) {
        if self.reason.set(reason).is_err() {
            return;
        }
        // A counter at its limit is readable nevertheless.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        for kicker in self.kickers.get().into_iter().flatten() {
            kicker.kick();
        }
    }

    /// Returns the reason, once there is one.
    #[must_use]
    pub fn reason(&self) -> Option<&MachineExit> {
        self.reason.get()
    }

    /// Returns a descriptor that becomes, and stays, readable when there is a reason.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Blocks until there is a reason.
    #[must_use]
    pub fn wait(&self) -> MachineExit {
        loop {
            if let Some(reason) = self.reason.get() {
                return reason.clone();
            }
            self.poll(None);
        }
    }

    /// Blocks until there is a reason, at most for `timeout`.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> Option<MachineExit> {
        // `None`: beyond the range of the clock, so there is no deadline.
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(reason) = self.reason.get() {
                return Some(reason.clone());
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            self.poll(left);
        }
    }

    /// Waits for the event; may return early.
    fn poll(&self, timeout: Option<Duration>) {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
        // The caller checks again, after an interruption too.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let latch = Arc::new(ExitLatch::new().unwrap());
        assert_eq!(latch.reason(), None);
        let waiter = std::thread::spawn({
            let latch = latch.clone();
            move || latch.wait()
        });
        assert_eq!(latch.wait_timeout(Duration::from_millis(1)), None);
        latch.report(MachineExit::PowerOff);
        latch.report(MachineExit::Reset);
        assert_eq!(waiter.join().unwrap(), MachineExit::PowerOff);
        assert_eq!(latch.wait(), MachineExit::PowerOff);
    }
}
