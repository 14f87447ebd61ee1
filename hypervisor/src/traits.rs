//! The traits of the hypervisor interface.

use std::fmt::Debug;
use std::ptr::NonNull;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::state::VmSavedState;
use crate::{Arch, Bus, Capabilities, Error, Finish, OpenError, RestoredVcpu, Wake};

/// A global system interrupt: an input of the IOAPIC (x86) or an SPI (arm64).
pub type Gsi = u32;

/// Parameters of a new VM.
#[derive(Clone, Debug, Default)]
pub struct VmParameters {
    /// Number of vCPUs that will be created, at least 1.
    pub vcpus: u32,
}

/// Host memory that is mapped into the guest.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRegion {
    /// First guest physical address; a multiple of the host's page size.
    pub guest_address: u64,
    /// First byte of host memory; aligned to a page.
    pub host_address: NonNull<u8>,
    /// Length in bytes; a multiple of the host's page size.
    pub len: u64,
}

/// Trigger mode of an interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IrqTrigger {
    /// A pulse for each event.
    Edge,
    /// Asserted until lowered.
    Level,
}

/// One interrupt input, usable from any thread.
pub trait IrqLine: Send + Sync + Debug {
    /// Raises an edge-triggered interrupt once.
    ///
    /// # Errors
    /// The hypervisor refused; the guest has missed an interrupt.
    fn pulse(&self) -> Result<(), Error>;
}

/// A guest write that signals a [`Wake`] without a VM exit to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Guest physical address written.
    pub address: u64,
    /// Width of the write in bytes (1, 2, 4 or 8), or `None` for any.
    pub width: Option<u8>,
    /// Value that must be written, or `None` for any. Requires `width`.
    pub value: Option<u64>,
}

/// An opened hypervisor backend.
pub trait Hypervisor: Send + Sync + Sized + 'static {
    /// Architecture of its guests.
    type Arch: Arch;
    /// Its virtual machines.
    type Vm: VirtualMachine<Arch = Self::Arch>;

    /// Versions of the [blobs](crate::state::Blob) that this backend saves and restores, in a
    /// fixed order. Saved state of a backend with other versions may not be readable here.
    const STATE_VERSIONS: &'static [u32] = &[];

    /// Opens the host's hypervisor.
    ///
    /// Does not run the Linux capability probe; see [`Hypervisor::capabilities`].
    ///
    /// # Errors
    /// A sentence that states what the host lacks and the remedy.
    fn open() -> Result<Self, OpenError>;

    /// Returns the backend's capabilities. The first call runs the probe for the `linux`
    /// member (a few milliseconds); its result is cached.
    fn capabilities(&self) -> Capabilities;

    /// Returns all processor features that a guest can see here: those of every fresh
    /// guest, and those that it could have in addition.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn guest_features(&self) -> Result<<Self::Arch as Arch>::Features, Error>;

    /// Returns a change to this host that makes [`Hypervisor::create_vm`] faster, as a
    /// sentence for a person, if the backend knows one.
    fn creation_advice(&self) -> Option<String> {
        None
    }

    /// Announces that a VM will be created soon: a backend whose creation of VMs blocks can
    /// start it now, on another thread. A caller that has other work in the meantime gains
    /// time; one that never creates a VM keeps an unused one until the backend is dropped.
    fn prepare_vm(&self) {}

    /// Creates a VM without memory or vCPUs. Its interrupt controllers may be created with
    /// the first vCPU or interrupt line.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn create_vm(&self, config: &VmParameters) -> Result<Self::Vm, Error>;
}

/// A virtual machine: address space, interrupt controllers and clock.
pub trait VirtualMachine: Send + Sync + 'static {
    /// Architecture of its guest.
    type Arch: Arch;
    /// Its vCPUs before they are bound to a thread.
    type Seed: VcpuSeed<Arch = Self::Arch>;

    /// True if [`RestoringVcpu::finish_restore`] changes no state. A vCPU may then finish as
    /// late as its next command, which saves its thread a wake-up in every restore.
    const FINISH_IS_EMPTY: bool = false;

    /// Maps host memory into the guest.
    ///
    /// Cheapest on a VM that has no vCPU, interrupt line or doorbell yet: some versions of
    /// KVM take milliseconds later.
    ///
    /// # Safety
    /// `region.host_address .. + region.len` must stay mapped, and must not be
    /// used as Rust references that assume exclusive access, until the VM *and all
    /// its vCPUs* are dropped.
    ///
    /// # Errors
    /// Misaligned or overlapping regions, or too many of them.
    #[expect(
        unsafe_code,
        reason = "the caller guarantees the validity of memory that the guest will write"
    )]
    unsafe fn map_memory(&self, region: MemoryRegion) -> Result<(), Error>;

    /// Creates vCPU number `index` (0 is the boot processor).
    ///
    /// # Errors
    /// An index that is out of range or already used.
    fn create_vcpu(&self, index: u32) -> Result<Self::Seed, Error>;

    /// Opens an interrupt input.
    ///
    /// # Errors
    /// An input that does not exist, or an unsupported trigger mode.
    fn irq_line(&self, gsi: Gsi, trigger: IrqTrigger) -> Result<Arc<dyn IrqLine>, Error>;

    /// Makes writes that match `doorbell` signal `wake`. `Ok(false)` means that the backend
    /// has no such facility: the write then arrives on the bus.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn add_doorbell(&self, doorbell: Doorbell, wake: Wake<'_>) -> Result<bool, Error>;

    /// Saves interrupt controllers and clocks. All vCPUs must have left [`Vcpu::run`] and
    /// have been saved before.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn save(&self) -> Result<VmSavedState, Error>;

    /// Restores interrupt controllers and clocks, after every vCPU of the VM has been
    /// restored (`vcpus` proves it). Returns the tokens with which the vCPUs finish, by
    /// ascending index. Interrupt lines must be silent until all vCPUs have finished, unless
    /// [`FINISH_IS_EMPTY`](Self::FINISH_IS_EMPTY).
    ///
    /// # Errors
    /// A missing vCPU, one of another VM, or state from another kind of backend.
    fn restore(&self, state: &VmSavedState, vcpus: Vec<RestoredVcpu>)
    -> Result<Vec<Finish>, Error>;
}

