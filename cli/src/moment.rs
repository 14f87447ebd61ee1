//! Points in time, as logs contain them and people write them.

use std::time::{SystemTime, UNIX_EPOCH};

const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 86_400;
/// Days from 1 March of year 0 to the Unix epoch.
const EPOCH: u64 = 719_468;

/// Formats as `2026-01-31T12:00:00.123456789Z` (RFC 3339, UTC).
pub(crate) fn timestamp(nanoseconds: u64) -> String {
    let (seconds, fraction) = (nanoseconds / SECOND, nanoseconds % SECOND);
    let (days, second) = (seconds / DAY, seconds % DAY);
    let [year, month, day] = date(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{fraction:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Converts days since the Unix epoch to a date of the proleptic Gregorian calendar.
/// Years are counted from March, so that the leap day is the last.
fn date(days: u64) -> [u64; 3] {
    let shifted = days + EPOCH;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    [year, month, day]
}

/// The inverse of [`date`]; `None` before the epoch, and for invalid dates.
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    let shifted_year = year.checked_sub(u64::from(month <= 2))?;
    let (era, year_of_era) = (shifted_year / 400, shifted_year % 400);
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day.checked_sub(1)?;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (era * 146_097 + day_of_era).checked_sub(EPOCH)?;
    (date(days) == [year, month, day]).then_some(days)
}

/// Parses an age (`90s`, `10m`, `1h30m`), seconds since the Unix epoch, or RFC 3339 in
/// UTC. Returns nanoseconds since the Unix epoch.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
    let now = now.and_then(|now| u64::try_from(now.as_nanos()).ok());
    parse_at(text, now.unwrap_or(0)).ok_or_else(|| {
        format!(
            "\"{text}\" is not a time: write how long ago, such as 90s or 1h30m, or a moment, \
             such as 2026-01-31T12:00:00Z"
        )
    })
}

fn parse_at(text: &str, now: u64) -> Option<u64> {
    if text.contains(['T', '-']) {
        return rfc_3339(text);
    }
    if let Some(seconds) = fixed_point(text) {
        return Some(seconds);
    }
    let (mut rest, mut ago) = (text, 0u64);
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
        let (unit, nanoseconds) = [
            ("ms", SECOND / 1000),
            ("s", SECOND),
            ("m", 60 * SECOND),
            ("h", 3600 * SECOND),
        ]
        .into_iter()
        .find(|(unit, _)| after.starts_with(unit))?;
        let part = number.parse::<u64>().ok()?.checked_mul(nanoseconds)?;
        ago = ago.checked_add(part)?;
        rest = after.strip_prefix(unit)?;
    }
    (!text.is_empty()).then(|| now.saturating_sub(ago))
}

/// Parses `1136073845.5` into nanoseconds.
fn fixed_point(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(fraction) || fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(SECOND)?;
    whole.checked_add(format!("{fraction:0<9}").parse().ok()?)
}

fn rfc_3339(text: &str) -> Option<u64> {
    let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00Z"));
    let numbers = |text: &str, separator| -> Option<Vec<u64>> {
        text.split(separator)
            .map(|part| part.parse().ok())
            .collect()
    };
    let [year, month, day] = numbers(date, '-')?.try_into().ok()?;
    let (clock, seconds) = time.strip_suffix('Z')?.rsplit_once(':')?;
    let [hour, minute] = numbers(clock, ':')?.try_into().ok()?;
    let seconds = fixed_point(seconds)?;
    let is_date = year <= 9999 && month <= 12 && day <= 31;
    if !is_date || hour > 23 || minute > 59 || seconds >= 61 * SECOND {
        return None;
    }
    let whole = days(year, month, day)? * DAY + hour * 3600 + minute * 60;
    whole.checked_mul(SECOND)?.checked_add(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_rfc_3339_and_read_again() {
        for (nanoseconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (1_709_210_096_000_000_007, "2024-02-29T12:34:56.000000007Z"),
            (951_782_400_000_000_000, "2000-02-29T00:00:00.000000000Z"),
            (4_102_444_799_999_999_999, "2099-12-31T23:59:59.999999999Z"),
        ] {
            assert_eq!(timestamp(nanoseconds), text);
            assert_eq!(parse(text), Ok(nanoseconds));
        }
        assert_eq!(parse("2024-02-29"), Ok(1_709_164_800 * SECOND));
        assert_eq!(parse("2024-02-29T12:34:56Z"), Ok(1_709_210_096 * SECOND));
    }

    #[test]
    fn times_may_be_ages() {
        let now = 1_000_000 * SECOND;
        for (text, ago) in [("0s", 0), ("90s", 90), ("10m", 600), ("1h30m", 5400)] {
            assert_eq!(parse_at(text, now), Some(now - ago * SECOND), "{text}");
        }
        assert_eq!(parse_at("250ms", now), Some(now - SECOND / 4));
        assert_eq!(parse_at("999999h", now), Some(0), "before everything");
        assert_eq!(parse_at("5.25", now), Some(5 * SECOND + SECOND / 4));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "yesterday",
            "10",
            "-5m",
            "5d",
            "m",
            "1.0000000001",
            "2024-02-30",
            "2023-02-29",
            "2024-13-01",
            "2024-9999999999999999999-01",
            "2024-01-9999999999999999999",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00Z",
            "2024-01-01T00:00:00",
            "1969-12-31",
            "99999999999999999999",
        ] {
            let parsed = parse(text);
            // Seconds since the epoch are valid, as for Docker.
            assert_eq!(parsed.is_err(), text != "10", "{text}: {parsed:?}");
        }
    }
}
