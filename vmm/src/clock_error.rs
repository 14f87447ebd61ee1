//! The guest's wall clock, set to the host's although messages take time.
//!
//! A refresh sets the clock to the time at which it was sent, so the clock is late by the
//! way of the request: a fraction of a millisecond, or much more on a host whose CPUs are
//! busy. Each answer carries the guest's time, and bounds the error as in the intersection
//! algorithm of NTP (RFC 5905, section 11.2.1): the true time of the answer is between
//! the sending of the request and the arrival of the answer. A clock whose error can be
//! too large is moved to the middle of what is possible, which does not depend on the
//! time that the correction takes to arrive.

/// Largest possible error that is not corrected, in nanoseconds.
const TOLERANCE_NS: i64 = 10_000_000;

/// Limit of corrections after a refresh.
const CORRECTIONS: u8 = 3;

/// Bounds of the host's time minus the guest's, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClockError {
    earliest_ns: i64,
    latest_ns: i64,
    /// Number of corrections that may follow.
    left: u8,
}

impl ClockError {
    /// Returns the bounds after a refresh, which was sent in the past and set the clock
    /// to the time then. The guest answered with its time `guest_ns`, which arrived at
    /// `now_ns`.
    pub(crate) fn after_refresh(guest_ns: u64, now_ns: u64) -> Self {
        Self {
            earliest_ns: 0,
            latest_ns: difference(now_ns, guest_ns).max(0),
            left: CORRECTIONS,
        }
    }

    /// Returns how far to move the guest's clock; `None` if it is right.
    pub(crate) fn correction(self) -> Option<i64> {
        let middle = self.earliest_ns.midpoint(self.latest_ns);
        // The error after a correction would be as large as before if the bounds are far
        // apart but centred on 0.
        (self.left > 0 && self.latest_ns.max(-self.earliest_ns) > TOLERANCE_NS)
            .then_some(middle)
            .filter(|middle| middle.unsigned_abs() > TOLERANCE_NS.unsigned_abs() / 2)
    }

    /// Returns the bounds after the clock was moved by `offset_ns`.
    pub(crate) fn moved(self, offset_ns: i64) -> Self {
        Self {
            earliest_ns: self.earliest_ns.saturating_sub(offset_ns),
            latest_ns: self.latest_ns.saturating_sub(offset_ns),
            left: self.left.saturating_sub(1),
        }
    }

    /// Returns the bounds with what another answer says: the guest's time `guest_ns`, in
    /// an answer that arrived at `now_ns` to a request of `sent_ns`. If a clock was set by
    /// somebody else meanwhile, only the answer counts.
    pub(crate) fn narrowed(self, sent_ns: u64, guest_ns: u64, now_ns: u64) -> Self {
        let earliest_ns = difference(sent_ns, guest_ns);
        let latest_ns = difference(now_ns, guest_ns);
        let (earliest, latest) = (
            self.earliest_ns.max(earliest_ns),
            self.latest_ns.min(latest_ns),
        );
        match earliest <= latest {
            true => Self {
                earliest_ns: earliest,
                latest_ns: latest,
                ..self
            },
            false => Self {
                earliest_ns,
                latest_ns,
                ..self
            },
        }
    }
}

/// Returns `a - b`, at most as far from 0 as the type allows.
fn difference(a: u64, b: u64) -> i64 {
    let apart = i64::try_from(a.abs_diff(b)).unwrap_or(i64::MAX);
    match a >= b {
        true => apart,
        false => -apart,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_fast_answer_needs_no_correction() {
        let error = ClockError::after_refresh(5_000 * MS, 5_000 * MS + 300_000);
        assert_eq!(error.correction(), None);
    }

    #[test]
    fn a_guest_that_says_nonsense_ends_the_corrections() {
        let mut error = ClockError::after_refresh(1, u64::MAX);
        for _ in 0..CORRECTIONS {
            let offset = error.correction().unwrap();
            error = error.moved(offset).narrowed(9, u64::MAX, 10);
        }
        assert_eq!(error.correction(), None);
    }

    proptest! {
        /// A clock that only messages delay is off by at most half of the fastest way
        /// there and back before the last correction, and the tolerance.
        #[test]
        fn the_error_is_at_most_half_of_a_round_trip(
            ways in prop::collection::vec((0_u64..400, 0_u64..400), 4)
        ) {
            let mut now = 1_000_000 * MS;
            // The guest's clock minus the host's.
            let mut late = 0_i64;
            let (there, back) = ways[0];
            late -= i64::try_from(there * MS).unwrap();
            now += (there + back) * MS;
            let guest = |at: u64, late: i64| at.checked_add_signed(late).unwrap();
            let mut error = ClockError::after_refresh(guest(now - back * MS, late), now);
            let (mut fastest, mut known) = (there + back, there + back);
            for (there, back) in &ways[1..] {
                let Some(offset) = error.correction() else {
                    known = fastest;
                    break;
                };
                known = fastest;
                let sent = now;
                late += offset;
                now += (there + back) * MS;
                error = error.moved(offset).narrowed(sent, guest(now - back * MS, late), now);
                prop_assert!(error.earliest_ns <= -late && -late <= error.latest_ns);
                fastest = fastest.min(there + back);
            }
            let bound = known * MS / 2 + TOLERANCE_NS.unsigned_abs();
            prop_assert!(late.unsigned_abs() <= bound, "{late} ns late, {known} ms");
        }
    }
}
