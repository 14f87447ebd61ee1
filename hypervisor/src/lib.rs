//! One virtual machine seam over the host's hypervisor.
//!
//! A *backend* implements [`Hypervisor`], [`Vm`], [`VcpuSeed`] and [`Vcpu`] for
//! one operating system and architecture; everything above is generic over it
//! by static dispatch. What a backend can do is data ([`Capabilities`]), asked
//! before a VM exists. The VM never owns guest memory, and a vCPU never leaves
//! the thread it was bound on.
//!
//! The life of a VM:
//!
//! 1. [`Hypervisor::open`], [`Hypervisor::create_vm`], [`Vm::map_memory`].
//! 2. [`Vm::create_vcpu`] for each vCPU; the seeds are sent to their threads.
//! 3. Each thread binds its seed: [`VcpuSeed::bind`] for a fresh machine,
//!    [`VcpuSeed::bind_restored`] for a saved one. The latter yields a
//!    [`RestoredVcpu`] token.
//! 4. A restored machine hands all tokens to [`Vm::restore`], which puts
//!    interrupt controllers and clocks back *after* every vCPU has its state.
//! 5. Threads call [`Vcpu::run`] in a loop.
//!
//! There is one backend so far, [`kvm`] on x86_64 Linux; the seam itself builds
//! on every host. What a backend must do is written down as the tests in
//! `tests/conformance`, which are generic over it. The feature `testing`
//! adds `fake::FakeHypervisor`, which plays a script, for tests of what stands above.
#![warn(missing_docs)]

mod arch;
mod bus;
mod caps;
mod error;
#[cfg(any(feature = "testing", test))]
pub mod fake;
pub mod kvm;
mod no_backend;
pub mod state;
mod sys;
#[cfg(any(feature = "testing", test))]
pub mod testing;
mod traits;

pub use arch::{Aarch64, Arch, PlainData, X86_64};
pub use bus::Bus;
pub use caps::{Capabilities, LinuxSupport};
pub use error::{Error, OpenError, OpenErrorKind};
pub use no_backend::NoBackend;
pub use state::VmState;
pub use sys::{Native, Wake};
pub use traits::{
    Doorbell, Exit, FaultInfo, Gsi, Hypervisor, IrqLine, IrqTrigger, Kicker, MemoryRegion,
    RestoredVcpu, Vcpu, VcpuSeed, Vm, VmConfig,
};
