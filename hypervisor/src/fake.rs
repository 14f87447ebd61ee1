//! A scripted backend for tests: its vCPUs play a list of accesses and exits, on any
//! architecture.
//!
//! It keeps the promises of the seam that callers rely on: kicks are sticky, a
//! kicked vCPU goes on with its next step, doorbells swallow the writes they
//! match, interrupts wake a vCPU that waits, and saved state goes on in another
//! VM at the step it was saved at.

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
    Capabilities, Doorbell, Error, Exit, Gsi, Hypervisor, LinuxSupport, OpenError, VmConfig, X86_64,
};

const BACKEND: &str = "fake";
const PAGE: u64 = 4096;

/// What a vCPU does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reads so many bytes of device memory; the answer is an [`Event::Read`].
    MmioRead(u64, usize),
    /// Writes device memory, or rings a doorbell.
    MmioWrite(u64, Vec<u8>),
    /// Reads so many bytes from a port.
    PioRead(u16, usize),
    /// Writes to a port.
    PioWrite(u16, Vec<u8>),
    /// Halts until this interrupt has come once more.
    WaitIrq(Gsi),
    /// Leaves with this exit.
    Exit(Exit),
    /// Fails as if the hypervisor did.
    Fail,
}

/// What happened to a fake machine, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<A: FakeArch = X86_64> {
    /// Memory was mapped.
    Mapped {
        /// Where.
        guest_address: u64,
        /// How much, in bytes.
        len: u64,
    },
    /// A vCPU was bound; the boot processor with registers.
    Bound(u32, Option<A::Boot>),
    /// A vCPU got saved state.
    Restored(u32),
    /// The VM got saved state.
    VmRestored,
    /// A vCPU finished its restore.
    Finished(u32),
    /// A vCPU was told that it was paused.
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
    events: Mutex<Vec<Event<A>>>,
}

/// Tests that panic with a lock held fail anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHypervisor {
    /// A backend of x86_64, as [`FakeHypervisor::of_arch`].
    #[must_use]
    pub fn new(scripts: Vec<Vec<Step>>) -> Self {
        Self::of_arch(scripts)
    }
}

impl<A: FakeArch> FakeHypervisor<A> {
    /// A backend whose vCPU n plays script n. One that has played its script, or
    /// has none, stays in the guest until kicked.
    #[must_use]
    pub fn of_arch(scripts: Vec<Vec<Step>>) -> Self {
        Self::with_linux(scripts, LinuxSupport::Native)
    }

    /// As [`FakeHypervisor::of_arch`], with this answer of the capability probe.
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

    /// Everything that happened since the last call.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event<A>> {
        std::mem::take(&mut lock(&self.inner.events))
    }
}

impl<A: FakeArch> Inner<A> {
    fn note(&self, event: Event<A>) {
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

    fn create_vm(&self, config: &VmConfig) -> Result<FakeVm<A>, Error> {
        Ok(FakeVm::new(self.inner.clone(), config.vcpus.max(1)))
    }
}
