//! One interface to the hypervisors of different hosts.
//!
//! A *backend* implements [`Hypervisor`], [`VirtualMachine`], [`VcpuSeed`], [`Vcpu`] and
//! [`RestoringVcpu`] for one operating system and one architecture of guests ([`Arch`]);
//! everything above is generic over it by static dispatch. Its [`Capabilities`] are data,
//! available before a VM exists. The VM never owns guest memory, and a vCPU never leaves
//! the thread on which it was bound.
//!
//! The life of a VM:
//!
//! 1. [`Hypervisor::open`], [`Hypervisor::create_vm`], [`VirtualMachine::map_memory`].
//! 2. [`VirtualMachine::create_vcpu`] for each vCPU; the seeds are sent to their threads.
//! 3. Each thread binds its seed: [`VcpuSeed::bind`] for a fresh machine,
//!    [`VcpuSeed::bind_restored`] for a saved one. The latter yields a vCPU that cannot
//!    run yet, and a [`RestoredVcpu`] token.
//! 4. A restored machine hands all tokens to [`VirtualMachine::restore`], which restores interrupt
//!    controllers and clocks *after* every vCPU has its state, and returns a [`Finish`]
//!    token for each.
//! 5. With it, each thread finishes its vCPU: [`RestoringVcpu::finish_restore`].
//! 6. Threads call [`Vcpu::run`] in a loop.
//!
//! [`Native`] is the backend of this host: [`kvm`] on x86_64 Linux, [`NoBackend`]
//! elsewhere; the interface itself builds on every host. Its traits are not sealed, so a
//! backend can be a crate of its own: `tests/conformance/outside.rs` contains one. The
//! tests in `tests/conformance`, which are generic over backends, specify a backend's
//! obligations. The feature `testing` adds `fake::FakeHypervisor`, which plays a script,
//! for tests of the layers above.
#![warn(missing_docs)]

mod arch;
mod bus;
mod caps;
mod error;
#[cfg(any(feature = "testing", test))]
pub mod fake;
pub mod kvm;
mod no_backend;
mod restore;
pub mod state;
mod sys;
#[cfg(any(feature = "testing", test))]
pub mod testing;
mod traits;

/// The examples of README.md.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use arch::{Aarch64, Arch, PlainData, X86_64};
pub use bus::Bus;
pub use caps::{Capabilities, LinuxSupport};
pub use error::{Error, OpenError, OpenErrorKind};
pub use no_backend::NoBackend;
pub use restore::{Finish, RestoredVcpu, VmIdentity};
pub use state::VmSavedState;
pub use sys::{Native, Wake};
pub use traits::{
    Doorbell, Exit, FaultInfo, Gsi, Hypervisor, IrqLine, IrqTrigger, Kicker, MemoryRegion,
    RestoringVcpu, Vcpu, VcpuSeed, VirtualMachine, VmParameters,
};
