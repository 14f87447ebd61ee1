//! Snapshots of running VMs, and clones of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use sm_control::config::SettingsSourceV1;
use sm_control::id::{VmId, hex, random};
use sm_control::launch::{SnapshotReport, StartSource};
use sm_control::workload::Overrides;
use sm_snapshot::chain::Chain;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;
use sm_vmm::saved::{self, SavedShare};

use super::check_user_name;
use crate::image::Image;
use crate::record::{Records, VmConfig};
use crate::run::{self, RunOptions};
use crate::sm::Sm;
use crate::vm::{AfterSnapshot, Force, Lifetime, Vm};
use crate::volumes::{Mount, continued};
use crate::{Error, FixedOption, OptionError, Refusal};

/// A workload snapshot; see [`Sm::snapshot`]. While this value lives, the snapshot cannot
/// be removed.
#[derive(Debug)]
pub struct Snapshot {
    sm: Sm,
    chain: Chain,
    config: VmConfig,
    shares: Vec<SavedShare>,
}

impl Sm {
    /// Opens a workload snapshot.
    ///
    /// # Errors
    /// The snapshot does not exist, is damaged, or holds no workload.
    pub fn snapshot(&self, name: &str) -> Result<Snapshot, Error> {
        Snapshot::open(self, name)
    }
}

impl Snapshot {
    fn open(sm: &Sm, name: &str) -> Result<Self, Error> {
        let store = SnapshotStore::read_only(&sm.home().snapshots());
        let chain = Chain::open(&store, name)?;
        let holds = match chain.tip().lease.manifest().layer {
            Layer::Base => "a kernel and an agent only",
            Layer::Image => "an image only",
            Layer::App => "no workload",
        };
        let content = saved::content(&chain)?;
        let Some(config) = content.config else {
            let name = name.to_owned();
            return Err(Refusal::NoWorkload { name, holds }.into());
        };
        Ok(Self {
            sm: sm.clone(),
            chain,
            config: config.into(),
            shares: content.shares,
        })
    }

    /// Returns its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.chain.tip().lease.name()
    }

    /// Returns the configuration of the VM of which it was taken.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Returns the directories and files of the host that the workload has mounted. To
    /// continue it takes a [`Mount::host`](crate::volumes::Mount::host) for each, with the same target
    /// and any source: a snapshot is no right to files of the host.
    #[must_use]
    pub fn shares(&self) -> &[SavedShare] {
        &self.shares
    }

    /// Starts a VM that continues the workload, and returns once it runs. Of the options,
    /// name, host name, published ports, network, attachment, timeouts, paging, removal and
    /// mounts of the host apply ([`Self::shares`]); the rest is as in the snapshot.
    ///
    /// # Errors
    /// See [`Error`]; among them an option that cannot be changed in a snapshot.
    pub fn run(&self, options: &RunOptions) -> Result<Vm, Error> {
        let records = Records::open(self.sm.home())?;
        records.sweep()?;
        self.run_in(&records, options)
    }

    /// Creates a VM that continues the workload when [`Vm::start`] starts it. The snapshot
    /// can be removed before; the VM cannot be started then.
    ///
    /// # Errors
    /// As for [`Self::run`], as far as they concern the options.
    pub fn create(&self, options: &RunOptions) -> Result<Vm, Error> {
        self.check(options)?;
        let source = SettingsSourceV1::Snapshot(self.name().to_owned());
        let config = |id, name| Ok(self.config_of_clone(options, id, name));
        run::create_idle(&self.sm, options, source, config)
    }

    /// Like [`Self::run`], for a caller that has already swept the records.
    fn run_in(&self, records: &Records, options: &RunOptions) -> Result<Vm, Error> {
        self.check(options)?;
        let source = StartSource::Snapshot(self.name().to_owned());
        let config = |id, name| Ok(self.config_of_clone(options, id, name));
        run::launch_in(&self.sm, records, options, config, source)?.until_started(options.attach)
    }

    fn check(&self, options: &RunOptions) -> Result<(), Error> {
        check(&self.config, options)?;
        continued::check(&self.shares, &options.mounts)
    }

    fn config_of_clone(&self, options: &RunOptions, id: VmId, name: String) -> VmConfig {
        let mut config = self.config.clone();
        let hostname = options.overrides.hostname.as_deref();
        config.workload.hostname = hostname.unwrap_or(id.short()).to_owned();
        config.id = id;
        config.name = name;
        config.created = SystemTime::now();
        config.stop_timeout = stop_timeout(&self.config, options);
        options.apply_to(&mut config);
        config
    }
}

