//! Changes of a health check.

use std::time::Duration;

use sm_control::config::HealthCheck;

/// Changes of the health check that an image, or a snapshot, has. What is not set stays, or
/// has the default of [`HealthCheck::new`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthOptions {
    /// No check, whatever the others say.
    pub disabled: bool,
    /// Program and arguments; empty for those of the image.
    pub command: Vec<String>,
    /// Time between the end of a check and the start of the next.
    pub interval: Option<Duration>,
    /// Time limit of a check.
    pub timeout: Option<Duration>,
    /// Time after the start of the workload in which failures do not count.
    pub start_period: Option<Duration>,
    /// Consecutive failures after which the workload is unhealthy, at least 1.
    pub retries: Option<u32>,
}

impl HealthOptions {
    /// Returns the check with these changes.
    pub(super) fn applied_to(&self, check: Option<HealthCheck>) -> Option<HealthCheck> {
        if self.disabled {
            return None;
        }
        let mut check = match self.command.is_empty() {
            true => check?,
            false => HealthCheck {
                command: self.command.clone(),
                ..check.unwrap_or_else(|| HealthCheck::new(Vec::new()))
            },
        };
        let set = |to: &mut u64, time: Option<Duration>| {
            if let Some(time) = time {
                *to = super::millis(time);
            }
        };
        set(&mut check.interval_ms, self.interval);
        set(&mut check.timeout_ms, self.timeout);
        set(&mut check.start_period_ms, self.start_period);
        // A check without a limit, or without a pause, would be one without an end.
        check.interval_ms = check.interval_ms.max(1);
        check.timeout_ms = check.timeout_ms.max(1);
        check.retries = self.retries.unwrap_or(check.retries).max(1);
        Some(check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_change_the_check_of_the_image() {
        let of_image = || Some(HealthCheck::shell("test -e /ok"));
        let options = HealthOptions {
            interval: Some(Duration::from_secs(1)),
            retries: Some(0),
            ..HealthOptions::default()
        };
        let check = options.applied_to(of_image()).unwrap();
        assert_eq!(check.command, of_image().unwrap().command);
        assert_eq!(
            (check.interval_ms, check.timeout_ms, check.retries),
            (1000, 30_000, 1)
        );
        assert_eq!(options.applied_to(None), None, "there is no command");
        let own = HealthOptions {
            command: vec!["true".to_owned()],
            ..HealthOptions::default()
        };
        assert_eq!(
            own.applied_to(None),
            Some(HealthCheck::new(own.command.clone()))
        );
        let none = HealthOptions {
            disabled: true,
            ..own
        };
        assert_eq!(none.applied_to(of_image()), None);
    }
}
