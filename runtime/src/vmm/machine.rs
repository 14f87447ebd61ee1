//! The machine that a launch request describes, on this host's hypervisor.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use sm_devices_vsock::{ConnectOptions, MuxerHandle, Vsock, VsockConfig};
use sm_frontends::{Target, UnixFrontend, UnixFrontendHandle};
use sm_guest_proto::port;
use sm_hypervisor::kvm::Kvm;
use sm_hypervisor::{Hypervisor as _, LinuxSupport};
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::event_loop::EventLoop;
use sm_vmm_core::exit::{ExitLatch, ExitReason};
use sm_vmm_core::layout::{SLOT_RNG, SLOT_ROOT_DISK, SLOT_VSOCK};
use sm_vmm_core::loader::{BASE_COMMAND_LINE, InitramfsPart};
use sm_vmm_core::machine::{Machine, MachineConfig};
use sm_vmm_core::memory::MemoryConfig;
use sm_vmm_core::virtio::blk::{Access, Block};
use sm_vmm_core::virtio::disk::{Disk, Segment};
use sm_vmm_core::virtio::rng::Rng;

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
    _exec: UnixFrontendHandle,
    _event_loop: EventLoop,
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
    if let LinuxSupport::Unusable { reason } = kvm.capabilities().linux {
        return Err(unusable(&reason));
    }
    phases.push(Phase::now("hypervisor probed"));

    let event_loop = EventLoop::spawn("sm-devices").map_err(failed("start the event loop"))?;
    let (vsock, muxer) =
        Vsock::new(VsockConfig::default()).map_err(failed("make the vsock device"))?;
    listen_for_agent(&muxer, dialed);
    let exec = UnixFrontend::new(&record.exec_socket(), Target::Exec)
        .start(muxer.clone(), &event_loop.handle())
        .map_err(failed("create the exec socket"))?;
    let root = root_disk(&request.root)?;
    let devices = vec![
        DeviceConfig {
            slot: SLOT_VSOCK,
            device: vsock,
        },
        device(SLOT_ROOT_DISK, Block::new(root, Access::ReadOnly, "root")),
        device(SLOT_RNG, Rng::new()),
    ];
    let initramfs = initial_ram_fs(request)?;
    let path = &request.config.kernel;
    let kernel =
        File::open(path).map_err(|error| format!("cannot open kernel {path:?}: {error}"))?;
    phases.push(Phase::now("files opened"));

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
        console,
        devices,
    };
    let mut machine = Machine::boot(&kvm, config, &event_loop.handle())
        .map_err(failed("make the virtual machine"))?;
    phases.push(Phase::now("machine made"));
    machine.resume().map_err(failed("start the vCPUs"))?;
    phases.push(Phase::now("vCPUs started"));
    let exit = machine.exit_latch();
    let running = RunningMachine {
        machine,
        exit,
        muxer,
        _exec: exec,
        _event_loop: event_loop,
    };
    Ok((running, phases))
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