/// A vCPU that no thread runs yet.
pub trait VcpuSeed: Send + 'static {
    /// Architecture of the vCPU.
    type Arch: Arch;
    /// The type of the bound vCPU.
    type Vcpu: Vcpu<Arch = Self::Arch>;

    /// Returns the vCPU's index.
    fn index(&self) -> u32;

    /// Returns a handle that makes the vCPU leave [`Vcpu::run`].
    fn kicker(&self) -> Arc<dyn Kicker>;

    /// Binds to the calling thread in the architecture's reset state (secondary processors
    /// wait for their start-up signal). The boot processor starts with `boot` instead.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn bind(self, boot: Option<&<Self::Arch as Arch>::Boot>) -> Result<Self::Vcpu, Error>;

    /// Binds to the calling thread with saved state, the first phase of a restore.
    ///
    /// # Errors
    /// State that does not fit this host; the reason names the first such element.
    fn bind_restored(
        self,
        state: &<Self::Arch as Arch>::Vcpu,
    ) -> Result<(<Self::Vcpu as Vcpu>::Restoring, RestoredVcpu), Error>;
}

/// Handle that makes a vCPU leave [`Vcpu::run`], from any thread.
pub trait Kicker: Send + Sync + Debug {
    /// Makes the vCPU leave. Sticky: if the vCPU is not running, its next [`Vcpu::run`]
    /// returns [`Exit::Cancelled`] immediately. Several kicks before that count as one.
    fn kick(&self);
}

/// A vCPU on the thread that runs it. Generic code cannot send it elsewhere, because the
/// trait does not imply `Send`.
pub trait Vcpu: Sized {
    /// Its architecture.
    type Arch: Arch;
    /// The vCPU between the phases of a restore.
    type Restoring: RestoringVcpu<Vcpu = Self>;

    /// Runs guest code. Device accesses are completed inside, through `bus`;
    /// only control exits return.
    ///
    /// # Errors
    /// The hypervisor failed in a way that the guest did not cause.
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, Error>;

    /// Saves all state that the architecture and Linux need. No device access is half
    /// completed: [`Vcpu::run`] completes one that it served before it returns.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn save(&mut self) -> Result<<Self::Arch as Arch>::Vcpu, Error>;

    /// Restores an earlier saved state in place, the first phase of a reset.
    ///
    /// # Errors
    /// State that does not fit this host. The vCPU is then lost.
    fn reload(
        self,
        state: &<Self::Arch as Arch>::Vcpu,
    ) -> Result<(Self::Restoring, RestoredVcpu), Error>;

    /// Notifies the guest that it was paused, so that its watchdogs do not fire.
    fn notify_paused(&mut self);
}

/// A vCPU whose state has been restored, and that waits on its thread for the VM's restore.
pub trait RestoringVcpu: Sized {
    /// The vCPU that can run.
    type Vcpu;

    /// Restores state that has to follow the interrupt controllers, the last phase of a
    /// restore.
    ///
    /// # Errors
    /// A token of another VM or vCPU, or state that does not fit this host. The vCPU is
    /// then lost.
    fn finish_restore(self, finish: Finish) -> Result<Self::Vcpu, Error>;
}

/// Reason why a vCPU stopped running guest code.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The vCPU was kicked.
    Cancelled,
    /// Halted without a way to be woken (interrupt controllers are in the hypervisor, so
    /// this does not occur for an ordinary idle guest).
    Halt,
    /// The guest asked to be reset (triple fault on x86 is [`Exit::TripleFault`]).
    Reset,
    /// The guest asked for power-off through the hypervisor.
    Shutdown,
    /// x86 shutdown state: a fault during double-fault delivery.
    TripleFault,
    /// The hypervisor cannot continue to run the guest.
    Fault(FaultInfo),
}

/// Details about a vCPU that cannot continue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultInfo {
    /// The hypervisor's report, for a person to read.
    pub reason: String,
    /// Program counter; zero if it could not be read.
    pub program_counter: u64,
    /// Bytes at the program counter; empty if they could not be read.
    pub instruction: Vec<u8>,
}
