//! Starts the machine of a launch request on this host's hypervisor.

mod disks;
mod guest;
mod merging;
mod network;
mod shares;
mod threads;
mod writable;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sm_control::config::{LaunchConfig, NetworkMode};
use sm_control::id::random;
use sm_control::launch::{LaunchRequest, Paging, StartSource};
use sm_control::timings::{Phase, monotonic_ns};
use sm_control::with_causes;
use sm_devices_fs::{Fs, Watches};
use sm_devices_vsock::{MuxerHandle, Vsock, VsockConfig};
use sm_event_loop::EventLoop;
use sm_frontends::{ForwardTarget, FrontendHandle, UnixFrontend};
use sm_guest_proto::port;
use sm_hypervisor::{Hypervisor as _, Native};
use sm_snapshot::chain::Chain;
use sm_snapshot::cpu::CpuFeatures;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::userfault::Pager;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::exit::ExitLatch;
use sm_vmm_core::layout::{SLOT_BALLOON, SLOT_FS, SLOT_RNG, SLOT_ROOT_DISK, SLOT_VSOCK};
use sm_vmm_core::loader::{BASE_COMMAND_LINE, InitramfsPart};
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::MemoryConfig;
use sm_vmm_core::virtio::balloon::Balloon;
use sm_vmm_core::virtio::blk::{Access, Block};
use sm_vmm_core::virtio::disk::Disk;
use sm_vmm_core::virtio::rng::Rng;

use self::merging::Merging;
use self::network::Network;
pub use self::network::{MAX_MTU, MIN_MTU};
use self::threads::EndingThreads;
use self::writable::WritableDisk;
use super::cache;
use super::capturing::Capturing;
use super::descriptors::Descriptors;
use super::disks::DiskDirectory;
use super::environment::{Identity, InitramfsBuilder, VmRecord, VmmEnvironment};
use super::failure::StartFailure;
use super::guest::{EventSender, GuestMachine, SupervisorEvent};
use super::paging::{self, Paged};
use super::prefetch::Prefetch;
use super::saved::{Content, Plan, Saved, SavedShare};
use super::serving::{ListenerDeps, Published};
use super::source::{ResolvedSource, StartPlan};
use crate::names::EPHEMERAL_LABEL;

/// A running machine with its devices and frontends.
pub(crate) struct RunningMachine {
    // Fields are dropped in this order: the vCPUs stop before their devices are dropped.
    machine: Machine<Native>,
    exit: Arc<ExitLatch>,
    muxer: MuxerHandle,
    /// The root disk, and the image to insert after the base snapshot was captured.
    root: Arc<Mutex<Block>>,
    image: Option<Disk>,
    balloon: Arc<Mutex<Balloon>>,
    /// The disk for changes to the root, then those of volumes.
    disks: Vec<WritableDisk>,
    /// The layer of the snapshot that was restored, if any.
    restored: Option<Layer>,
    start_timeout: Duration,
    /// The device of shared directories, and the description of these for snapshots.
    fs: Arc<Mutex<Fs>>,
    shares: Vec<SavedShare>,
    watches: Option<Arc<Watches>>,
    /// The configuration of the request.
    config: LaunchConfig,
    /// The description for snapshots, besides memory and state.
    content: Content,
    identity: Identity,
    store: SnapshotStore,
    /// Snapshots to create before the workload starts.
    base_plan: Option<Plan>,
    image_plan: Option<Plan>,
    prefetch: Option<Prefetch>,
    /// Fills memory on access, as long as the machine and its readers live.
    pager: Option<Pager>,
    events: EventSender,
    /// The capture for which the machine is paused.
    capturing: Option<Capturing>,
    /// The merge of layers of a disk.
    merging: Option<Merging>,
    /// Threads that publish snapshots, and of merges that have ended.
    publishing: EndingThreads,
    exec: FrontendHandle,
    published: Published,
    _event_loop: EventLoop,
    network: Network,
    /// The snapshot with the mapped pages.
    source: Option<SourceSnapshot>,
}

impl Drop for RunningMachine {
    fn drop(&mut self) {
        self.capturing = None;
        self.cancel_merge();
        self.publishing = EndingThreads::default();
        cache::trim(&self.store);
    }
}

/// Prevents the removal of the snapshot from which a machine was restored, and finally
/// removes it if it is ephemeral and not in use any more, or if it is corrupt.
struct SourceSnapshot {
    store: SnapshotStore,
    chain: Option<Arc<Chain>>,
    /// True for an automatic snapshot.
    automatic: bool,
    /// True if a machine restored from it did not start.
    corrupt: bool,
}

