//! Limits and backoff for repeated requests to a registry.

use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::super::Session;

/// Maximum number of attempts of a request.
pub(super) const ATTEMPTS: u32 = 5;
/// First pause, if the registry requests none; each further pause is longer.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const GROWTH: u32 = 2;
/// Maximum pause that a registry may request. A registry that requests more (for example
/// after a limit on pulls per hour) is an error.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// Maximum total waiting time for one request.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// Retry state of one request.
pub(super) struct Backoff<'s> {
    session: Session<'s>,
    attempts: u32,
    attempted: u32,
    pause: Duration,
    waited: Duration,
}

/// The reason why no further attempt is made.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoRetry {
    /// The number of attempts is exhausted.
    Attempts(u32),
    /// The registry requests too long a pause.
    TooLong(Duration),
    /// The operation was cancelled.
    Cancelled,
}

impl fmt::Display for NoRetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attempts(1) => Ok(()),
            Self::Attempts(count) => write!(f, " ({count} times)"),
            Self::TooLong(pause) => {
                let seconds = pause.as_secs();
                write!(f, " and requests a pause of {seconds} s: try again then")
            }
            Self::Cancelled => f.write_str(" (cancelled)"),
        }
    }
}

impl<'s> Backoff<'s> {
    pub(super) fn new(session: Session<'s>, attempts: u32) -> Self {
        Self {
            session,
            attempts,
            attempted: 1,
            pause: FIRST_PAUSE,
            waited: Duration::ZERO,
        }
    }

    /// Waits until the next attempt: for the pause `requested` by `registry`, or for a
    /// random time whose maximum doubles with each attempt.
    pub(super) fn wait_for_retry(
        &mut self,
        registry: &str,
        requested: Option<Duration>,
    ) -> Result<(), NoRetry> {
        if self.session.cancel.is_cancelled() {
            return Err(NoRetry::Cancelled);
        }
        if self.attempted >= self.attempts {
            return Err(NoRetry::Attempts(self.attempted));
        }
        let pause = requested.unwrap_or_else(|| jittered(self.pause));
        if pause > LONGEST_PAUSE || self.waited + pause > LONGEST_WAIT {
            return Err(NoRetry::TooLong(pause));
        }
        if requested.is_some_and(|requested| requested >= Duration::from_secs(1)) {
            let seconds = pause.as_secs();
            (self.session.message)(&format!("waiting {seconds} s, as requested by {registry}"));
        }
        if !self.session.cancel.wait(pause) {
            return Err(NoRetry::Cancelled);
        }
        self.attempted += 1;
        self.waited += pause;
        self.pause *= GROWTH;
        Ok(())
    }
}

/// Returns a duration between half of `pause` and `pause`, so that clients that failed
/// together do not retry together.
fn jittered(pause: Duration) -> Duration {
    // A pseudo-random number is sufficient.
    let random = std::hash::RandomState::new().build_hasher().finish() % 512;
    let part = u32::try_from(random).unwrap_or(0);
    pause / 2 + pause / 1024 * part
}

/// Parses a `Retry-After` header: seconds, or a date (RFC 9110 section 10.2.3). A date in
/// the past means no pause.
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let then = UNIX_EPOCH + Duration::from_secs(http_date(value)?);
    Some(then.duration_since(now).unwrap_or_default())
}

