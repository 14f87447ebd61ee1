//! From a running VM to a snapshot, and from there to clones.

use sm_snapshot::chain::Chain;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;

use super::check_user_name;
use crate::Error;
use crate::home::Home;
use crate::id::{hex, random};
use crate::image::Image;
use crate::launch::{Origin, SnapshotReport};
use crate::output_log::unix_nanos;
use crate::record::VmConfig;
use crate::run::{self, RunOptions, Source};
use crate::vm::Vm;
use crate::vmm::saved::{self, Content};
use crate::workload::Overrides;

/// A snapshot of a running workload. While this value lives, the snapshot
/// cannot be removed.
#[derive(Debug)]
pub struct Snapshot {
    home: Home,
    chain: Chain,
    config: VmConfig,
    content: Content,
}

impl Snapshot {
    /// Opens the snapshot `name`.
    ///
    /// # Errors
    /// It does not exist, is damaged, or holds no workload.
    pub fn open(home: &Home, name: &str) -> Result<Self, Error> {
        let chain = Chain::open(&SnapshotStore::read_only(&home.snapshots()), name)?;
        let holds = match chain.tip().lease.manifest().layer {
            Layer::Base => "a kernel and an agent only",
            Layer::Image => "an image only",
            Layer::App => "no workload",
        };
        let mut content = saved::content(&chain)?;
        let Some(config) = content.config.take() else {
            return Err(Error::Option(format!(
                "snapshot \"{name}\" holds {holds}, so there is nothing to go on with: \
                 run an image, which uses it by itself, or make a snapshot of a running VM"
            )));
        };
        Ok(Self {
            home: home.clone(),
            chain,
            config,
            content,
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.chain.tip().lease.name()
    }

    /// The VM that it was made of.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Starts a VM in which the workload goes on where it was, and returns
    /// once it does. Of the options, name, host name, published ports, attachment,
    /// timeouts, paging and removal count; the rest is as it was.
    ///
    /// # Errors
    /// See [`Error`]; among them an option that cannot be changed any more.
    pub fn run(&self, options: &RunOptions) -> Result<Vm, Error> {
        check(&self.config, options)?;
        let source = Source {
            origin: Origin::Snapshot(self.name().to_owned()),
            root: self.content.root.clone(),
            modules: None,
        };
        let config = |id: crate::id::VmId, name| {
            let mut workload = self.config.workload.clone();
            let hostname = options.overrides.hostname.as_deref();
            workload.hostname = hostname.unwrap_or(id.short()).to_owned();
            Ok(VmConfig {
                id,
                name,
                created_ns: unix_nanos(),
                workload,
                auto_remove: options.auto_remove,
                stop_timeout_ms: stop_timeout_ms(&self.config, options),
                publish: options.publish.clone(),
                publish_wait_ms: options.publish_wait_ms(),
                ..self.config.clone()
            })
        };
        run::launch(&self.home, options, config, source)?.until_started(options.attach)
    }
}

/// The time between stop signal and SIGKILL of a VM that goes on from a snapshot: as
/// asked for, else as it was.
fn stop_timeout_ms(made_of: &VmConfig, options: &RunOptions) -> u64 {
    let given = options.stop_timeout.map(run::millis);
    given.unwrap_or(made_of.stop_timeout_ms)
}

/// Refuses what a machine that runs already cannot be given. An option that asks for
/// what is so is none of that; one that is a VM's default may be.
fn check(made_of: &VmConfig, options: &RunOptions) -> Result<(), Error> {
    let fixed = |what: &str| {
        Err(Error::Option(format!(
            "{what} of a snapshot's VM cannot be changed: leave it out"
        )))
    };
    let given = &options.overrides;
    if *given
        != (Overrides {
            hostname: given.hostname.clone(),
            ..Overrides::default()
        })
    {
        return fixed("the command, its environment, user, directory and streams");
    }
    if options.memory_given().is_some_and(|m| m != made_of.memory) {
        return fixed("the memory");
    }
    if options.cpus.is_some_and(|cpus| cpus != made_of.cpus) {
        return fixed("the number of CPUs");
    }
    if options.kernel.is_some() || !options.cmdline.is_empty() || options.cold {
        return fixed("the kernel");
    }
    if options.read_only || options.upper_size.is_some() {
        return fixed("the root file system");
    }
    // A snapshot does not say what it has.
    if options.shm_size.is_some() {
        return fixed("the size of /dev/shm");
    }
    if !options.extra_hosts.is_empty() {
        return fixed("the list of hosts");
    }
    if !options.nameservers.is_empty() {
        return fixed("the list of name servers");
    }
    Ok(())
}

impl Vm {
    /// Makes a snapshot of the VM with its workload as it runs, under a name that
    /// no other has, and ends the VM if `stop` is set. Returns when the snapshot
    /// is on disk.
    ///
    /// # Errors
    /// The name cannot be used, the workload does not run, or the disk is full;
    /// the VM goes on then.
    pub fn snapshot(&self, name: &str, stop: bool) -> Result<SnapshotReport, Error> {
        check_user_name(name)?;
        Ok(self.make_snapshot(name, stop, false)?.report)
    }
}

/// Starts `count` clones of a running VM, which goes on, and returns them once
/// their workloads do. They share memory until they change it. `options` are as
/// for [`Snapshot::run`], with a name completed by a number for each clone.
///
/// # Errors
/// The VM cannot be captured, or a clone not be started: the clones started
/// before it go on.
pub fn fork(home: &Home, vm: &Vm, count: usize, options: &RunOptions) -> Result<Vec<Vm>, Error> {
    let name = format!("fork-{}-{}", vm.id().short(), hex(&random::<4>()));
    // Nobody else sweeps it before it is opened here.
    let held = vm.make_snapshot(&name, false, true)?;
    let snapshot = Snapshot::open(home, &name)?;
    drop(held);
    let started: Result<Vec<Vm>, Error> = (1..=count)
        .map(|number| {
            let mut options = options.clone();
            if let Some(name) = &mut options.name {
                *name = format!("{name}-{number}");
            }
            snapshot.run(&options)
        })
        .collect();
    drop(snapshot);
    // The last clone to end removes it; refused while one lives.
    let _ = SnapshotStore::open(&home.snapshots())?.remove(&name);
    started
}

/// Runs an image, has `prepare` bring its workload to where clones shall begin
/// (by exec, through a frontend, by waiting for its output), and makes the
/// snapshot `name` of it. The VM is gone afterwards, whatever happens.
///
/// # Errors
/// The VM cannot be started or captured, or `prepare` failed.
pub fn warm_up<T>(
    home: &Home,
    image: &Image,
    options: RunOptions,
    name: &str,
    prepare: impl FnOnce(&mut Vm) -> Result<T, Error>,
) -> Result<(Snapshot, T), Error> {
    check_user_name(name)?;
    let mut vm = image.run(options.auto_remove(true))?;
    let made = prepare(&mut vm).and_then(|value| {
        vm.snapshot(name, true)?;
        Ok(value)
    });
    match made {
        Ok(value) => Ok((Snapshot::open(home, name)?, value)),
        Err(error) => {
            let _ = vm.remove(true);
            Err(error)
        }
    }
}
