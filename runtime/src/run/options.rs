//! Options of a start.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use sm_control::config::{RestartPolicy, SettingsSourceV1, StartSettingsV1, VmConfig};
use sm_control::launch::Paging;
use sm_control::publish::{DEFAULT_WAIT_MS, Publication};
use sm_control::timings::Phase;
use sm_guest_proto::forward::MAX_WAIT_MS;

use super::HealthOptions;
use crate::network::NetworkOptions;
use crate::sm::Sm;
use crate::volumes::{Mount, MountPlan, VolumesOf, plan};
use crate::workload::Overrides;
use crate::{Error, OptionError};

/// Minimum of guest memory in bytes.
pub const MIN_MEMORY: u64 = 64 << 20;
/// Default guest memory in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Default number of vCPUs.
pub const DEFAULT_CPUS: u32 = 1;
/// Default time between stop signal and SIGKILL.
pub(crate) const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(10);
const MEBIBYTE: u64 = 1 << 20;

/// Storage for changes to the root file system of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RootStorage {
    /// A sparse disk in the VM's record. It stays when the VM ends, until the VM is removed.
    Disk {
        /// Its capacity in bytes, a multiple of 4096 from [`MIN_ROOT_DISK`] to
        /// [`MAX_ROOT_DISK`]. Only what is written takes space on the host.
        bytes: u64,
    },
    /// Guest memory. Changes are lost when the VM ends.
    Memory {
        /// Limit in bytes; absent for half of guest memory.
        limit: Option<u64>,
    },
}

/// Capacity of the default disk for changes to a root, in bytes.
pub(super) const DEFAULT_ROOT_DISK: u64 = 64 << 30;
/// Smallest disk for changes to a root, in bytes.
pub const MIN_ROOT_DISK: u64 = 64 << 20;
/// Largest disk for changes to a root, in bytes.
pub const MAX_ROOT_DISK: u64 = 8 << 40;

impl Default for RootStorage {
    /// A disk of 64 GiB.
    fn default() -> Self {
        Self::Disk {
            bytes: DEFAULT_ROOT_DISK,
        }
    }
}

/// Options for starting a VM.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunOptions {
    pub(crate) overrides: Overrides,
    pub(crate) name: Option<String>,
    pub(crate) memory: Option<u64>,
    pub(crate) cpus: Option<u32>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) auto_remove: bool,
    pub(crate) read_only: bool,
    pub(crate) attach: bool,
    pub(super) terminal_size: (u16, u16),
    pub(crate) root: Option<RootStorage>,
    pub(crate) shm_size: Option<u64>,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) volumes_of: Vec<VolumesOf>,
    /// See [`MountPlan::in_root`].
    volumes_in_root: Vec<String>,
    pub(crate) network: NetworkOptions,
    pub(crate) stop_timeout: Option<Duration>,
    pub(super) start_timeout: Duration,
    pub(crate) cmdline: String,
    pub(crate) cold: bool,
    pub(super) paging: Paging,
    pub(super) phases: Vec<Phase>,
    pub(crate) publish: Vec<Publication>,
    pub(super) publish_wait: Duration,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) restart: RestartPolicy,
    pub(super) expire: Option<Duration>,
    pub(super) health: HealthOptions,
    pub(crate) share_binds: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            overrides: Overrides::default(),
            name: None,
            memory: None,
            cpus: None,
            kernel: None,
            auto_remove: false,
            read_only: false,
            attach: false,
            terminal_size: (80, 24),
            root: None,
            shm_size: None,
            mounts: Vec::new(),
            volumes_of: Vec::new(),
            volumes_in_root: Vec::new(),
            network: NetworkOptions::default(),
            stop_timeout: None,
            start_timeout: Duration::from_secs(120),
            cmdline: String::new(),
            cold: false,
            paging: Paging::Map,
            phases: Vec::new(),
            publish: Vec::new(),
            publish_wait: Duration::from_millis(u64::from(DEFAULT_WAIT_MS)),
            labels: BTreeMap::new(),
            restart: RestartPolicy::No,
            expire: None,
            health: HealthOptions::default(),
            share_binds: false,
        }
    }
}

impl RunOptions {
    /// Returns the defaults: the image's configuration, 512 MiB and one vCPU.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets overrides of the image's configuration.
    #[must_use]
    pub fn overrides(mut self, overrides: Overrides) -> Self {
        self.overrides = overrides;
        self
    }

