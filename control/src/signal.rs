//! Signal names, in the forms that an image's `StopSignal` and users write.

use thiserror::Error;

/// The text is not the name or number of a signal.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("unknown signal \"{0}\": use a name such as TERM or SIGKILL, or a number from 1 to 64")]
pub struct UnknownSignal(pub String);

/// Signal numbers and names of Linux on x86_64 and arm64.
const SIGNALS: [(u8, &str); 31] = [
    (1, "HUP"),
    (2, "INT"),
    (3, "QUIT"),
    (4, "ILL"),
    (5, "TRAP"),
    (6, "ABRT"),
    (7, "BUS"),
    (8, "FPE"),
    (9, "KILL"),
    (10, "USR1"),
    (11, "SEGV"),
    (12, "USR2"),
    (13, "PIPE"),
    (14, "ALRM"),
    (15, "TERM"),
    (16, "STKFLT"),
    (17, "CHLD"),
    (18, "CONT"),
    (19, "STOP"),
    (20, "TSTP"),
    (21, "TTIN"),
    (22, "TTOU"),
    (23, "URG"),
    (24, "XCPU"),
    (25, "XFSZ"),
    (26, "VTALRM"),
    (27, "PROF"),
    (28, "WINCH"),
    (29, "IO"),
    (30, "PWR"),
    (31, "SYS"),
];

/// Number of SIGTERM.
pub const TERM: u8 = 15;
/// Number of SIGKILL.
pub const KILL: u8 = 9;

/// Parses a signal name (`TERM`, `SIGTERM`, `sigterm`, `RTMIN+3`) or number.
///
/// # Errors
/// The text has none of these forms.
pub fn parse(text: &str) -> Result<u8, UnknownSignal> {
    let unknown = || UnknownSignal(text.to_owned());
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64)
            .contains(&number)
            .then_some(number)
            .ok_or_else(unknown);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((number, _)) = SIGNALS.iter().find(|(_, known)| *known == name) {
        return Ok(*number);
    }
    // The C library reserves 32 and 33, so that SIGRTMIN is 34.
    let real_time = if name == "RTMIN" {
        Some(34)
    } else if name == "RTMAX" {
        Some(64)
    } else if let Some(above) = name.strip_prefix("RTMIN+") {
        above.parse::<u8>().ok().and_then(|n| n.checked_add(34))
    } else if let Some(below) = name.strip_prefix("RTMAX-") {
        below.parse::<u8>().ok().and_then(|n| 64u8.checked_sub(n))
    } else {
        None
    };
    real_time
        .filter(|number| (34..=64).contains(number))
        .ok_or_else(unknown)
}

/// Returns the name of a signal: `SIGTERM` for 15, `signal 40` for a real-time signal.
#[must_use]
pub fn name(number: u8) -> String {
    match SIGNALS.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => format!("SIG{name}"),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_numbers_and_real_time_signals() {
        for (text, number) in [
            ("TERM", 15),
            ("sigkill", 9),
            ("SIGWINCH", 28),
            ("1", 1),
            ("RTMIN+3", 37),
            ("RTMAX", 64),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for bad in ["", "SIG", "0", "65", "-1", "RTMIN+31", "TERMINATE"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(name(9), "SIGKILL");
    }
}
