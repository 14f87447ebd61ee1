//! A virtual machine: boot or restore, run, pause, save, end.

mod builder;
mod error;

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use sm_hypervisor::state::x86_64::BootRegisters;
use sm_hypervisor::{Hypervisor, RestoredVcpu, VirtualMachine, VmSavedState, X86_64};

use self::builder::{MachineBuilder, Stopwatch};
pub use self::error::MachineError;
use self::error::hypervisor;
use crate::acpi::{self, AcpiConfig, GENERATION_ID};
use crate::devices::{DeviceConfig, Devices};
use crate::exit::{ExitLatch, MachineExit};
use crate::layout::MACHINE_VERSION;
use crate::loader::{self, BootSource, InitramfsPart};
use crate::memory::{MachineMemory, MemoryConfig};
use crate::serial::{Console, Uart};
use crate::state::MachineState;
use crate::vcpu_thread::{VcpuStart, VcpuThread};
use crate::vmgenid::GenerationId;
use sm_event_loop::EventLoopHandle;

/// Components of a machine.
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
    /// The VM generation ID at boot: random, never used before.
    pub generation_id: [u8; 16],
    /// Receives the guest's console output.
    pub console: File,
    /// Virtio devices, in any order.
    pub devices: Vec<DeviceConfig>,
}

/// Durations of the steps to a runnable machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// Creating the VM and its interrupt lines, and for a boot its vCPUs.
    pub hypervisor_objects: Duration,
    /// Adding the devices to their bus.
    pub devices: Duration,
    /// Mapping memory into the VM.
    pub memory_map: Duration,
    /// Loading kernel and tables (boot), or creating vCPUs and loading the state of vCPUs,
    /// devices and VM (restore).
    pub load: Duration,
    /// The first resumption of the vCPUs.
    pub resume: Duration,
}

/// A virtual machine. Created paused; dropping it ends it.
pub struct Machine<H: Hypervisor> {
    // Fields are dropped in this order: threads (with their vCPUs) before the VM, the VM
    // before the memory that it maps.
    threads: Vec<VcpuThread<H::Arch>>,
    devices: Devices,
    uart: Arc<Uart>,
    console: Console,
    exit: Arc<ExitLatch>,
    generation: GenerationId,
    vm: H::Vm,
    memory: MachineMemory,
    running: bool,
    phases: Phases,
}

impl<H: Hypervisor<Arch = X86_64>> Machine<H> {
    /// Creates a machine that is ready to boot, paused before its first instruction. Its
    /// devices run on `event_loop`; the machine must not be created or dropped on that
    /// loop's own thread.
    ///
    /// # Errors
    /// See [`MachineError`]; all resources are released.
    pub fn boot(
        host: &H,
        mut config: MachineConfig,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, MachineError> {
        check_vcpus(config.vcpus)?;
        let memory = MachineMemory::anonymous(&config.memory)?;
        let mut builder = MachineBuilder::<H>::build(
            host,
            memory,
            config.vcpus,
            config.console,
            config.devices,
            event_loop,
        )?;

        let mut watch = Stopwatch::start();
        let rsdp = acpi::write_tables(
            &builder.memory.guest,
            &AcpiConfig {
                vcpus: config.vcpus,
                slots: builder.devices.slots(),
            },
        )?;
        let registers = loader::load(
            &builder.memory,
            &mut BootSource {
                kernel: &mut config.kernel,
                initramfs: &config.initramfs,
                cmdline: &config.cmdline,
                rsdp,
            },
        )?;
        builder.generation.initialise(config.generation_id)?;
        builder.phases.load = watch.lap();
        let (threads, _) = builder.start(boot_starts(registers, config.vcpus))?;
        builder.phases.hypervisor_objects += watch.lap();
        Ok(builder.finish(threads))
    }

    /// Creates a machine from saved state and the memory that belongs to it, paused where
    /// it was saved. Its console output starts anew in `console`. `devices` are new devices
    /// as for a boot, in the same slots.
    ///
    /// # Errors
    /// State of another version, memory size, or set of devices, or of another kind of
    /// host.
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
        let mut builder =
            MachineBuilder::<H>::build(host, memory, vcpus, console, devices, event_loop)?;

        let mut watch = Stopwatch::start();
        let starts = state
            .vcpus
            .into_iter()
            .map(|s| VcpuStart::Restore(Arc::new(s)));
        let (threads, proofs) = builder.start(starts)?;
        restore_vm(&builder.vm, &state.vm, &threads, proofs)?;
        // After the interrupt controllers, whose state would overwrite pending interrupts
        // of the devices.
        builder.uart.restore(&state.uart)?;
        builder.devices.restore(&state.devices)?;
        builder.phases.load = watch.lap();
        Ok(builder.finish(threads))
    }

