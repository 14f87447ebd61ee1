//! A virtual machine: boots or is restored, runs, pauses, is saved, ends.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sm_hypervisor::state::BootRegisters;
use sm_hypervisor::{
    DirtyBitmap, Hypervisor, IrqTrigger, MemoryRegion, RestoredVcpu, SlotId, Vm, VmConfig,
};
use thiserror::Error;

use crate::acpi::{self, AcpiConfig, GENERATION_ID};
use crate::bus::{BusBuilder, MachineBus};
use crate::devices::{DeviceConfig, DeviceError, Devices};
use crate::event_loop::EventLoopHandle;
use crate::exit::{ExitLatch, ExitReason};
use crate::layout::{COM1_GSI, COM1_PORT, GED_GSI, MACHINE_VERSION};
use crate::loader::{self, BootSource, InitramfsPart};
use crate::memory::{MachineMemory, MemoryConfig, RamRegion};
use crate::power;
use crate::serial::{Console, SerialError, Uart};
use crate::state::MachineState;
use crate::vcpu_thread::{Start, VcpuError, VcpuThread};
use crate::vmgenid::{GenerationError, GenerationId};

/// Why a machine cannot be made, or cannot do what it was asked to.
#[derive(Debug, Error)]
pub enum MachineError {
    /// Guest memory.
    #[error("cannot set up guest memory")]
    Memory(#[from] crate::memory::MemoryError),
    /// Kernel, initramfs or command line.
    #[error("cannot load the guest kernel")]
    Load(#[from] loader::LoadError),
    /// ACPI tables.
    #[error("cannot describe the machine to the guest")]
    Acpi(#[from] acpi::AcpiError),
    /// Device windows.
    #[error("cannot lay out the devices")]
    Bus(#[from] crate::bus::BusError),
    /// Virtio devices.
    #[error("a virtio device did not do its part")]
    Device(#[from] DeviceError),
    /// The hypervisor.
    #[error("cannot {operation}")]
    Hypervisor {
        /// What was tried.
        operation: &'static str,
        /// What it said.
        #[source]
        source: sm_hypervisor::Error,
    },
    /// A vCPU.
    #[error("a vCPU did not do its part")]
    Vcpu(#[from] VcpuError),
    /// The console.
    #[error("the console did not do its part")]
    Serial(#[from] SerialError),
    /// The generation ID.
    #[error("cannot change the machine's identity")]
    Generation(#[from] GenerationError),
    /// A host resource.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Saved state of another kind of machine.
    #[error("saved machine state does not fit: {reason}")]
    State {
        /// What does not fit.
        reason: String,
    },
    /// More vCPUs than a machine can have.
    #[error("{vcpus} vCPUs are not possible: 1 to {max} are")]
    Vcpus {
        /// What was asked for.
        vcpus: u32,
        /// What is possible.
        max: u32,
    },
    /// Only possible while the machine is paused.
    #[error("cannot {operation} while the machine runs: pause it first")]
    NotPaused {
        /// What was tried.
        operation: &'static str,
    },
}

fn hypervisor(operation: &'static str) -> impl FnOnce(sm_hypervisor::Error) -> MachineError {
    move |source| MachineError::Hypervisor { operation, source }
}

/// What a machine is made of.
#[derive(Debug)]
pub struct MachineConfig {
    /// Guest memory.
    pub memory: MemoryConfig,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The kernel: ELF with PVH entry, or bzImage.
    pub kernel: File,
    /// Parts of the initramfs, in order.
    pub initramfs: Vec<InitramfsPart>,
    /// Kernel command line.
    pub cmdline: String,
    /// The VM generation ID it boots with: random, never used before.
    pub generation_id: [u8; 16],
    /// Receives the guest's console output.
    pub console: File,
    /// Virtio devices, in any order.
    pub devices: Vec<DeviceConfig>,
}

/// How long the steps to a runnable machine took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// Creating the VM and its interrupt lines, and for a boot its vCPUs.
    pub hypervisor_objects: Duration,
    /// Putting the devices on their bus.
    pub devices: Duration,
    /// Mapping memory into the VM.
    pub memory_map: Duration,
    /// Loading kernel and tables (boot), or making vCPUs and loading the state of
    /// vCPUs, devices and VM (restore).
    pub load: Duration,
    /// Letting vCPUs go, the first time.
    pub resume: Duration,
}

/// Measures consecutive steps.
struct Stopwatch(Instant);

impl Stopwatch {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}

/// A virtual machine. Created paused; dropping it ends it.
pub struct Machine<H: Hypervisor> {
    // Fields are dropped in this order: threads (with their vCPUs) before the
    // VM, the VM before the memory it maps.
    threads: Vec<VcpuThread>,
    devices: Devices,
    uart: Arc<Uart>,
    console: Console,
    exit: Arc<ExitLatch>,
    generation: GenerationId,
    vm: H::Vm,
    slots: Vec<(RamRegion, SlotId)>,
    memory: MachineMemory,
    running: bool,
    phases: Phases,
}

/// Everything but vCPUs.
struct Chassis<H: Hypervisor> {
    vm: H::Vm,
    memory: MachineMemory,
    slots: Vec<(RamRegion, SlotId)>,
    bus: Arc<MachineBus>,
    devices: Devices,
    uart: Arc<Uart>,
    console: Console,
    exit: Arc<ExitLatch>,
    generation: GenerationId,
    phases: Phases,
}

impl<H: Hypervisor> Chassis<H> {
    fn build(
        host: &H,
        memory: MachineMemory,
        vcpus: u32,
        console: File,
        devices: Vec<DeviceConfig>,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, MachineError> {
        let mut watch = Stopwatch::start();
        let vm = host
            .create_vm(&VmConfig { vcpus })
            .map_err(hypervisor("create the virtual machine"))?;
        let hypervisor_objects = watch.lap();
        let slots = map_memory(&vm, &memory)?;
        let memory_map = watch.lap();

        let line = |gsi| {
            vm.irq_line(gsi, IrqTrigger::Edge)
                .map_err(hypervisor("open an interrupt line"))
        };
        let exit = Arc::new(ExitLatch::new().map_err(|source| MachineError::Io {
            operation: "create an event descriptor",
            source,
        })?);
        let console = Console::new(console);
        let uart = Arc::new(Uart::new(line(COM1_GSI)?, console.clone()));
        let generation = GenerationId::new(memory.guest.clone(), line(GED_GSI)?);
        let mut bus = BusBuilder::default();
        bus.pio(COM1_PORT, 8, uart.clone())?;
        power::attach(&mut bus, &exit)?;
        let hypervisor_objects = hypervisor_objects + watch.lap();
        let devices = Devices::attach(devices, &vm, &mut bus, &memory.guest, event_loop)?;
        let bus = Arc::new(bus.build());
        Ok(Self {
            vm,
            memory,
            slots,
            bus,
            devices,
            uart,
            console,
            exit,
            generation,
            phases: Phases {
                hypervisor_objects,
                devices: watch.lap(),
                memory_map,
                ..Phases::default()
            },
        })
    }

    /// Starts all vCPU threads, parked, and waits until each is bound.
    fn start(
        &self,
        starts: impl Iterator<Item = Start>,
    ) -> Result<(Vec<VcpuThread>, Vec<RestoredVcpu>), MachineError> {
        let mut threads = Vec::new();
        let mut answers = Vec::new();
        for (index, start) in (0u32..).zip(starts) {
            let seed = self
                .vm
                .create_vcpu(index)
                .map_err(hypervisor("create a vCPU"))?;
            let (thread, bound) =
                VcpuThread::spawn(seed, start, self.bus.clone(), self.exit.clone())?;
            threads.push(thread);
            answers.push(bound);
        }
        let mut proofs = Vec::new();
        for answer in answers {
            proofs.extend(answer.wait_ok()?);
        }
        self.exit
            .set_kickers(threads.iter().map(VcpuThread::kicker).collect());
        Ok((threads, proofs))
    }

    fn finish(self, threads: Vec<VcpuThread>) -> Machine<H> {
        Machine {
            threads,
            devices: self.devices,
            uart: self.uart,
            console: self.console,
            exit: self.exit,
            generation: self.generation,
            vm: self.vm,
            slots: self.slots,
            memory: self.memory,
            running: false,
            phases: self.phases,
        }
    }
}

#[expect(
    unsafe_code,
    reason = "hands guest memory to the hypervisor, which needs it to stay mapped"
)]
fn map_memory<V: Vm>(
    vm: &V,
    memory: &MachineMemory,
) -> Result<Vec<(RamRegion, SlotId)>, MachineError> {
    let mut slots = Vec::with_capacity(memory.regions.len());
    for region in &memory.regions {
        let host_address = memory.host_address(region).ok_or(MachineError::State {
            reason: "a memory region is not mapped".into(),
        })?;
        // SAFETY: the machine keeps `memory` until after the VM and all vCPUs
        // are gone (see the order of its fields), and everything else accesses
        // it through volatile accessors.
        let slot = unsafe {
            vm.map_memory(MemoryRegion {
                guest_address: region.guest_address,
                host_address,
                len: region.len,
                read_only: false,
                track_dirty: false,
            })
        }
        .map_err(hypervisor("map guest memory into the virtual machine"))?;
        slots.push((*region, slot));
    }
    Ok(slots)
}

impl<H: Hypervisor> Machine<H> {
    /// A machine that is about to boot, paused before its first instruction. Its
    /// devices run on `event_loop`; not to be called (or the machine dropped) on
    /// that loop's own thread.
    ///
    /// # Errors
    /// See [`MachineError`]; nothing is left behind.
    pub fn boot(
        host: &H,
        mut config: MachineConfig,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, MachineError> {
        check_vcpus(config.vcpus)?;
        let memory = MachineMemory::anonymous(&config.memory)?;
        let mut chassis = Chassis::<H>::build(
            host,
            memory,
            config.vcpus,
            config.console,
            config.devices,
            event_loop,
        )?;

        let mut watch = Stopwatch::start();
        let rsdp = acpi::write_tables(
            &chassis.memory.guest,
            &AcpiConfig {
                vcpus: config.vcpus,
                slots: chassis.devices.slots(),
            },
        )?;
        let registers = loader::load(
            &chassis.memory,
            &mut BootSource {
                kernel: &mut config.kernel,
                initramfs: &config.initramfs,
                cmdline: &config.cmdline,
                rsdp,
            },
        )?;
        chassis.generation.initialise(config.generation_id)?;
        chassis.phases.load = watch.lap();
        let (threads, _) = chassis.start(boot_starts(registers, config.vcpus))?;
        chassis.phases.hypervisor_objects += watch.lap();
        Ok(chassis.finish(threads))
    }

    /// A machine with saved state and the memory that belongs to it, paused
    /// where it was saved. Its console output starts over in `console`.
    /// `devices` are as fresh as for a boot, in the same slots.
    ///
    /// # Errors
    /// State of another version, memory size, or set of devices, or of another
    /// kind of host.
    pub fn restore(
        host: &H,
        state: MachineState,
        memory: MachineMemory,
        devices: Vec<DeviceConfig>,
        console: File,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, MachineError> {
        let vcpus = check_state(&state, &memory)?;
        check_vcpus(vcpus)?;
        let mut chassis = Chassis::<H>::build(host, memory, vcpus, console, devices, event_loop)?;

        let mut watch = Stopwatch::start();
        let starts = state.vcpus.into_iter().map(|s| Start::Restore(Arc::new(s)));
        let (threads, proofs) = chassis.start(starts)?;
        chassis
            .vm
            .restore(&state.vm, proofs)
            .map_err(hypervisor("restore interrupt controllers and clocks"))?;
        // After the interrupt controllers, whose state would overwrite theirs.
        chassis.uart.restore(&state.uart)?;
        chassis.devices.restore(&state.devices)?;
        chassis.phases.load = watch.lap();
        Ok(chassis.finish(threads))
    }

    /// Lets the vCPUs run. Nothing happens if they do already.
    ///
    /// # Errors
    /// A vCPU thread has ended.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if self.running {
            return Ok(());
        }
        let mut watch = Stopwatch::start();
        self.devices.unquiesce();
        for thread in &self.threads {
            thread.run()?;
        }
        self.running = true;
        if self.phases.resume.is_zero() {
            self.phases.resume = watch.lap();
        }
        Ok(())
    }

    /// Takes all vCPUs out of guest code and brings the devices' work in flight
    /// to an end. Nothing happens if the machine is paused already.
    ///
    /// # Errors
    /// A vCPU thread or the event loop has ended. The machine then runs on, as far as
    /// it can.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if !self.running {
            return Ok(());
        }
        if let Err(error) = self.hold() {
            // Half a pause is none: what still works goes on.
            self.devices.unquiesce();
            for thread in &self.threads {
                // One that has ended has told why.
                let _ = thread.run();
            }
            return Err(error);
        }
        self.running = false;
        Ok(())
    }

    fn hold(&self) -> Result<(), MachineError> {
        let pending: Result<Vec<_>, _> = self.threads.iter().map(VcpuThread::park).collect();
        for parked in pending? {
            parked.wait()?;
        }
        Ok(self.devices.quiesce()?)
    }

    /// The machine's state, without its memory.
    ///
    /// # Errors
    /// The machine is not paused, or the hypervisor refused.
    pub fn save_state(&mut self) -> Result<MachineState, MachineError> {
        self.must_be_paused("save its state")?;
        let pending: Result<Vec<_>, _> = self.threads.iter().map(VcpuThread::save).collect();
        let mut vcpus = Vec::with_capacity(self.threads.len());
        for saved in pending? {
            vcpus.push(saved.wait_ok()?);
        }
        Ok(MachineState {
            version: MACHINE_VERSION,
            memory_bytes: self.memory.bytes(),
            generation_id: GENERATION_ID,
            vm: self
                .vm
                .save()
                .map_err(hypervisor("save interrupt controllers and clocks"))?,
            vcpus,
            uart: self.uart.save(),
            devices: self.devices.save(),
        })
    }

    /// Puts the state that this machine was restored with back, in place:
    /// memory first, then everything else. It stays paused. Of memory, the pages of
    /// `written` (see [`MachineMemory::revert_pages`]) are put back, which must be all
    /// that were written to, or else all of it.
    ///
    /// # Errors
    /// The machine is not paused or has ended, or the state is another machine's.
    pub fn reset_to(
        &mut self,
        state: &MachineState,
        written: Option<&[(u64, u64)]>,
    ) -> Result<(), MachineError> {
        self.must_be_paused("put a state back")?;
        if let Some(reason) = self.exit.reason() {
            return Err(MachineError::State {
                reason: format!("the machine has ended ({reason:?})"),
            });
        }
        let vcpus = check_state(state, &self.memory)?;
        if usize::try_from(vcpus).ok() != Some(self.threads.len()) {
            return Err(MachineError::State {
                reason: format!("it has {vcpus} vCPUs, not {}", self.threads.len()),
            });
        }
        match written {
            Some(runs) => self.memory.revert_pages(runs)?,
            None => self.memory.revert()?,
        }
        let pending: Result<Vec<_>, _> = self
            .threads
            .iter()
            .zip(&state.vcpus)
            .map(|(thread, state)| thread.reload(Arc::new(state.clone())))
            .collect();
        let mut proofs = Vec::with_capacity(self.threads.len());
        for reloaded in pending? {
            proofs.push(reloaded.wait_ok()?);
        }
        self.vm
            .restore(&state.vm, proofs)
            .map_err(hypervisor("restore interrupt controllers and clocks"))?;
        self.uart.restore(&state.uart)?;
        self.devices.restore(&state.devices)?;
        Ok(())
    }

    /// Ends the machine: its vCPUs leave the guest for good.
    ///
    /// # Errors
    /// A vCPU thread has ended before.
    pub fn stop(&mut self) -> Result<(), MachineError> {
        self.exit.report(ExitReason::Stopped);
        self.pause()
    }

    /// Becomes, and stays, readable when the machine has ended.
    #[must_use]
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        self.exit.event()
    }

    /// Why the machine has ended; `None` while it has not.
    #[must_use]
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.exit.reason().cloned()
    }

    /// The exit latch, to wait on from another thread, or to end the machine
    /// without access to it.
    #[must_use]
    pub fn exit_latch(&self) -> Arc<ExitLatch> {
        self.exit.clone()
    }

    /// The console's captured output.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Hands input to the guest's console, all of it or nothing.
    ///
    /// # Errors
    /// The UART's buffer has not enough room.
    pub fn console_input(&self, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.uart.input(bytes)?)
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &MachineMemory {
        &self.memory
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.threads.len()
    }

    /// Whether vCPUs may be in guest code.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// How long the steps so far took.
    #[must_use]
    pub fn phases(&self) -> Phases {
        self.phases
    }

    /// Changes the VM generation ID and tells the guest, whose kernel then
    /// reseeds its random numbers. Works while paused, too: the interrupt is
    /// delivered first thing after [`Self::resume`].
    ///
    /// # Errors
    /// Guest memory cannot be written, or the guest cannot be told.
    pub fn set_generation_id(&self, id: [u8; 16]) -> Result<(), MachineError> {
        Ok(self.generation.change(id)?)
    }

    /// Switches recording of guest writes on or off.
    ///
    /// # Errors
    /// The hypervisor refused.
    pub fn set_dirty_tracking(&self, on: bool) -> Result<(), MachineError> {
        for (_, slot) in &self.slots {
            self.vm
                .set_dirty_tracking(*slot, on)
                .map_err(hypervisor("switch dirty tracking"))?;
        }
        Ok(())
    }

    /// Takes the pages written by the guest (not by devices) since the last
    /// call, for each region.
    ///
    /// # Errors
    /// Dirty tracking is off.
    pub fn take_dirty(&self) -> Result<Vec<(RamRegion, DirtyBitmap)>, MachineError> {
        self.slots
            .iter()
            .map(|(region, slot)| {
                let dirty = self
                    .vm
                    .take_dirty(*slot)
                    .map_err(hypervisor("take dirty pages"))?;
                Ok((*region, dirty))
            })
            .collect()
    }

    fn must_be_paused(&self, operation: &'static str) -> Result<(), MachineError> {
        if self.running {
            return Err(MachineError::NotPaused { operation });
        }
        Ok(())
    }
}

fn boot_starts(registers: BootRegisters, vcpus: u32) -> impl Iterator<Item = Start> {
    let boot = std::iter::once(Start::Boot(Some(Box::new(registers))));
    boot.chain((1..vcpus).map(|_| Start::Boot(None)))
}

/// What the tables can describe; the host's own limit is the hypervisor's to say.
fn check_vcpus(vcpus: u32) -> Result<(), MachineError> {
    let max = acpi::MAX_VCPUS;
    if (1..=max).contains(&vcpus) {
        Ok(())
    } else {
        Err(MachineError::Vcpus { vcpus, max })
    }
}

/// Checks that `state` can be put into a machine with `memory`; returns its
/// number of vCPUs.
fn check_state(state: &MachineState, memory: &MachineMemory) -> Result<u32, MachineError> {
    let misfit = |reason| Err(MachineError::State { reason });
    if state.version != MACHINE_VERSION {
        return misfit(format!(
            "it is of machine version {}, this program has {MACHINE_VERSION}",
            state.version
        ));
    }
    if state.generation_id != GENERATION_ID {
        return misfit("its generation ID is elsewhere".into());
    }
    if state.memory_bytes != memory.bytes() {
        return misfit(format!(
            "it is of a machine with {} bytes of memory, not {}",
            state.memory_bytes,
            memory.bytes()
        ));
    }
    u32::try_from(state.vcpus.len()).map_err(|_| MachineError::State {
        reason: "it has too many vCPUs".into(),
    })
}
