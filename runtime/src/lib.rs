//! The library API of sm: images, VMs, exec and snapshots, and the process model behind them.
#![warn(missing_docs)]

mod control;
pub mod doctor;
mod error;
pub mod exec;
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
pub mod record;
pub mod run;
pub mod session;
pub mod signal;
pub mod snapshots;
pub mod timings;
mod vm;
mod vmm;
pub mod workload;

pub use error::Error;
pub use image::Image;
pub use launch::{Stage, Status};
pub use run::RunOptions;
pub use vm::{Inspection, SignalSender, StateView, Vm};
pub use vmm::run_vmm_if_asked;
