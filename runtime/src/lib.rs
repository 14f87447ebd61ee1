//! The library API of sm: images, VMs, exec and snapshots, and the process
//! model behind them.
//!
//! Each VM runs in a process of its own, the VMM: this program, started again, or the one
//! that [`SmBuilder::vmm`] names. The process outlives its parent by default; there is no
//! daemon.
//!
//! ```no_run
//! use sm_runtime::{Force, RunOptions, Sm};
//!
//! fn main() -> Result<(), sm_runtime::Error> {
//!     // This program is also the VMM of the VMs that it starts.
//!     sm_runtime::run_vmm_if_asked();
//!
//!     let sm = Sm::new()?;
//!     let image = sm.image("oci:./busybox")?;
//!     let mut vm = image.run(RunOptions::new().command(["sleep", "60"]).memory(256 << 20))?;
//!     let output = vm.exec(["uname", "-r"]).output()?;
//!     println!("{}", String::from_utf8_lossy(&output.stdout));
//!     vm.stop(None)?;
//!     vm.remove(Force::No)
//! }
//! ```
//!
//! | type | |
//! |---|---|
//! | [`Sm`] | the handle: directories, programs, and everything below |
//! | [`Image`], [`image::Images`] | an image to run, the store of images |
//! | [`Vm`], [`Vms`] | a VM, all VMs |
//! | [`Snapshot`], [`snapshots::Snapshots`] | a workload to continue, the store of snapshots |
//! | [`events::EventStream`] | the events of all of them |
//! | [`kernel::Kernels`] | guest kernels of this host |
//! | [`Volume`], [`volumes::Volumes`] | disks that outlive VMs |
//! | [`Error`], [`ErrorKind`] | failures, and their kinds |
//!
//! All of them are owned values that can be sent to other threads, and none has a thread.
//! Dropping a [`Vm`] leaves the VM running; one thread for all of a program's VMs reaps
//! their processes, and exists only while there are any.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod commit;
mod digests;
mod doctor;
mod entry;
mod error;
pub mod events;
pub mod exec;
pub mod files;
mod guest_agent;
mod home;
pub mod image;
mod initramfs;
pub mod kernel;
pub mod logs;
pub mod network;
mod output_log;
mod reaper;
mod record;
mod run;
mod sm;
pub mod snapshots;
mod system;
mod vm;
pub mod volumes;

pub use doctor::Check;
pub use entry::run_vmm_if_asked;
pub use error::{Error, ErrorKind, FixedOption, OptionError, Refusal, StartError};
pub use guest_agent::AgentError;
pub use home::{Home, HomeError};
pub use image::Image;
pub use kernel::KernelError;
pub use record::{
    Damaged, ExitReason, ExitRecord, RecordError, RecordFormError, VmConfig, VmState,
};
pub use run::{
    DEFAULT_CPUS, DEFAULT_MEMORY, HealthOptions, MAX_ROOT_DISK, MIN_MEMORY, MIN_ROOT_DISK,
    OpenFiles, RootStorage, RunOptions, StartOptions,
};
pub use sm::{Sm, SmBuilder};
#[doc(no_inline)]
pub use sm_control as control;
pub use sm_control::config::{HealthCheck, HostChown, HostOptionError, HostOwner, RestartPolicy};
pub use sm_control::exit::FailureCause;
pub use sm_control::launch::{
    BalloonReport, HealthReport, HealthResult, HealthStatus, Paging, SnapshotReport, StageTimes,
};
pub use sm_control::publish::{self, Publication};
pub use sm_control::{signal, timings};
pub use sm_guest_proto::control::GuestStats;
pub use sm_guest_proto::exec::GuestProcess;
pub use snapshots::Snapshot;
pub use system::{DiskUsage, Resumed};
pub use vm::{
    AfterSnapshot, Force, Input, Inspection, Inspections, MountKindView, MountView, SignalSender,
    StateView, StorageView, Vm, VmStatus, VmUpdate, Vms,
};
#[doc(inline)]
pub use volumes::{Volume, VolumeError, VolumeKind, VolumeOptions};

/// Identifiers and names of virtual machines.
pub mod id {
    pub use sm_control::id::{SHORT_LEN, VmId, is_valid_name};
}

/// A caller's connection to a command in a guest: the workload, or an exec.
pub mod session {
    pub use sm_control::session::{Event, Output, Session, SessionWriter, Stdin};
    pub use sm_guest_proto::frame::FrameType;
}

/// The workload of a virtual machine: an image's defaults merged with the caller's
/// overrides, by Docker's rules.
pub mod workload {
    pub use sm_control::privileges::{GuestCapabilities, PrivilegeError, Privileges};
    pub use sm_control::workload::{
        ImageDefaults, Overrides, Rlimit, Sysctl, Workload, WorkloadError,
    };
}
