//! Limits of bytes in a second.
//!
//! A bucket is a time: that at which all that was taken is paid for. It needs no timer for
//! packets; flows that have to wait are resumed together.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use sm_event_loop::{Registry, Timer};

use super::flow::{TokenKind, token};

/// Time for which the rate may be exceeded at once, and the bytes that are allowed anyway: a
/// large segment.
const BURST: Duration = Duration::from_millis(50);
const MIN_BURST: u64 = 64 << 10;
/// Shortest time that flows wait: many are resumed together.
const PAUSE: Duration = Duration::from_millis(2);

/// Rates of payload of a guest, in bytes in a second; `None` for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetRate {
    /// Bytes of the guest. Those of TCP wait; datagrams are dropped.
    pub from_guest: Option<NonZeroU64>,
    /// Bytes for the guest. The host's sockets are not read meanwhile.
    pub to_guest: Option<NonZeroU64>,
}

impl NetRate {
    /// Returns the same rate for both directions.
    #[must_use]
    pub fn both(rate: NonZeroU64) -> Self {
        Self {
            from_guest: Some(rate),
            to_guest: Some(rate),
        }
    }
}

/// A token bucket.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: NonZeroU64,
    burst: Duration,
    /// Time at which what was taken is paid for.
    paid: Instant,
}

impl Bucket {
    fn new(rate: NonZeroU64, now: Instant) -> Self {
        Self {
            rate,
            burst: time_of(MIN_BURST, rate).max(BURST),
            paid: now,
        }
    }

    /// Returns the time to wait until more may be taken.
    fn wait(&self, now: Instant) -> Duration {
        let debt = self.paid.saturating_duration_since(now);
        debt.saturating_sub(self.burst)
    }

    fn take(&mut self, bytes: u64, now: Instant) {
        let from = self.paid.max(now);
        self.paid = from.checked_add(time_of(bytes, self.rate)).unwrap_or(from);
    }
}

fn time_of(bytes: u64, rate: NonZeroU64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The rates of an engine.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    from_guest: Option<Bucket>,
    to_guest: Option<Bucket>,
    /// Resumes flows that wait.
    timer: Option<Timer>,
    /// Shortest time that a flow has to wait, and was not set.
    wanted: Option<Instant>,
}

impl Rates {
    pub(crate) fn set(&mut self, rate: NetRate, now: Instant) {
        self.from_guest = rate.from_guest.map(|rate| Bucket::new(rate, now));
        self.to_guest = rate.to_guest.map(|rate| Bucket::new(rate, now));
    }

    /// Returns true if the guest may send; otherwise flows are resumed when it may.
    pub(crate) fn may_send(&mut self, now: Instant) -> bool {
        Self::may(&self.from_guest, &mut self.wanted, now)
    }

    /// Returns true if the guest may get more; otherwise flows are resumed when it may.
    pub(crate) fn may_receive(&mut self, now: Instant) -> bool {
        Self::may(&self.to_guest, &mut self.wanted, now)
    }

    fn may(bucket: &Option<Bucket>, wanted: &mut Option<Instant>, now: Instant) -> bool {
        let wait = bucket.map_or(Duration::ZERO, |bucket| bucket.wait(now));
        if wait.is_zero() {
            return true;
        }
        let at = now + wait.max(PAUSE);
        *wanted = Some(wanted.map_or(at, |other| other.min(at)));
        false
    }

    pub(crate) fn sent(&mut self, bytes: u64, now: Instant) {
        if let Some(bucket) = &mut self.from_guest {
            bucket.take(bytes, now);
        }
    }

    pub(crate) fn received(&mut self, bytes: u64, now: Instant) {
        if let Some(bucket) = &mut self.to_guest {
            bucket.take(bytes, now);
        }
    }

    /// Sets the timer for flows that wait.
    pub(crate) fn arm(&mut self, registry: &mut dyn Registry) {
        if let Some(at) = self.wanted.take()
            && self.timer.is_none()
        {
            self.timer = Some(registry.set_timer(at, token(TokenKind::RateTimer, 0)));
        }
    }

    /// Notes that the timer has passed.
    pub(crate) fn passed(&mut self) {
        self.timer = None;
    }

    pub(crate) fn take_timer(&mut self) -> Option<Timer> {
        self.timer.take()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A sender that takes all that is permitted gets the rate, and a burst and one piece
        /// more.
        #[test]
        fn the_rate_holds(
            rate in 1_000u64..1 << 40,
            pieces in prop::collection::vec((1u64..65_536, 0u64..40), 1..200),
        ) {
            let start = Instant::now();
            let mut rates = Rates::default();
            let limit = NonZeroU64::new(rate).unwrap();
            rates.set(NetRate { from_guest: Some(limit), to_guest: None }, start);
            let (mut now, mut total, mut last) = (start, 0, 0);
            for (bytes, wait) in pieces {
                if rates.may_send(now) {
                    rates.sent(bytes, now);
                    total += bytes;
                    last = bytes;
                } else {
                    let at = rates.wanted.take().unwrap();
                    // It may as soon as it was said that it may.
                    prop_assert!(at > now);
                    now = at;
                    prop_assert!(rates.may_send(now));
                }
                prop_assert!(rates.may_receive(now));
                let paid = u128::from(rate) * now.duration_since(start).as_nanos() / 1_000_000_000;
                let burst = u128::from(MIN_BURST).max(u128::from(rate) / 20);
                prop_assert!(u128::from(total) <= paid + burst + u128::from(last) + 2);
                now += Duration::from_millis(wait);
            }
        }
    }

    #[test]
    fn an_idle_bucket_saves_nothing_up() {
        let start = Instant::now();
        let mut bucket = Bucket::new(NonZeroU64::new(1 << 20).unwrap(), start);
        let later = start + Duration::from_secs(1000);
        assert_eq!(bucket.wait(later), Duration::ZERO);
        bucket.take(1 << 20, later);
        assert!(bucket.wait(later) > Duration::from_millis(900));
    }
}
