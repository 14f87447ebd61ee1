//! The machine that a launch request describes, on this host's hypervisor.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use sm_devices_vsock::{ConnectOptions, MuxerHandle, Vsock, VsockConfig};
use sm_frontends::{Target, UnixFrontend, UnixFrontendHandle};
use sm_guest_proto::port;
use sm_hypervisor::kvm::Kvm;
use sm_hypervisor::{Hypervisor as _, LinuxSupport};
use sm_snapshot::chain::Chain;
use sm_snapshot::restore::map_memory;
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::event_loop::EventLoop;
use sm_vmm_core::exit::{ExitLatch, ExitReason};
use sm_vmm_core::layout::{SLOT_RNG, SLOT_ROOT_DISK, SLOT_VSOCK};
use sm_vmm_core::loader::{BASE_COMMAND_LINE, InitramfsPart};
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::MemoryConfig;
use sm_vmm_core::state::MachineState;
use sm_vmm_core::virtio::blk::{Access, Block};
use sm_vmm_core::virtio::disk::{Disk, Segment};
use sm_vmm_core::virtio::rng::Rng;

use super::base::Base;
use super::guest::{DialSender, Guest, GuestEnd};
use crate::doctor::{unusable, with_causes};
use crate::id::random;
use crate::kernel::Kernel;
use crate::launch::{DiskSegment, LaunchRequest};
use crate::record::Record;
use crate::timings::Phase;
use crate::{guest_agent, initramfs};

/// A machine that runs, with what it needs to be reached.
pub(crate) struct RunningMachine {
    // Dropped in this order: no vCPU runs any more when its devices go.
    machine: Machine<Kvm>,
    exit: Arc<ExitLatch>,
    muxer: MuxerHandle,
    /// The root disk, and what it is to hold once the machine was captured.
    root: Arc<Mutex<Block>>,
    image: Option<Disk>,
    base: Option<Base>,
    /// Publishes a snapshot.
    publishing: Option<JoinHandle<()>>,
    restored: bool,
    _exec: UnixFrontendHandle,
    _event_loop: EventLoop,
    /// Keeps the snapshot whose pages are mapped from being removed.
    _chain: Option<Chain>,
}

impl Drop for RunningMachine {
    fn drop(&mut self) {
        if let Some(publishing) = self.publishing.take() {
            // Its outcome was logged.
            let _ = publishing.join();
        }
    }
}

/// A failed step, in words.
fn failed<E: std::error::Error>(what: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("cannot {what}: {}", with_causes(&error))
}

/// Boots the machine. Also returns the phases on the way.
///
/// # Errors
/// A sentence for the person who started the VM.
pub(crate) fn start(
    request: &LaunchRequest,
    record: &Record,
    console: File,
    dialed: DialSender,
) -> Result<(RunningMachine, Vec<Phase>), String> {
    let mut phases = Vec::new();
    let kvm = Kvm::open().map_err(|error| with_causes(&error))?;
    phases.push(Phase::now("hypervisor opened"));

    let event_loop = EventLoop::spawn("sm-devices").map_err(failed("start the event loop"))?;
    let (vsock, muxer) =
        Vsock::new(VsockConfig::default()).map_err(failed("make the vsock device"))?;
    let agent = dialed.clone();
    listen_for_agent(&muxer, dialed);
    let exec = UnixFrontend::new(&record.exec_socket(), Target::Exec)
        .start(muxer.clone(), &event_loop.handle())
        .map_err(failed("create the exec socket"))?;
    let image = root_disk(&request.root)?;
    let initramfs = initial_ram_fs(request)?;
    let base = match Base::of(request, &initramfs) {
        Ok(base) => Some(base).filter(|_| !request.cold),
        Err(error) => {
            tracing::warn!(error, "snapshots cannot be used");
            None
        }
    };
    let root = Arc::new(Mutex::new(Block::new(
        Disk::empty(),
        Access::ReadOnly,
        "root",
    )));
    let devices = vec![
        DeviceConfig {
            slot: SLOT_VSOCK,
            device: vsock,
        },
        DeviceConfig {
            slot: SLOT_ROOT_DISK,
            device: root.clone(),
        },
        device(SLOT_RNG, Rng::new()),
    ];
    let mut parts = Parts {
        kvm,
        devices,
        console,
        phases,
    };
    let saved = base.as_ref().and_then(Base::open);
    let restored = saved.is_some();
    let (mut machine, chain) = match saved {
        Some((chain, state)) => parts.restore(chain, state, &event_loop)?,
        None => (parts.boot(request, initramfs, &event_loop)?, None),
    };
    machine.resume().map_err(failed("start the vCPUs"))?;
    parts.phases.push(Phase::now("vCPUs started"));
    let exit = machine.exit_latch();
    let mut running = RunningMachine {
        machine,
        exit,
        muxer,
        root,
        image: Some(image),
        base: base.filter(|_| !restored),
        publishing: None,
        restored,
        _exec: exec,
        _event_loop: event_loop,
        _chain: chain,
    };
    if restored {
        // The agent dialled before the snapshot was made: now it is called.
        let stream = running
            .connect(port::CONTROL)
            .map_err(failed("call the guest agent"))?;
        agent.send(stream);
    }
    Ok((running, parts.phases))
}

/// What both ways to a machine need.
struct Parts {
    kvm: Kvm,
    devices: Vec<DeviceConfig>,
    console: File,
    phases: Vec<Phase>,
}

impl Parts {
    fn console(&self) -> Result<File, String> {
        self.console
            .try_clone()
            .map_err(failed("duplicate the console's descriptor"))
    }

