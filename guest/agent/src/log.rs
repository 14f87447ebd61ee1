//! Short lines to the kernel log, from where they reach the console file.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::OnceLock;

use rustix::fs::OFlags;

use crate::node::Node;

/// Set once, before any workload could replace `/dev/kmsg`.
static KERNEL_LOG: OnceLock<Node> = OnceLock::new();

/// Finds the kernel log. Lines go to standard error before that, and without it.
pub(crate) fn open() {
    if KERNEL_LOG.get().is_none()
        && let Ok(node) = Node::find("/dev/kmsg")
    {
        let _ = KERNEL_LOG.set(node);
    }
}

/// The descriptor that a forked process must keep to be able to log.
pub(crate) fn descriptor() -> Option<BorrowedFd<'static>> {
    KERNEL_LOG.get().map(|node| node.as_fd())
}

/// Writes one line. Level 3 is an error, 6 information (`syslog(2)`).
pub(crate) fn line(level: u8, text: &str) {
    let line = format!("<{level}>sm-agent: {text}\n");
    // Opened for each line: the kernel limits the lines of one open file to ten in
    // five seconds.
    let opened = KERNEL_LOG
        .get()
        .and_then(|node| node.open(OFlags::WRONLY).ok());
    match opened {
        Some(log) => drop(rustix::io::write(log, line.as_bytes())),
        None => eprintln!("sm-agent: {text}"),
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
