//! Corrections of the guest's clock after a refresh; see [`ClockError`].

use sm_control::timings::unix_nanos;
use sm_guest_proto::control::ControlRequest;

use super::Supervisor;
use crate::agent::Purpose;
use crate::clock_error::ClockError;
use crate::guest::GuestMachine;

impl<G: GuestMachine> Supervisor<G> {
    /// Looks at the time in the answer to a refresh. With 0, the guest does not say it.
    pub(super) fn clock_was_set(&mut self, guest_ns: u64) {
        if guest_ns != 0 {
            self.correct_clock(ClockError::after_refresh(guest_ns, unix_nanos()));
        }
    }

    /// Looks at the time in the answer to a correction that was sent at `sent_ns`.
    pub(super) fn clock_was_adjusted(&mut self, error: ClockError, sent_ns: u64, guest_ns: u64) {
        self.correct_clock(error.narrowed(sent_ns, guest_ns, unix_nanos()));
    }

    fn correct_clock(&mut self, error: ClockError) {
        let (Some(agent), Some(offset_ns)) = (&mut self.agent, error.correction()) else {
            return;
        };
        tracing::debug!(offset_ns, "the guest's clock is corrected");
        let purpose = Purpose::AdjustClock {
            sent_ns: unix_nanos(),
            error: error.moved(offset_ns),
        };
        agent.send_request(purpose, &ControlRequest::AdjustClock { offset_ns });
    }
}
