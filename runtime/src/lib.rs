//! The library API of sm: images, VMs, exec and snapshots, and the process
//! model behind them.
//!
//! Each VM runs in a process of its own (the VMM: this very executable, started
//! again), which outlives its starter unless told otherwise; there is no daemon.
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

mod causes;
mod config;
mod control;
mod control_error;
mod digests;
pub mod doctor;
mod endpoint;
mod error;
pub mod exec;
mod exit;
mod fdpass;
mod guest_agent;
pub mod home;
pub mod id;
pub mod image;
mod initramfs;
pub mod kernel;
mod launch;
pub mod logs;
mod output_log;
pub mod publish;
mod reaper;
pub mod record;
pub mod run;
pub mod session;
pub mod signal;
pub mod snapshots;
mod timed;
pub mod timings;
mod vm;
mod vmm;
pub mod workload;

pub use error::Error;
pub use image::Image;
pub use launch::{Paging, SnapshotReport, Stage, StageTimes, Status};
pub use publish::Publication;
pub use run::RunOptions;
pub use snapshots::Snapshot;
pub use vm::{Inspection, SignalSender, StateView, Vm};
pub use vmm::run_vmm_if_asked;
