//! Health checks of workloads.

use serde::{Deserialize, Serialize};

/// A command that shows by its status whether a workload is healthy (Docker's
/// `HEALTHCHECK`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Program and arguments, run beside the workload with its environment, directory and
    /// user.
    pub command: Vec<String>,
    /// Milliseconds between the end of a check and the start of the next.
    pub interval_ms: u64,
    /// Milliseconds after which a check is killed and has failed.
    pub timeout_ms: u64,
    /// Milliseconds after the start of the workload in which failures do not count.
    pub start_period_ms: u64,
    /// Consecutive failures after which the workload is unhealthy, at least 1.
    pub retries: u32,
}

impl HealthCheck {
    /// Returns a check with Docker's defaults: every 30 s, with a time limit of 30 s,
    /// unhealthy after 3 failures.
    #[must_use]
    pub fn new(command: Vec<String>) -> Self {
        Self {
            command,
            interval_ms: 30_000,
            timeout_ms: 30_000,
            start_period_ms: 0,
            retries: 3,
        }
    }

    /// Returns the check that runs a command line by the guest's shell.
    #[must_use]
    pub fn shell(line: &str) -> Self {
        Self::new(vec!["/bin/sh".into(), "-c".into(), line.to_owned()])
    }
}