impl SourceSnapshot {
    fn new(chain: Chain, store: SnapshotStore, automatic: bool) -> Self {
        Self {
            store,
            chain: Some(Arc::new(chain)),
            automatic,
            corrupt: false,
        }
    }

    fn name(&self) -> Option<String> {
        let chain = self.chain.as_ref()?;
        Some(chain.tip().lease.name().to_owned())
    }
}

impl Drop for SourceSnapshot {
    fn drop(&mut self) {
        let Some(name) = self.name() else { return };
        let ephemeral = self.chain.take().is_some_and(|chain| {
            let manifest = chain.tip().lease.manifest();
            manifest.labels.contains_key(EPHEMERAL_LABEL)
        });
        if self.corrupt {
            cache::discard(&self.store, &name);
        } else if ephemeral {
            // The store refuses while another clone lives: the last clone removes it.
            let _ = self.store.remove(&name);
        }
    }
}

/// Returns a conversion of the error of a step to a sentence.
fn failed<E: std::error::Error>(what: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("cannot {what}: {}", with_causes(&error))
}

/// A machine that was started.
pub(crate) struct StartedMachine {
    pub(crate) machine: RunningMachine,
    /// Phases that are complete.
    pub(crate) phases: Vec<Phase>,
    /// Warnings for the person who started the VM; sentences.
    pub(crate) warnings: Vec<String>,
}

/// Boots or restores the machine. A cached snapshot that cannot be restored is removed,
/// and the next best source is used.
///
/// # Errors
/// A sentence for the person who started the VM.
pub(crate) fn start(
    host: &Native,
    environment: &dyn VmmEnvironment,
    request: &LaunchRequest,
    record: &dyn VmRecord,
    console: &File,
    events: &EventSender,
) -> Result<StartedMachine, StartFailure> {
    let features = host
        .guest_features()
        .map_err(failed("ask what processor guests get"))?;
    let cpu = CpuFeatures::of(&features.cpuid);
    let mut warnings = Vec::new();
    let mut request = request.clone();
    let changes = DiskDirectory::of_root(record.directory());
    let has_changes = changes.exists().map_err(failed("find the VM's disk"))?;
    loop {
        let plan = StartPlan::of(&request, &cpu, environment, has_changes)?;
        if !has_changes {
            // An earlier attempt may have left one.
            changes.remove().map_err(failed("remove the VM's disk"))?;
        }
        let automatic = plan.automatic();
        let parts = LaunchParts {
            host: host.clone(),
            devices: Vec::new(),
            console: console
                .try_clone()
                .map_err(failed("duplicate the console's descriptor"))?,
            phases: Vec::new(),
            paging: request.paging,
            prefetch: None,
            pager: None,
        };
        match begin(environment, &request, record, events, plan, parts) {
            Ok((machine, phases)) => {
                return Ok(StartedMachine {
                    machine,
                    phases,
                    warnings,
                });
            }
            Err(failure) => match automatic {
                Some((store, name)) if failure.corrupt => {
                    tracing::warn!(
                        name,
                        error = failure.message,
                        "a snapshot cannot be restored"
                    );
                    warnings.push(format!(
                        "snapshot \"{name}\" was created by sm, and {}: continuing without it",
                        failure.message
                    ));
                    if !cache::discard(&store, &name)
                        && let StartSource::Image(image) = &mut request.source
                    {
                        image.cold = true;
                    }
                }
                _ => {
                    let message = match &request.source {
                        StartSource::Snapshot(name) | StartSource::IdentityReport(name)
                            if failure.corrupt =>
                        {
                            format!(
                                "snapshot \"{name}\" cannot be used here: {}",
                                failure.message
                            )
                        }
                        _ => failure.message,
                    };
                    return Err(StartFailure { message, ..failure });
                }
            },
        }
    }
}

