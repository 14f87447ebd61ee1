//! Timers of connections: deadlines, and repeated attempts.

use std::time::Duration;

use sm_event_loop::Registry;

use super::Muxer;
use crate::connection::Awaiting;
use crate::handle::ConnectError;

/// Time until a call that failed for lack of memory is repeated.
const RETRY: Duration = Duration::from_millis(10);
/// Tokens of a connection's timers, with its slot number.
pub(crate) const DEADLINE: u64 = 1 << 60;
pub(crate) const RETRIES: u64 = 1 << 61;
impl Muxer {
    /// Sets the deadline of a connection, replacing an earlier one.
    pub(super) fn await_until(
        &mut self,
        slot: u32,
        awaiting: Awaiting,
        most: Duration,
        registry: &mut dyn Registry,
    ) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        if let Some(timer) = connection.deadline.take() {
            registry.cancel_timer(timer);
        }
        if awaiting != Awaiting::Nothing {
            connection.deadline = registry.set_timer_after(most, DEADLINE | u64::from(slot));
        }
        connection.awaiting = awaiting;
        connection.progressed = false;
    }

    /// Sets a timer for a call that failed for lack of memory.
    pub(super) fn retry_if_due(&mut self, slot: u32, registry: &mut dyn Registry) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        if std::mem::take(&mut connection.short_of_memory) && connection.retry.is_none() {
            connection.retry = registry.set_timer_after(RETRY, RETRIES | u64::from(slot));
        }
    }

    /// Repeats a call that failed for lack of memory.
    pub(crate) fn retry(&mut self, slot: u32, registry: &mut dyn Registry) {
        let Some(connection) = self.get(slot) else {
            return;
        };
        connection.retry = None;
        connection.readable = true;
        if self.flush(slot, registry) {
            self.settle(slot, registry);
        }
    }

    /// Ends a connection whose deadline has passed, unless it makes progress.
    pub(crate) fn expire(&mut self, slot: u32, registry: &mut dyn Registry) {
        let linger = self.config.linger;
        let Some(connection) = self.get(slot) else {
            return;
        };
        connection.deadline = None;
        let awaiting = connection.awaiting;
        if awaiting == Awaiting::Tail && connection.progressed {
            self.await_until(slot, awaiting, linger, registry);
            return;
        }
        tracing::debug!(key = ?connection.key, ?awaiting, "a connection has reached its deadline");
        self.mailbox.counters.timed_out.add(1);
        self.abort(slot, ConnectError::TimedOut, registry);
    }

    /// Sets the timers of all connections again, because their events may have been lost
    /// while the machine was paused. That time, `paused`, does not count.
    pub(crate) fn resume_timers(&mut self, paused: Duration, registry: &mut dyn Registry) {
        for slot in 0..self.slots() {
            let Some(connection) = self.get(slot) else {
                continue;
            };
            let timers = [
                (&mut connection.deadline, DEADLINE, paused),
                (&mut connection.retry, RETRIES, Duration::ZERO),
            ];
            for (timer, token, by) in timers {
                let Some(old) = timer.take() else { continue };
                registry.cancel_timer(old);
                let at = old.at().checked_add(by);
                *timer = at.map(|at| registry.set_timer(at, token | u64::from(slot)));
            }
        }
    }
}
