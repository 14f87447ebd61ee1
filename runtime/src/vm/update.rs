//! Changes of a VM's configuration.

use std::time::Duration;

use sm_control::config::RestartPolicy;

use crate::network::{NetRule, NetworkOptions};
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
    clear_rules: bool,
    allow: Vec<NetRule>,
    deny: Vec<NetRule>,
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

    /// Sets what the guest may reach, instead of the rules that the VM has, if there are any
    /// here. A guest that runs gets them at once: connections that they refuse end.
    #[must_use]
    pub fn allow_net(mut self, rules: impl IntoIterator<Item = NetRule>) -> Self {
        self.allow.extend(rules);
        self
    }

    /// Sets what the guest may not reach, as [`Self::allow_net`].
    #[must_use]
    pub fn deny_net(mut self, rules: impl IntoIterator<Item = NetRule>) -> Self {
        self.deny.extend(rules);
        self
    }

    /// Removes all rules of the network before others are set: without any, the guest may
    /// reach public addresses.
    #[must_use]
    pub fn clear_net(mut self, yes: bool) -> Self {
        self.clear_rules = yes;
        self
    }

    /// Returns true if the network of a running guest changes.
    pub(super) fn changes_network(&self) -> bool {
        self.clear_rules || !self.allow.is_empty() || !self.deny.is_empty()
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
        if self.clear_rules {
            config.network.allow.clear();
            config.network.deny.clear();
        }
        let mut rules = NetworkOptions::default();
        rules.allow.clone_from(&self.allow);
        rules.deny.clone_from(&self.deny);
        rules.check()?;
        let mac = config.network.mac.take();
        config.network = rules.applied_to(&config.network);
        config.network.mac = mac;
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
    fn rules_of_the_network_are_replaced() {
        let mut config = VmConfig::new(sm_control::id::VmId::generate(), "web");
        config.network.mac = Some("02:00:00:00:00:07".into());
        config.network.deny = vec!["10.0.0.0/8".into()];
        let unchanged = config.network.clone();
        let update = VmUpdate::new().label("a", "b");
        assert!(!update.changes_network());
        update.apply(&mut config).unwrap();
        assert_eq!(config.network, unchanged);
        let update = VmUpdate::new().allow_net(["host".parse().unwrap()]);
        assert!(update.changes_network());
        update.apply(&mut config).unwrap();
        assert_eq!(
            (&config.network.allow[..], &config.network.deny),
            (&["host".to_owned()][..], &unchanged.deny)
        );
        let update = VmUpdate::new()
            .clear_net(true)
            .deny_net(["all".parse().unwrap()]);
        update.apply(&mut config).unwrap();
        assert_eq!(
            (config.network.allow.len(), &config.network.deny[..]),
            (0, &["all".to_owned()][..])
        );
        assert_eq!(config.network.mac, unchanged.mac);
    }

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
