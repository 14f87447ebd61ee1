//! The log of the VMM process on its standard error: `vmm.log`.
//!
//! A guest can cause any number of lines, for instance by repeatedly resetting and
//! breaking a device, so the log is truncated at a limit.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Maximum size of the log in bytes.
const LIMIT: u64 = 4 << 20;
const LIMIT_NOTE: &[u8] = b"[the log beyond 4 MiB is not stored]\n";

/// Variable with the log filter, such as `sm_vmm_core=debug`.
const VARIABLE: &str = "SM_LOG";

/// Sends this process's log to its standard error.
pub(super) fn to_stderr() {
    let filter = std::env::var(VARIABLE).ok();
    let filter = filter.and_then(|filter| filter.parse::<Targets>().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let limit = LogLimit::default();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(move || limit.writer(io::stderr()))
        .with_ansi(false);
    // An error means that the program has already set a subscriber.
    let _ = tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .try_init();
}

/// Counts the written bytes.
#[derive(Clone, Debug, Default)]
struct LogLimit(Arc<AtomicU64>);

impl LogLimit {
    fn writer<W: Write>(&self, to: W) -> Limited<W> {
        Limited {
            to,
            written: Arc::clone(&self.0),
        }
    }
}

/// A writer that forwards bytes up to the limit and discards the rest.
struct Limited<W> {
    to: W,
    written: Arc<AtomicU64>,
}

impl<W: Write> Write for Limited<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        // The counter wraps after 16 EiB.
        let before = self.written.fetch_add(len, Ordering::Relaxed);
        let after = before.saturating_add(len);
        if after <= LIMIT {
            self.to.write_all(bytes)?;
        } else if before <= LIMIT {
            self.to.write_all(LIMIT_NOTE)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_truncated_at_its_limit() {
        let (limit, mut kept) = (LogLimit::default(), Vec::new());
        let line = [b'x'; 999];
        for _ in 0..10_000 {
            limit.writer(&mut kept).write_all(&line).unwrap();
        }
        let limit = usize::try_from(LIMIT).unwrap();
        assert!(kept.len() <= limit + LIMIT_NOTE.len());
        assert!(kept.len() > limit - 1000);
        assert!(kept.ends_with(LIMIT_NOTE));
        let notes = kept
            .windows(LIMIT_NOTE.len())
            .filter(|part| *part == LIMIT_NOTE);
        assert_eq!(notes.count(), 1);
    }
}
