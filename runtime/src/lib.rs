//! The library API of sm: images, VMs, exec and snapshots, and the process
//! model behind them.
//!
//! Each VM runs in a process of its own (the VMM, which is this executable, started again).
//! The process outlives its parent by default; there is no daemon.
//!
//! ```no_run
//! use sm_runtime::{Image, RunOptions};
//!
//! fn main() -> Result<(), sm_runtime::Error> {
//!     // This program is also the VMM of the VMs that it starts.
//!     sm_runtime::run_vmm_if_asked();
//!
//!     let image = Image::open("oci:./busybox")?;
//!     let mut vm = image.run(RunOptions::new().command(["sleep", "60"]).memory(256 << 20))?;
//!     let output = vm.exec(["uname", "-r"]).output()?;
//!     println!("{}", String::from_utf8_lossy(&output.stdout));
//!     vm.stop(None)?;
//!     vm.remove(false)
//! }
//! ```
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod digests;
pub mod doctor;
mod entry;
mod error;
pub mod exec;
mod guest_agent;
pub mod home;
pub mod image;
mod initramfs;
pub mod kernel;
pub mod logs;
mod output_log;
mod reaper;
pub mod record;
pub mod run;
pub mod snapshots;
mod vm;

pub use entry::run_vmm_if_asked;
pub use error::Error;
pub use image::Image;
pub use run::RunOptions;
pub use sm_control::launch::{Paging, SnapshotReport, Stage, StageTimes, Status};
pub use sm_control::publish::{self, Publication};
pub use sm_control::{signal, timings};
pub use snapshots::Snapshot;
pub use vm::{Inspection, SignalSender, StateView, Vm};

/// Identifiers and names of virtual machines.
pub mod id {
    pub use sm_control::id::{SHORT_LEN, VmId, is_valid_name};
}

/// A caller's connection to a command in a guest: the workload, or an exec.
pub mod session {
    pub use sm_control::session::{Event, Output, Session, SessionWriter, Stdin};
}

/// The workload of a virtual machine: an image's defaults merged with the caller's
/// overrides, by Docker's rules.
pub mod workload {
    pub use sm_control::workload::{ImageDefaults, Overrides, Rlimit, Workload, WorkloadError};
}