    /// Sets the arguments that replace the image's `Cmd`.
    #[must_use]
    pub fn command<I, S>(mut self, command: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.overrides.command = command.into_iter().map(Into::into).collect();
        self
    }

    /// Adds a `NAME=value` entry to the environment.
    #[must_use]
    pub fn env(mut self, entry: impl Into<String>) -> Self {
        self.overrides.env.push(entry.into());
        self
    }

    /// Names the VM; the default is a generated name.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the guest memory in bytes, at least [`MIN_MEMORY`]; rounded up to a MiB.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Sets the number of vCPUs, at least 1.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = Some(cpus);
        self
    }

    /// Sets the kernel to boot; see [`crate::kernel::Kernels::current`] for the default.
    #[must_use]
    pub fn kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.kernel = Some(path.into());
        self
    }

    /// Sets words to append to the guest kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, words: impl Into<String>) -> Self {
        self.cmdline = words.into();
        self
    }

    /// Boots a kernel even where a snapshot could be restored, and takes no snapshot.
    #[must_use]
    pub fn cold(mut self, cold: bool) -> Self {
        self.cold = cold;
        self
    }

    /// Removes the VM's record and logs when it ends.
    #[must_use]
    pub fn auto_remove(mut self, yes: bool) -> Self {
        self.auto_remove = yes;
        self
    }

    /// Mounts the image read-only, without a writable layer.
    #[must_use]
    pub fn read_only(mut self, yes: bool) -> Self {
        self.read_only = yes;
        self
    }

    /// Stays attached: [`crate::Vm::take_session`] returns the workload's session,
    /// with all output.
    #[must_use]
    pub fn attach(mut self, yes: bool) -> Self {
        self.attach = yes;
        self
    }

    /// Sets columns and rows, for a workload on a terminal.
    #[must_use]
    pub fn terminal_size(mut self, columns: u16, rows: u16) -> Self {
        self.terminal_size = (columns, rows);
        self
    }

    /// Sets the storage for changes to the root; the default is [`RootStorage::default`].
    #[must_use]
    pub fn root(mut self, storage: RootStorage) -> Self {
        self.root = Some(storage);
        self
    }

    /// Sets the size of `/dev/shm` in bytes; the default is 64 MiB.
    #[must_use]
    pub fn shm_size(mut self, bytes: u64) -> Self {
        self.shm_size = Some(bytes);
        self
    }

    /// Mounts a volume, a path of the host or a tmpfs.
    #[must_use]
    pub fn mount(mut self, mount: Mount) -> Self {
        self.mounts.push(mount);
        self
    }

    /// Mounts the volumes and directories of the host that another VM mounts, at the same
    /// targets; with `read_only`, so that the workload cannot write to them. Mounts of
    /// [`Self::mount`] take the place of those with the same target.
    #[must_use]
    pub fn volumes_from(mut self, vm: impl Into<String>, read_only: bool) -> Self {
        let vm = vm.into();
        self.volumes_of.push(VolumesOf { vm, read_only });
        self
    }

    /// Permits several clones of [`Vm::fork`](crate::Vm::fork) to write to one directory of the
    /// host.
    #[must_use]
    pub fn share_binds(mut self, yes: bool) -> Self {
        self.share_binds = yes;
        self
    }

    /// Sets the network; the default is [`NetworkOptions::default`].
    #[must_use]
    pub fn network(mut self, network: NetworkOptions) -> Self {
        self.network = network;
        self
    }

    /// Sets the time between stop signal and SIGKILL.
    #[must_use]
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = Some(timeout);
        self
    }

    /// Sets the time limit for guest and agent until the workload runs.
    #[must_use]
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Sets phases that are already complete, for a common list of all phases.
    #[must_use]
    pub fn phases(mut self, phases: Vec<Phase>) -> Self {
        self.phases = phases;
        self
    }

    /// Sets the way in which memory is restored from a snapshot.
    #[must_use]
    pub fn paging(mut self, paging: Paging) -> Self {
        self.paging = paging;
        self
    }

    /// Publishes a port of the guest on the host.
    #[must_use]
    pub fn publish(mut self, publication: Publication) -> Self {
        self.publish.push(publication);
        self
    }

    /// Sets how long a connection to a published port waits for a listener in the guest,
    /// at most 10 minutes; the default is 1 s. With a longer time, clients can connect
    /// before a slow server listens; with 0, a client without a server is disconnected at
    /// once.
    #[must_use]
    pub fn publish_wait(mut self, wait: Duration) -> Self {
        self.publish_wait = wait;
        self
    }

    /// Adds a label, by which callers find and describe their VMs.
    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(name.into(), value.into());
        self
    }

    /// Sets the condition under which the VM is started again after its end; the default
    /// is never. The VM's process waits 100 ms before the first restart and twice as long
    /// before each further one, up to a minute; after a run of 10 s or more, 100 ms again.
    #[must_use]
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.restart = policy;
        self
    }

    /// Stops the VM when its workload has run for this time.
    #[must_use]
    pub fn expire(mut self, after: Duration) -> Self {
        self.expire = Some(after);
        self
    }

    /// Sets changes of the image's, or the snapshot's, health check.
    #[must_use]
    pub fn health(mut self, health: HealthOptions) -> Self {
        self.health = health;
        self
    }

    /// Returns the options with all mounts of a VM whose image declares these volumes.
    pub(super) fn with_all_mounts(mut self, sm: &Sm, declared: &[String]) -> Result<Self, Error> {
        let others = std::mem::take(&mut self.volumes_of);
        let MountPlan { mounts, in_root } =
            plan(sm, &self.mounts, &others, declared, self.auto_remove)?;
        self.mounts = mounts;
        self.volumes_in_root = in_root;
        Ok(self)
    }

    /// Applies the options that apply to clones of snapshots as well.
    pub(crate) fn apply_to(&self, config: &mut VmConfig) {
        config.auto_remove = self.auto_remove;
        config.publish.clone_from(&self.publish);
        config.publish_wait = self.clamped_publish_wait();
        config.labels.clone_from(&self.labels);
        config.restart = self.restart;
        config.expire = self.expire;
        config.health = self.health.applied_to(config.health.take());
        config.network = self.network.applied_to(&config.network);
    }

    /// Returns the settings of starts with these options.
    pub(crate) fn settings(&self, source: SettingsSourceV1) -> StartSettingsV1 {
        let (root_disk, upper_size) = self.root_sizes();
        StartSettingsV1 {
            source,
            cmdline: self.cmdline.clone(),
            paging: self.paging,
            root_disk,
            upper_size,
            shm_size: self.shm_size,
            mounts: self.mounts.iter().map(Mount::stored).collect(),
            volumes_in_root: self.volumes_in_root.clone(),
            start_timeout_ms: super::millis(self.start_timeout),
        }
    }

    /// Returns the time to wait for a listener, limited to what the protocol permits.
    pub(crate) fn clamped_publish_wait(&self) -> Duration {
        let longest = Duration::from_millis(u64::from(MAX_WAIT_MS));
        self.publish_wait.min(longest)
    }

    /// Returns the requested guest memory in bytes, in whole MiB; `None` if not set.
    pub(crate) fn memory_given(&self) -> Option<u64> {
        let mebibytes = self.memory.map(|bytes| bytes.div_ceil(MEBIBYTE));
        mebibytes.map(|count| count.saturating_mul(MEBIBYTE))
    }

    /// Returns the capacity of the disk for changes to the root, and the limit of changes in
    /// guest memory, as a launch request has them.
    pub(super) fn root_sizes(&self) -> (Option<u64>, Option<u64>) {
        match self.root.unwrap_or_default() {
            _ if self.read_only => (None, None),
            RootStorage::Disk { bytes } => (Some(bytes), None),
            RootStorage::Memory { limit } => (None, limit),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.auto_remove && self.restart != RestartPolicy::No {
            return Err(OptionError::RestartOfRemoved.into());
        }
        if let Some(memory) = self.memory.filter(|memory| *memory < MIN_MEMORY) {
            let minimum = MIN_MEMORY;
            return Err(OptionError::Memory {
                bytes: memory,
                minimum,
            }
            .into());
        }
        self.network.check()?;
        if self.cpus == Some(0) {
            return Err(OptionError::Cpus.into());
        }
        if let Some(RootStorage::Disk { bytes }) = self.root
            && !(bytes.is_multiple_of(4096) && (MIN_ROOT_DISK..=MAX_ROOT_DISK).contains(&bytes))
        {
            return Err(OptionError::RootDisk {
                bytes,
                minimum: MIN_ROOT_DISK,
                maximum: MAX_ROOT_DISK,
            }
            .into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_cpus_have_a_minimum() {
        let error = RunOptions::new().memory(1 << 20).check().unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("1 MiB of memory") && text.contains("64 MiB"),
            "{text}"
        );
        assert!(RunOptions::new().cpus(0).check().is_err());
        assert!(RunOptions::new().memory(MIN_MEMORY).check().is_ok());
    }
}