    fn boot(
        &mut self,
        request: &LaunchRequest,
        initramfs: Vec<u8>,
        event_loop: &EventLoop,
    ) -> Result<Machine<Kvm>, String> {
        // Not asked of a host on which a guest of the same kind has run.
        if let LinuxSupport::Unusable { reason } = self.kvm.capabilities().linux {
            return Err(unusable(&reason));
        }
        self.phases.push(Phase::now("hypervisor probed"));
        let path = &request.config.kernel;
        let kernel =
            File::open(path).map_err(|error| format!("cannot open kernel {path:?}: {error}"))?;
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
        let machine = Machine::boot(&self.kvm, config, &event_loop.handle())
            .map_err(failed("make the virtual machine"))?;
        self.phases.push(Phase::now("machine made"));
        Ok(machine)
    }

    fn restore(
        &mut self,
        chain: Chain,
        state: MachineState,
        event_loop: &EventLoop,
    ) -> Result<(Machine<Kvm>, Option<Chain>), String> {
        self.phases.push(Phase::now("snapshot opened"));
        let memory = map_memory(&chain, false).map_err(failed("map the memory of the snapshot"))?;
        self.phases.push(Phase::now("memory mapped"));
        let console = self.console()?;
        let devices = std::mem::take(&mut self.devices);
        let machine = Machine::restore(
            &self.kvm,
            state,
            memory,
            devices,
            console,
            &event_loop.handle(),
        )
        .map_err(failed("restore the virtual machine"))?;
        // Before the guest runs on: the first thing it learns is that it is
        // another machine now.
        machine
            .set_generation_id(random::<16>())
            .map_err(failed("give the machine an identity"))?;
        self.phases.push(Phase::now("state restored"));
        Ok((machine, Some(chain)))
    }
}

/// Hands the stream that the agent opens when it is ready to the supervisor.
fn listen_for_agent(muxer: &MuxerHandle, dialed: DialSender) {
    let acceptor = move |_| match UnixStream::pair() {
        Ok((ours, theirs)) => {
            dialed.send(ours);
            Some(OwnedFd::from(theirs))
        }
        Err(error) => {
            tracing::error!(%error, "no descriptors left for the agent's stream");
            None
        }
    };
    muxer.listen(port::CONTROL, Box::new(acceptor));
}

fn device(slot: u32, device: impl sm_vmm_core::virtio::VirtioDevice + 'static) -> DeviceConfig {
    DeviceConfig {
        slot,
        device: Arc::new(Mutex::new(device)),
    }
}

fn root_disk(segments: &[DiskSegment]) -> Result<Disk, String> {
    let mut opened = Vec::with_capacity(segments.len());
    for segment in segments {
        let file = File::open(&segment.path).map_err(|error| {
            let path = &segment.path;
            format!("cannot open a part of the image, {path:?}: {error}")
        })?;
        opened.push(Segment {
            file,
            offset: segment.offset,
            len: segment.len,
        });
    }
    Disk::composite(opened).map_err(failed("assemble the root disk"))
}

fn initial_ram_fs(request: &LaunchRequest) -> Result<Vec<u8>, String> {
    let agent = guest_agent::read().map_err(|error| with_causes(&error))?;
    let kernel = Kernel {
        path: request.config.kernel.clone(),
        modules: request.modules.clone(),
    };
    let modules = kernel.read_modules().map_err(|error| with_causes(&error))?;
    initramfs::build(&agent, &modules).map_err(failed("make the initial RAM file system"))
}

impl Guest for RunningMachine {
    fn restored(&self) -> bool {
        self.restored
    }

    fn agent_ready(&mut self) -> Result<(), String> {
        if let Some(base) = self.base.take() {
            match base.capture(&mut self.machine) {
                Ok(publishing) => self.publishing = Some(publishing),
                Err(error) if self.machine.is_running() => {
                    tracing::warn!(error, "no base snapshot was made");
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(image) = self.image.take() {
            let mut root = self.root.lock().unwrap_or_else(PoisonError::into_inner);
            root.set_disk(image);
        }
        Ok(())
    }

    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.muxer
            .connect(port, theirs.into(), ConnectOptions::default());
        Ok(ours)
    }

    fn pause(&mut self) -> Result<(), String> {
        self.machine.pause().map_err(failed("pause the vCPUs"))
    }

    fn resume(&mut self) -> Result<(), String> {
        self.machine.resume().map_err(failed("resume the vCPUs"))
    }

    fn stop(&mut self) {
        self.exit.report(ExitReason::Stopped);
    }

    fn end_event(&self) -> BorrowedFd<'_> {
        self.exit.event()
    }

    fn end(&self) -> Option<GuestEnd> {
        let what = match self.exit.reason()? {
            ExitReason::Stopped => return Some(GuestEnd::Stopped),
            ExitReason::PowerOff => "the guest powered itself off".to_owned(),
            ExitReason::Reset => match self.machine.console().guest_panic() {
                Some(panic) => format!("the guest's kernel panicked: {panic}"),
                None => "the guest reset itself".to_owned(),
            },
            ExitReason::TripleFault { vcpu } => {
                format!("vCPU {vcpu} of the guest met a triple fault")
            }
            ExitReason::Halted { vcpu } => format!("vCPU {vcpu} of the guest halted for good"),
            ExitReason::Fault { vcpu, info } => format!(
                "the hypervisor cannot run vCPU {vcpu} on: {} (at {:#x})",
                info.reason, info.program_counter
            ),
            ExitReason::Failed { reason } => format!("the VM failed on the host: {reason}"),
        };
        Some(GuestEnd::Guest(what))
    }
}
