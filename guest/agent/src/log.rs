//! Log lines in the kernel log, which the host records with the console.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::OnceLock;

use rustix::fs::OFlags;

use crate::node::Node;

/// Set once, before any workload could replace `/dev/kmsg`.
static KERNEL_LOG: OnceLock<Node> = OnceLock::new();

/// Opens the kernel log. Before that, and without a kernel log, lines go to standard
/// error.
pub(crate) fn open() {
    if KERNEL_LOG.get().is_none()
        && let Ok(node) = Node::find("/dev/kmsg")
    {
        let _ = KERNEL_LOG.set(node);
    }
}

/// Returns the descriptor that a forked process must keep open to be able to log.
pub(crate) fn descriptor() -> Option<BorrowedFd<'static>> {
    KERNEL_LOG.get().map(|node| node.as_fd())
}

/// Maximum length of a record in bytes. Linux refuses longer writes with EINVAL
/// (`devkmsg_write`): more than 1024 bytes, in earlier versions 1024 minus a prefix of up
/// to 48.
const MAX_RECORD: usize = 976;

/// Returns a record in the form that `/dev/kmsg` expects. Text that is too long is cut.
fn record(level: u8, text: &str) -> String {
    let mut record = format!("<{level}>sm-agent: {text}");
    record.truncate(record.floor_char_boundary(MAX_RECORD - 1));
    record.push('\n');
    record
}

/// Writes one line. Level 3 is an error, 6 is information (`syslog(2)`).
pub(crate) fn line(level: u8, text: &str) {
    // Opened for each line, because the kernel limits each open file to ten lines in five
    // seconds.
    let opened = KERNEL_LOG
        .get()
        .and_then(|node| node.open(OFlags::WRONLY).ok());
    match opened {
        Some(log) => drop(rustix::io::write(log, record(level, text).as_bytes())),
        None => to_stderr(&format!("sm-agent: {text}\n")),
    }
}

/// Writes to standard error. A failure is ignored, whereas `eprintln` panics, which in
/// PID 1 ends the guest.
pub(crate) fn to_stderr(text: &str) {
    let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
}

/// Logs a failure that the agent tolerates.
pub(crate) fn error(operation: &str, error: impl std::fmt::Display) {
    line(3, &format!("{operation}: {error}"));
}

/// Logs the failure of an optional step.
pub(crate) fn note_failure<T, E: std::fmt::Display>(operation: &str, result: Result<T, E>) {
    if let Err(cause) = result {
        error(operation, cause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_record_is_cut_to_what_linux_accepts() {
        assert_eq!(record(6, "ready"), "<6>sm-agent: ready\n");
        // Characters of two bytes, one of which crosses the limit in one of the cases.
        for start in ["", "x"] {
            let cut = record(3, &format!("{start}{}", "\u{e9}".repeat(2000)));
            assert!((MAX_RECORD - 1..=MAX_RECORD).contains(&cut.len()));
            assert!(cut.ends_with("\u{e9}\n"));
        }
    }
}