fn begin(
    environment: &dyn VmmEnvironment,
    request: &LaunchRequest,
    record: &dyn VmRecord,
    events: &EventSender,
    plan: StartPlan,
    mut parts: LaunchParts,
) -> Result<(RunningMachine, Vec<Phase>), StartFailure> {
    let restored = plan.restored();
    if restored.is_some() {
        paging::disable_huge_pages();
    }
    let event_loop = EventLoop::spawn("sm-devices").map_err(failed("start the event loop"))?;
    let network = &request.config.network;
    let descriptors = Descriptors::of_this_process(
        request.config.publish.len(),
        shares::has_any(request),
        network.mode != NetworkMode::None,
    );
    let (network, network_device) = Network::start(
        network,
        descriptors.flows,
        record.directory(),
        restored == Some(Layer::App),
    )?;
    let config = VsockConfig::default().max_connections(descriptors.connections);
    let (vsock, muxer) = Vsock::new(config).map_err(failed("make the vsock device"))?;
    listen_for_agent(&muxer, events.clone());
    report_failure(&muxer, events.clone());
    let exec = UnixFrontend::new(&record.exec_socket(), ForwardTarget::Exec)
        .limit(&descriptors.exec)
        .start(muxer.clone(), &event_loop.handle())
        .map_err(failed("create the exec socket"))?;
    let published = Published::start(
        &request.config,
        record.directory(),
        ListenerDeps {
            muxer: &muxer,
            event_loop: &event_loop.handle(),
            limit: &descriptors.published,
        },
    )?;
    let root = disks::root(environment, &plan.content.root)?;
    // A disk that the guest already knows is present from the start; otherwise it is
    // inserted after the base snapshot was captured.
    let (disk, image) = match restored {
        Some(Layer::Image | Layer::App) => (root, None),
        _ => (Disk::empty(), Some(root)),
    };
    let root = Arc::new(Mutex::new(Block::new(disk, Access::ReadOnly, "root")));
    let mut disks = vec![disks::changes(request, record, &plan, events.clone())?];
    disks.extend(disks::volumes(request, record, &plan, events)?);
    let mounts = shares::mounts(request, record, &plan)?;
    let user = &request.config.workload.user;
    let watches = shares::watches(&mounts)?;
    let fs = shares::device(&mounts, user, descriptors.files, watches.clone())?;
    let fs = Arc::new(Mutex::new(fs));
    parts.devices = disks.iter().map(WritableDisk::device).collect();
    let balloon = Arc::new(Mutex::new(Balloon::new()));
    parts.devices.extend([
        DeviceConfig::new(SLOT_VSOCK, vsock),
        DeviceConfig::new(SLOT_ROOT_DISK, root.clone()),
        device(SLOT_RNG, Rng::new()),
        network_device,
        DeviceConfig::new(SLOT_BALLOON, balloon.clone()),
        DeviceConfig::new(SLOT_FS, fs.clone()),
    ]);
    let (mut machine, source) = match plan.source {
        ResolvedSource::Snapshot {
            store,
            saved,
            automatic,
        } => {
            let (machine, chain) = parts.restore(*saved, &event_loop)?;
            (machine, Some(SourceSnapshot::new(chain, store, automatic)))
        }
        ResolvedSource::Kernel { initramfs } => {
            (parts.boot(request, initramfs, &event_loop)?, None)
        }
    };
    lock(&balloon)
        .manage(machine.memory().clone())
        .map_err(failed("open the page map"))?;
    machine.resume().map_err(failed("start the vCPUs"))?;
    parts.phases.push(Phase::now("vCPUs started"));
    let exit = machine.exit_latch();
    let mut running = RunningMachine {
        machine,
        exit,
        muxer,
        root,
        image,
        balloon,
        disks,
        restored,
        start_timeout: Duration::from_millis(request.start_timeout_ms),
        fs,
        shares: shares::saved(&mounts),
        watches,
        config: request.config.clone(),
        content: plan.content,
        identity: plan.identity,
        store: plan.store,
        base_plan: plan.base_plan,
        image_plan: plan.image_plan,
        prefetch: parts.prefetch,
        pager: parts.pager,
        events: events.clone(),
        capturing: None,
        merging: None,
        publishing: EndingThreads::default(),
        exec,
        published,
        _event_loop: event_loop,
        network,
        source,
    };
    if restored.is_some() {
        // The agent of a snapshot has already made its connection and listens now, so the
        // host connects.
        let stream = running
            .connect(port::CONTROL)
            .map_err(failed("call the guest agent"))?;
        running.events.send(SupervisorEvent::Agent(stream));
    }
    Ok((running, parts.phases))
}

/// Common parameters of booting and restoring.
struct LaunchParts {
    host: Native,
    devices: Vec<DeviceConfig>,
    console: File,
    phases: Vec<Phase>,
    paging: Paging,
    prefetch: Option<Prefetch>,
    pager: Option<Pager>,
}