    /// Lets the vCPUs run. Has no effect if they run already.
    ///
    /// # Errors
    /// A vCPU thread or an event loop has ended.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if self.running {
            return Ok(());
        }
        let mut watch = Stopwatch::start();
        self.devices.unquiesce();
        self.devices.start_apart()?;
        for thread in &self.threads {
            thread.run()?;
        }
        self.running = true;
        if self.phases.resume.is_zero() {
            self.phases.resume = watch.lap();
        }
        Ok(())
    }

    /// Makes all vCPUs leave guest code and completes the devices' work in flight. Has no
    /// effect if the machine is paused already.
    ///
    /// # Errors
    /// A vCPU thread or the event loop has ended. The machine then continues to run, as far
    /// as it can.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if !self.running {
            return Ok(());
        }
        if let Err(error) = self.pause_all() {
            // A partial pause is undone: working parts continue.
            self.devices.unquiesce();
            for thread in &self.threads {
                // A thread that has ended has reported the reason.
                let _ = thread.run();
            }
            return Err(error);
        }
        self.running = false;
        Ok(())
    }

    fn pause_all(&self) -> Result<(), MachineError> {
        let pending: Result<Vec<_>, _> = self.threads.iter().map(VcpuThread::park).collect();
        for parked in pending? {
            parked.wait()?;
        }
        Ok(self.devices.quiesce()?)
    }

    /// Saves the machine's state, without its memory.
    ///
    /// # Errors
    /// The machine is not paused, the hypervisor refused, or a device cannot be saved.
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
            devices: self.devices.save()?,
        })
    }

    /// Restores, in place, the state that this machine was restored with: memory first,
    /// then everything else. The machine stays paused. In memory, the pages of `written`
    /// (see [`MachineMemory::revert_pages`]) are reverted, which must contain all that were
    /// written to; without `written`, all pages.
    ///
    /// # Errors
    /// The machine is not paused or has ended, or the state is another machine's. A machine
    /// whose vCPUs have a part of the state cannot run any more.
    pub fn reset_to(
        &mut self,
        state: &MachineState,
        written: Option<&[(u64, u64)]>,
    ) -> Result<(), MachineError> {
        self.must_be_paused("restore a state")?;
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
        restore_vm(&self.vm, &state.vm, &self.threads, proofs)?;
        self.uart.restore(&state.uart)?;
        self.devices.restore(&state.devices)?;
        Ok(())
    }

    /// Ends the machine: its vCPUs leave the guest permanently.
    ///
    /// # Errors
    /// A vCPU thread has ended before.
    pub fn stop(&mut self) -> Result<(), MachineError> {
        self.exit.report(MachineExit::Stopped);
        self.pause()
    }

    /// Returns a descriptor that becomes, and stays, readable when the machine has ended.
    #[must_use]
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        self.exit.event()
    }

    /// Returns the reason why the machine has ended; `None` while it has not.
    #[must_use]
    pub fn exit_reason(&self) -> Option<MachineExit> {
        self.exit.reason().cloned()
    }

    /// Returns the exit latch, to wait on from another thread, or to end the machine
    /// without access to it.
    #[must_use]
    pub fn exit_latch(&self) -> Arc<ExitLatch> {
        self.exit.clone()
    }

    /// Returns the console's captured output.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Passes input to the guest's console, all of it or nothing.
    ///
    /// # Errors
    /// The UART's buffer has too little room.
    pub fn console_input(&self, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.uart.input(bytes)?)
    }

    /// Returns the guest memory.
    #[must_use]
    pub fn memory(&self) -> &MachineMemory {
        &self.memory
    }

    /// Returns the number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.threads.len()
    }

    /// Returns true if vCPUs may be in guest code.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Returns the durations of the steps so far.
    #[must_use]
    pub fn phases(&self) -> Phases {
        self.phases
    }

    /// Changes the VM generation ID and notifies the guest, whose kernel then reseeds its
    /// random numbers. Works while paused, too: the guest gets the interrupt as soon as it
    /// continues after [`Self::resume`].
    ///
    /// # Errors
    /// Guest memory cannot be written, or the guest cannot be notified.
    pub fn set_generation_id(&self, id: [u8; 16]) -> Result<(), MachineError> {
        Ok(self.generation.change(id)?)
    }

    fn must_be_paused(&self, operation: &'static str) -> Result<(), MachineError> {
        if self.running {
            return Err(MachineError::NotPaused { operation });
        }
        Ok(())
    }
}

fn boot_starts(registers: BootRegisters, vcpus: u32) -> impl Iterator<Item = VcpuStart<X86_64>> {
    let boot = std::iter::once(VcpuStart::Boot(Some(Box::new(registers))));
    boot.chain((1..vcpus).map(|_| VcpuStart::Boot(None)))
}

/// Restores interrupt controllers and clocks of a VM whose vCPUs have their state, and lets
/// these finish. Devices may raise their lines afterwards.
fn restore_vm<V: VirtualMachine>(
    vm: &V,
    state: &VmSavedState,
    threads: &[VcpuThread<V::Arch>],
    proofs: Vec<RestoredVcpu>,
) -> Result<(), MachineError> {
    let finishes = vm
        .restore(state, proofs)
        .map_err(hypervisor("restore interrupt controllers and clocks"))?;
    if V::FINISH_IS_EMPTY {
        for (thread, finish) in threads.iter().zip(finishes) {
            thread.finish_later(finish);
        }
        return Ok(());
    }
    let pending: Result<Vec<_>, _> = threads
        .iter()
        .zip(finishes)
        .map(|(thread, finish)| thread.finish(finish))
        .collect();
    for finished in pending? {
        finished.wait_ok()?;
    }
    Ok(())
}

/// Checks the limits of the ACPI tables; the hypervisor checks its own limit.
fn check_vcpus(vcpus: u32) -> Result<(), MachineError> {
    let max = acpi::MAX_VCPUS;
    if (1..=max).contains(&vcpus) {
        Ok(())
    } else {
        Err(MachineError::Vcpus { vcpus, max })
    }
}

/// Checks that `state` fits a machine with `memory`; returns its number of vCPUs.
fn check_state(state: &MachineState, memory: &MachineMemory) -> Result<u32, MachineError> {
    let misfit = |reason| Err(MachineError::State { reason });
    if state.version != MACHINE_VERSION {
        return misfit(format!(
            "it is of machine version {}, this program supports {MACHINE_VERSION}",
            state.version
        ));
    }
    if state.generation_id != GENERATION_ID {
        return misfit("its generation ID is at another address".into());
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
