//! Changes of a VM's configuration.

use std::time::Duration;

use sm_control::config::RestartPolicy;

use crate::record::VmConfig;
use crate::{Error, MIN_MEMORY, OptionError};

/// Changes for [`crate::Vm::update`]; everything that is not set stays.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VmUpdate {
    restart: Option<RestartPolicy>,
    stop_timeout: Option<Duration>,
    memory: Option<u64>,
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

    /// Sets the memory in bytes that the guest may use, at least [`crate::MIN_MEMORY`] and at
    /// most what the VM was created with. A guest that runs is asked to return the rest to
    /// the host, as far as it can: its kernel then has less, and ends programs if they need
    /// more. It is no protection against a guest that does not.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
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

    /// Returns true if a running guest has to be notified.
    pub(super) fn changes_memory(&self) -> bool {
        self.memory.is_some()
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
        if let Some(bytes) = self.memory {
            config.memory_limit = limit(bytes, config.memory_bytes)?;
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

/// Returns the limit for a VM with `all` bytes of memory; `None` if it may use all of them.
fn limit(bytes: u64, all: u64) -> Result<Option<u64>, OptionError> {
    if bytes < MIN_MEMORY {
        return Err(OptionError::Memory {
            bytes,
            minimum: MIN_MEMORY,
        });
    }
    if bytes > all {
        return Err(OptionError::MemoryBeyond { bytes, all });
    }
    Ok((bytes < all).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_memory_is_at_most_what_the_vm_has() {
        let all = 512 << 20;
        assert_eq!(limit(all, all).unwrap(), None);
        assert_eq!(limit(MIN_MEMORY, all).unwrap(), Some(MIN_MEMORY));
        for bytes in [0, MIN_MEMORY - 1, all + 1, u64::MAX] {
            let error = limit(bytes, all).unwrap_err().to_string();
            assert!(error.contains("MiB"), "{error}");
        }
    }
}