/// Returns the time between stop signal and SIGKILL of a clone: the option, or that of
/// the snapshot.
fn stop_timeout(made_of: &VmConfig, options: &RunOptions) -> Duration {
    options.stop_timeout.unwrap_or(made_of.stop_timeout)
}

/// Refuses options that cannot be changed in a running machine. Options with the current
/// value are accepted; an option with the default value counts as set.
fn check(made_of: &VmConfig, options: &RunOptions) -> Result<(), Error> {
    let fixed = |option| Err(OptionError::Fixed(option).into());
    options.check()?;
    let mut overrides = options.overrides.clone();
    overrides.hostname = None;
    if overrides != Overrides::default() {
        return fixed(FixedOption::Workload);
    }
    if options
        .memory_given()
        .is_some_and(|m| m != made_of.memory_bytes)
    {
        return fixed(FixedOption::Memory);
    }
    if options.cpus.is_some_and(|cpus| cpus != made_of.cpus) {
        return fixed(FixedOption::Cpus);
    }
    if options.kernel.is_some() || !options.cmdline.is_empty() || options.cold {
        return fixed(FixedOption::Kernel);
    }
    if options.read_only || options.root.is_some() {
        return fixed(FixedOption::Root);
    }
    if !options.volumes_of.is_empty() {
        return fixed(FixedOption::Mounts);
    }
    // The snapshot does not contain the current value.
    if options.shm_size.is_some() {
        return fixed(FixedOption::ShmSize);
    }
    Ok(())
}

impl Vm {
    /// Takes a workload snapshot of the running VM, under a new name. Returns when the
    /// snapshot is on disk.
    ///
    /// # Errors
    /// The name is invalid or in use, the workload does not run, or the disk is full; the
    /// VM continues in these cases.
    pub fn snapshot(&self, name: &str, then: AfterSnapshot) -> Result<SnapshotReport, Error> {
        check_user_name(name)?;
        Ok(self
            .create_snapshot(name, then, Lifetime::Permanent)?
            .report)
    }

    /// Starts `count` clones of the running VM, which continues, and returns them when
    /// their workloads run. They share memory until they modify it. `options` are as for
    /// [`Snapshot::run`]; a number is appended to the name of each clone. Without mounts in
    /// the options, the clones have those of the host that this VM has; only with
    /// [`RunOptions::share_binds`] do several write to one directory.
    ///
    /// When a clone cannot be started, no further ones are; running clones are returned
    /// together with the error.
    ///
    /// # Errors
    /// The VM cannot be captured, or several clones would write to a directory of the host: no
    /// clone was started.
    pub fn fork(&self, count: usize, options: &RunOptions) -> Result<Forked, Error> {
        fork(self, count, options)
    }
}

/// The clones that [`Vm::fork`] has started.
#[derive(Debug)]
#[non_exhaustive]
pub struct Forked {
    /// Clones with a running workload.
    pub vms: Vec<Vm>,
    /// The cause, if there are fewer than requested.
    pub error: Option<Error>,
    /// Sentences about parts of the VM that the clones cannot have.
    pub warnings: Vec<String>,
}

/// Number of clones that are started concurrently.
const MAX_CONCURRENT: usize = 4;

fn fork(vm: &Vm, count: usize, options: &RunOptions) -> Result<Forked, Error> {
    let sm = vm.sm();
    let mut options = options.clone();
    let settings = vm.record().start_settings();
    let has_own = options.mounts.is_empty();
    if !options.share_binds {
        let given: Vec<_> = options.mounts.iter().map(Mount::stored).collect();
        let own = settings.map_or(&[][..], |settings| &settings.mounts);
        continued::check_writers(count, if has_own { own } else { &given })?;
    }
    let name = format!("fork-{}-{}", vm.id().short(), hex(&random::<4>()));
    let records = Records::open(sm.home())?;
    records.sweep()?;
    // `captured` prevents the removal of the snapshot until it is opened here.
    let captured = vm.create_snapshot(&name, AfterSnapshot::Continue, Lifetime::LastUser)?;
    let snapshot = Snapshot::open(sm, &name)?;
    if has_own {
        options.mounts = continued::of_vm(settings, &snapshot.shares);
    }
    let warnings = captured.report.warnings.clone();
    drop(captured);
    let (vms, error) = start_all(count, |number| {
        let mut options = options.clone();
        if let Some(name) = &mut options.name {
            *name = format!("{name}-{number}");
        }
        snapshot.run_in(&records, &options)
    });
    drop(snapshot);
    // The last clone to exit removes the snapshot; removal is refused before. A snapshot
    // that is left over is removed when another VM exits.
    let removed = SnapshotStore::open(&sm.home().snapshots()).and_then(|store| store.remove(&name));
    if let Err(error) = removed {
        tracing::debug!(%error, name, "the snapshot of a fork stays");
    }
    Ok(Forked {
        vms,
        error,
        warnings,
    })
}