/// Parses a date such as `Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970 (RFC 9110
/// section 5.6.7; the obsolete forms are not supported).
fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (_, rest) = text.split_once(", ")?;
    let parts: Vec<&str> = rest.split(' ').collect();
    let [day, month, year, time, "GMT"] = parts.as_slice() else {
        return None;
    };
    let number = |text: &str, len: usize| -> Option<u64> {
        let digits = text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    let month = MONTHS.iter().position(|name| name == month)?;
    let (day, year) = (number(day, 2)?, number(year, 4)?);
    let clock: Vec<&str> = time.split(':').collect();
    let [hours, minutes, seconds] = clock.as_slice() else {
        return None;
    };
    let (hours, minutes, seconds) = (number(hours, 2)?, number(minutes, 2)?, number(seconds, 2)?);
    if year < 1970 || !(1..=31).contains(&day) || hours > 23 || minutes > 59 || seconds > 60 {
        return None;
    }
    // Count the days before a month in a year that starts in March, so that the leap day
    // is the last day.
    let month = u64::try_from(month).ok()?;
    let (year, month) = match month {
        0 | 1 => (year - 1, month + 10),
        month => (year, month - 2),
    };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day;
    let days = days.checked_sub(719_469)?;
    Some(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::cancel::Cancel;

    #[test]
    fn dates_are_read() {
        for (text, expected) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777),
            ("Tue, 29 Feb 2000 23:59:59 GMT", 951_868_799),
            ("Wed, 01 Mar 2000 00:00:00 GMT", 951_868_800),
            ("Fri, 31 Dec 2100 00:00:00 GMT", 4_133_894_400),
        ] {
            assert_eq!(http_date(text), Some(expected), "{text}");
        }
        for bad in [
            "",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun, 6 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 06 Nov 1994 24:49:37 GMT",
            "Sun, 00 Nov 1994 08:49:37 GMT",
            "Sun, 06 Non 1994 08:49:37 GMT",
            "Sun, 06 Nov 1969 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49 GMT",
        ] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_770);
        let after = |text: &str| retry_after(text, now).map(|pause| pause.as_secs());
        assert_eq!(after("120"), Some(120));
        assert_eq!(after(" 0 "), Some(0));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(7));
        assert_eq!(after("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0));
        assert_eq!(after("soon"), None);
        assert_eq!(after("-1"), None);
    }

    #[test]
    fn retries_end() {
        let said = Mutex::new(Vec::new());
        let message = |text: &str| said.lock().unwrap().push(text.to_owned());
        let cancel = Cancel::new();
        let session = Session {
            scratch: Path::new("/nowhere"),
            cancel: &cancel,
            message: &message,
        };
        let now = Some(Duration::ZERO);
        let mut backoff = Backoff::new(session, 3);
        assert_eq!(backoff.wait_for_retry("r", now), Ok(()));
        assert_eq!(backoff.wait_for_retry("r", now), Ok(()));
        assert_eq!(backoff.wait_for_retry("r", now), Err(NoRetry::Attempts(3)));

        let long = Duration::from_secs(3600);
        let mut backoff = Backoff::new(session, 3);
        let over = backoff.wait_for_retry("r", Some(long)).unwrap_err();
        assert_eq!(over, NoRetry::TooLong(long));
        assert!(over.to_string().contains("3600 s"));
        assert!(said.lock().unwrap().is_empty());

        // Cancellation during a wait, which is reported before.
        let mut backoff = Backoff::new(session, 3);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| backoff.wait_for_retry("r.example", Some(LONGEST_PAUSE)));
            while said.lock().unwrap().is_empty() {
                std::thread::yield_now();
            }
            cancel.cancel();
            assert_eq!(waiting.join().unwrap(), Err(NoRetry::Cancelled));
        });
        assert_eq!(
            said.lock().unwrap()[0],
            "waiting 120 s, as requested by r.example"
        );
        assert_eq!(backoff.wait_for_retry("r", now), Err(NoRetry::Cancelled));
    }

    proptest! {
        #[test]
        fn pauses_stay_in_their_range(millis in 1u64..100_000) {
            let pause = Duration::from_millis(millis);
            let jittered = jittered(pause);
            prop_assert!(jittered >= pause / 2 && jittered <= pause);
        }

        #[test]
        fn any_header_is_parsed_without_panic(text in "\\PC{0,40}") {
            let _ = retry_after(&text, UNIX_EPOCH);
        }

        #[test]
        fn later_dates_are_later(day in 0u64..40_000) {
            // The reference calendar counts years and months one by one.
            let (mut year, mut left) = (1970, day);
            let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            while left >= 365 + u64::from(leap(year)) {
                left -= 365 + u64::from(leap(year));
                year += 1;
            }
            let february = 28 + u64::from(leap(year));
            let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            let names = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
            let mut month = 0;
            while left >= lengths[month] {
                left -= lengths[month];
                month += 1;
            }
            let text = format!("Mon, {:02} {} {year} 00:00:00 GMT", left + 1, names[month]);
            prop_assert_eq!(http_date(&text), Some(day * 86_400), "{}", text);
        }
    }
}