impl LaunchParts {
    fn console(&self) -> Result<File, String> {
        self.console
            .try_clone()
            .map_err(failed("duplicate the console's descriptor"))
    }

    fn boot(
        &mut self,
        request: &LaunchRequest,
        initramfs: InitramfsBuilder,
        event_loop: &EventLoop,
    ) -> Result<Machine<Native>, String> {
        // The check is skipped on a host on which a guest of the same kind has run.
        if let Some(refusal) = self.host.capabilities().linux.refusal() {
            return Err(refusal);
        }
        self.phases.push(Phase::now("hypervisor probed"));
        let path = &request.config.kernel;
        let kernel =
            File::open(path).map_err(|error| format!("cannot open kernel {path:?}: {error}"))?;
        let initramfs = initramfs().map_err(failed("make the initial RAM file system"))?;
        self.phases.push(Phase::now("files opened"));
        let mut cmdline = BASE_COMMAND_LINE.to_owned();
        if !request.cmdline.is_empty() {
            cmdline.push(' ');
            cmdline.push_str(&request.cmdline);
        }
        let config = MachineConfig {
            memory: MemoryConfig::new(request.config.memory),
            vcpus: request.config.cpus,
            kernel,
            initramfs: vec![InitramfsPart::Bytes(initramfs.into())],
            cmdline,
            generation_id: random::<16>(),
            console: self.console()?,
            devices: std::mem::take(&mut self.devices),
        };
        let machine = Machine::boot(&self.host, config, &event_loop.handle())
            .map_err(failed("make the virtual machine"))?;
        tracing::debug!(phases = ?machine.phases(), "machine made");
        self.phases.push(Phase::now("machine made"));
        Ok(machine)
    }

    fn restore(
        &mut self,
        saved: Saved,
        event_loop: &EventLoop,
    ) -> Result<(Machine<Native>, Chain), StartFailure> {
        let Saved { chain, state, .. } = saved;
        self.phases.push(Phase::now("snapshot opened"));
        let Paged {
            memory,
            prefetch,
            pager,
        } = Paged::new(&chain, self.paging)?;
        self.prefetch = prefetch;
        self.pager = pager;
        self.phases.push(Phase::now("memory mapped"));
        let console = self.console()?;
        let devices = std::mem::take(&mut self.devices);
        let started_ns = monotonic_ns();
        let machine = Machine::restore(
            &self.host,
            state,
            memory,
            devices,
            console,
            &event_loop.handle(),
        )
        .map_err(|error| StartFailure {
            message: format!("it cannot be restored: {}", with_causes(&error)),
            corrupt: true,
            cause: None,
        })?;
        // The new generation ID is set before the vCPUs run, so that the guest's kernel
        // sees it first.
        machine
            .set_generation_id(random::<16>())
            .map_err(failed("give the machine an identity"))?;
        let inner = machine.phases();
        let mut at_ns = started_ns;
        for (name, took) in [
            ("hypervisor objects", inner.hypervisor_objects),
            ("memory given to the hypervisor", inner.memory_map),
            ("devices made", inner.devices),
        ] {
            at_ns += u64::try_from(took.as_nanos()).unwrap_or(0);
            self.phases.push(Phase::at(name, at_ns));
        }
        self.phases.push(Phase::now("state restored"));
        Ok((machine, chain))
    }
}

/// Sends the stream that the agent opens when it is ready to the supervisor.
fn listen_for_agent(muxer: &MuxerHandle, events: EventSender) {
    let acceptor = move |_| match UnixStream::pair() {
        Ok((ours, theirs)) => {
            events.send(SupervisorEvent::Agent(ours));
            Some(OwnedFd::from(theirs).into())
        }
        Err(error) => {
            tracing::error!(%error, "no descriptors left for the agent's stream");
            None
        }
    };
    muxer.listen(port::CONTROL, Box::new(acceptor)).forever();
}

/// Reports a device failure to the supervisor, before the streams of the guest end.
fn report_failure(muxer: &MuxerHandle, events: EventSender) {
    let report = move |reason: &str| events.send(SupervisorEvent::Unreachable(reason.to_owned()));
    muxer.on_failure(Box::new(report));
}

fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device(slot: u32, device: impl sm_virtio::VirtioDevice + 'static) -> DeviceConfig {
    DeviceConfig::new(slot, Arc::new(Mutex::new(device)))
}
