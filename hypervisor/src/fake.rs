//! A scripted backend for tests: its vCPUs play a list of accesses and exits, on any
//! architecture.
//!
//! It has the properties of the interface that callers rely on: kicks are sticky, a kicked
//! vCPU continues with its next step, doorbells consume the writes they match, interrupts
//! wake a waiting vCPU, and saved state continues in another VM at the step at which it was
//! saved.

mod arch;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::arch::FakeArch;
pub use self::vcpu::{FakeRestoring, FakeSeed, FakeVcpu};
pub use self::vm::FakeVm;
use crate::{
    Capabilities, Doorbell, Error, Exit, Gsi, Hypervisor, LinuxSupport, OpenError, VmParameters,
    X86_64,
};

const BACKEND: &str = "fake";
const PAGE: u64 = 4096;

/// Next action of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reads this many bytes of device memory; the result is a [`FakeEvent::Read`].
    MmioRead(u64, usize),
    /// Writes device memory, or rings a doorbell.
    MmioWrite(u64, Vec<u8>),
    /// Reads this many bytes from a port.
    PioRead(u16, usize),
    /// Writes to a port.
    PioWrite(u16, Vec<u8>),
    /// Halts until this interrupt arrives once more.
    WaitIrq(Gsi),
    /// Leaves with this exit.
    Exit(Exit),
    /// Fails like a failure of the hypervisor.
    Fail,
}

/// An action that a fake machine recorded, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FakeEvent<A: FakeArch = X86_64> {
    /// Memory was mapped.
    Mapped {
        /// First guest physical address.
        guest_address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A vCPU was bound; the boot processor with registers.
    Bound(u32, Option<A::Boot>),
    /// State of a vCPU was restored.
    Restored(u32),
    /// State of the VM was restored.
    VmRestored,
    /// A vCPU finished its restore.
    Finished(u32),
    /// [`Vcpu::notify_paused`](crate::Vcpu::notify_paused) was called on a vCPU.
    Paused(u32),
    /// An interrupt line was pulsed.
    Irq(Gsi),
    /// A doorbell was rung.
    Rung(Doorbell),
    /// A vCPU read these bytes.
    Read(u32, Vec<u8>),
}

/// The backend; clones share everything.
#[derive(Clone, Debug)]
pub struct FakeHypervisor<A: FakeArch = X86_64> {
    inner: Arc<Inner<A>>,
}

#[derive(Debug)]
struct Inner<A: FakeArch> {
    scripts: Vec<Vec<Step>>,
    linux: LinuxSupport,
    events: Mutex<Vec<FakeEvent<A>>>,
}

/// Ignores poisoning: a test that panics with a lock held has failed anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHypervisor {
    /// Creates a backend of x86_64, as [`FakeHypervisor::of_arch`].
    #[must_use]
    pub fn new(scripts: Vec<Vec<Step>>) -> Self {
        Self::of_arch(scripts)
    }
}

impl<A: FakeArch> FakeHypervisor<A> {
    /// Creates a backend whose vCPU n plays script n. A vCPU at the end of its script, or
    /// without one, stays in the guest until it is kicked.
    #[must_use]
    pub fn of_arch(scripts: Vec<Vec<Step>>) -> Self {
        Self::with_linux(scripts, LinuxSupport::Native)
    }

    /// As [`FakeHypervisor::of_arch`], with this result of the capability probe.
    #[must_use]
    pub fn with_linux(scripts: Vec<Vec<Step>>, linux: LinuxSupport) -> Self {
        Self {
            inner: Arc::new(Inner {
                scripts,
                linux,
                events: Mutex::default(),
            }),
        }
    }

    /// Returns everything that happened since the last call.
    #[must_use]
    pub fn take_events(&self) -> Vec<FakeEvent<A>> {
        std::mem::take(&mut lock(&self.inner.events))
    }
}

impl<A: FakeArch> Inner<A> {
    fn note(&self, event: FakeEvent<A>) {
        lock(&self.events).push(event);
    }
}

impl<A: FakeArch> Hypervisor for FakeHypervisor<A> {
    type Arch = A;
    type Vm = FakeVm<A>;

    fn open() -> Result<Self, OpenError> {
        Ok(Self::of_arch(Vec::new()))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: BACKEND,
            max_vcpus: 64,
            linux: self.inner.linux.clone(),
        }
    }

    fn guest_features(&self) -> Result<A::Features, Error> {
        Ok(A::Features::default())
    }

    fn create_vm(&self, config: &VmParameters) -> Result<FakeVm<A>, Error> {
        Ok(FakeVm::new(self.inner.clone(), config.vcpus.max(1)))
    }
}
