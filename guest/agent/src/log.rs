//! Short lines to the kernel log, from where they reach the console file.

use std::fs::OpenOptions;
use std::io::Write as _;

/// Writes one line. Level 3 is an error, 6 information (`syslog(2)`).
pub(crate) fn line(level: u8, text: &str) {
    let line = format!("<{level}>sm-agent: {text}\n");
    match OpenOptions::new().write(true).open("/dev/kmsg") {
        Ok(mut log) => drop(log.write_all(line.as_bytes())),
        Err(_) => eprintln!("sm-agent: {text}"),
    }
}

/// Reports that something failed that the agent can go on without.
pub(crate) fn error(what: &str, error: impl std::fmt::Display) {
    line(3, &format!("{what}: {error}"));
}

/// Continues after a failure that only costs comfort, and says so.
pub(crate) fn note_failure<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) {
    if let Err(cause) = result {
        error(what, cause);
    }
}