/// Starts numbers 1 to `count`, some concurrently, until one fails. Returns the started
/// ones, in this order, and the first error.
fn start_all<T: Send>(
    count: usize,
    start: impl Fn(usize) -> Result<T, Error> + Sync,
) -> (Vec<T>, Option<Error>) {
    let next = AtomicUsize::new(1);
    let results = Mutex::new((Vec::new(), None));
    // No code panics while it holds this lock.
    let lock = || results.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        for _ in 0..count.min(MAX_CONCURRENT) {
            scope.spawn(|| {
                while lock().1.is_none() {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number > count {
                        return;
                    }
                    let started = start(number);
                    let mut results = lock();
                    match started {
                        Ok(value) => results.0.push((number, value)),
                        Err(error) => drop(results.1.get_or_insert(error)),
                    }
                }
            });
        }
    });
    let (mut started, error) = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    started.sort_by_key(|(number, _)| *number);
    (started.into_iter().map(|(_, value)| value).collect(), error)
}

impl Image {
    /// Runs the image, calls `prepare` to bring its workload to the state for clones (by
    /// exec, through a frontend, by waiting for its output), and takes the snapshot `name`.
    /// The VM is removed afterwards, on errors as well.
    ///
    /// # Errors
    /// The VM cannot be started or captured, or `prepare` failed.
    pub fn warm_up<T>(
        &self,
        options: RunOptions,
        name: &str,
        prepare: impl FnOnce(&mut Vm) -> Result<T, Error>,
    ) -> Result<(Snapshot, T), Error> {
        check_user_name(name)?;
        let mut vm = self.run(options.auto_remove(true))?;
        let prepared = prepare(&mut vm).and_then(|value| {
            vm.snapshot(name, AfterSnapshot::End)?;
            Ok(value)
        });
        match prepared {
            Ok(value) => Ok((Snapshot::open(self.sm(), name)?, value)),
            Err(error) => {
                let _ = vm.remove(Force::Yes);
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_of() -> VmConfig {
        let mut config = VmConfig::new(sm_control::id::VmId::generate(), "made");
        config.memory_bytes = 1 << 30;
        config.cpus = 4;
        config.stop_timeout = Duration::from_secs(3);
        config
    }

    #[test]
    fn an_option_that_equals_a_default_is_an_option() {
        let refused = |options: RunOptions| check(&made_of(), &options).is_err();
        assert!(!refused(RunOptions::new()));
        assert!(!refused(RunOptions::new().memory(1 << 30).cpus(4)));
        assert!(refused(RunOptions::new().memory(run::DEFAULT_MEMORY)));
        assert!(refused(RunOptions::new().cpus(run::DEFAULT_CPUS)));
        assert!(refused(RunOptions::new().shm_size(64 << 20)));
        assert!(refused(RunOptions::new().root(run::RootStorage::default())));
        let timeout = |options: RunOptions| stop_timeout(&made_of(), &options);
        assert_eq!(timeout(RunOptions::new()), Duration::from_secs(3));
        let default = Duration::from_secs(10);
        assert_eq!(timeout(RunOptions::new().stop_timeout(default)), default);
    }

    #[test]
    fn clones_started_before_an_error_are_returned_with_it() {
        let (started, error) = start_all(10, Ok);
        assert_eq!(started, (1..=10).collect::<Vec<_>>());
        assert!(error.is_none());
        let (started, error) = start_all(100, |number| match number {
            6 => Err(Refusal::Vm("no sixth".to_owned()).into()),
            number => Ok(number),
        });
        assert_eq!(started[..5], [1, 2, 3, 4, 5]);
        assert!(started.len() < 99, "{started:?}");
        assert_eq!(error.unwrap().to_string(), "no sixth");
        assert!(start_all(0, Ok).0.is_empty());
    }
}
