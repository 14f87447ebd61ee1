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

/// Writes one line. Level 3 is an error, 6 is information (`syslog(2)`).
pub(crate) fn line(level: u8, text: &str) {
    let line = format!("<{level}>sm-agent: {text}\n");
    // Opened for each line, because the kernel limits each open file to ten lines in five
    // seconds.
    let opened = KERNEL_LOG
        .get()
        .and_then(|node| node.open(OFlags::WRONLY).ok());
    match opened {
        Some(log) => drop(rustix::io::write(log, line.as_bytes())),
        None => eprintln!("sm-agent: {text}"),
    }
}

/// Logs a failure that the agent tolerates.
pub(crate) fn error(what: &str, error: impl std::fmt::Display) {
    line(3, &format!("{what}: {error}"));
}

/// Logs the failure of an optional step.
pub(crate) fn note_failure<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) {
    if let Err(cause) = result {
        error(what, cause);
    }
}
