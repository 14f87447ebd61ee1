//! Changes of a VM's configuration.

use std::time::Duration;

use sm_control::config::RestartPolicy;

use crate::record::VmConfig;
use crate::{Error, OptionError};

/// Changes for [`crate::Vm::update`]; everything that is not set stays.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VmUpdate {
    restart: Option<RestartPolicy>,
    stop_timeout: Option<Duration>,
    labels: Vec<(String, Option<String>)>,
}

impl VmUpdate {
    /// Returns an update without changes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the restart policy.
    #[must_use]
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.restart = Some(policy);
        self
    }

    /// Sets the time between stop signal and SIGKILL.
    #[must_use]
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = Some(timeout);
        self
    }

    /// Adds a label, or changes its value.
    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.push((name.into(), Some(value.into())));
        self
    }

    /// Removes a label, if the VM has it.
    #[must_use]
    pub fn remove_label(mut self, name: impl Into<String>) -> Self {
        self.labels.push((name.into(), None));
        self
    }

    pub(super) fn apply(&self, config: &mut VmConfig) -> Result<(), Error> {
        if let Some(restart) = self.restart {
            if config.auto_remove && restart != RestartPolicy::No {
                return Err(OptionError::RestartOfRemoved.into());
            }
            config.restart = restart;
        }
        if let Some(timeout) = self.stop_timeout {
            config.stop_timeout = timeout;
        }
        for (name, value) in &self.labels {
            match value {
                Some(value) => config.labels.insert(name.clone(), value.clone()),
                None => config.labels.remove(name),
            };
        }
        Ok(())
    }
}
