//! The process of a virtual machine: one machine and its supervisor.
//!
//! The program that starts a VM starts this process as `PROGRAM __vmm SHORT_ID`
//! ([`SUBCOMMAND`]), with the launch stream as its standard input. The first message on
//! that stream is the complete request
//! ([`LaunchRequest`](sm_control::launch::LaunchRequest)); then follow reports and, for an
//! attached launcher, the workload's session.
//! The process ends with its VM.
//!
//! | item | content |
//! |---|---|
//! | [`run_if_vmm`] | the entry point for a program's `main` |
//! | [`environment`] | the interface that the program implements |
//! | [`saved`] | the description of the VM in a snapshot |
//!
//! The rest is private:
//!
//! | module | content |
//! |---|---|
//! | `process` | from the launch request to the supervised machine |
//! | `source`, `cache` | the choice of a kernel or a snapshot; snapshots that starts create for later ones |
//! | `machine` | starting the machine with its devices, by booting or restoring |
//! | `paging`, `prefetch` | memory of a restored machine, and its working set |
//! | `serving`, `descriptors` | listeners of published ports; the budget of descriptors |
//! | `supervisor` | one `poll` loop over the agent, the workload, clients and deadlines: `stage` has the states, `guest_side` the way to a running workload, `clients` their requests, `snapshots` captures, `ending` the exit record and the end |
//! | `agent`, `conn`, `guest`, `clock_error` | the supervisor's view of the agent, of streams, of the machine, and of the guest's clock |
//! | `restart` | the next run of a VM with a restart policy, which replaces this process |
//! | `capturing` | captures of a machine, on a thread |
//!
//! A program provides records and boot files, and calls [`run_if_vmm`] first in `main`.
//! This one has a directory for each VM.
//!
//! ```
//! use std::fs::{self, File, OpenOptions};
//! use std::io::{self, Write as _};
//! use std::path::{Path, PathBuf};
//! use std::sync::Arc;
//!
//! use sm_control::exit::ExitRecord;
//! use sm_control::launch::{DiskSegment, ImageSource, LaunchRequest};
//! use sm_guest_proto::frame::FrameType;
//! use sm_vmm::environment::{BootAssets, Identity, OutputLog, VmRecord, VmmEnvironment};
//!
//! struct Program;
//!
//! impl VmmEnvironment for Program {
//!     fn open_record(&self, request: &LaunchRequest) -> io::Result<Arc<dyn VmRecord>> {
//!         Ok(Arc::new(Directory(request.data.join(request.config.id.as_str()))))
//!     }
//!
//!     fn boot_assets(&self, _: &LaunchRequest, _: &ImageSource) -> Result<BootAssets, String> {
//!         Ok(BootAssets {
//!             identity: Identity {
//!                 kernel: "SHA-256 of the kernel".to_owned(),
//!                 agent: "SHA-256 of the initramfs".to_owned(),
//!             },
//!             initramfs: Box::new(|| fs::read("/usr/lib/sm/initramfs")),
//!         })
//!     }
//!
//!     fn open_segment(&self, segment: &DiskSegment) -> io::Result<File> {
//!         File::open(&segment.path)
//!     }
//! }
//!
//! struct Directory(PathBuf);
//!
//! impl VmRecord for Directory {
//!     fn directory(&self) -> &Path {
//!         &self.0
//!     }
//!     fn console(&self) -> PathBuf {
//!         self.0.join("console.log")
//!     }
//!     fn control_socket(&self) -> PathBuf {
//!         self.0.join("control.sock")
//!     }
//!     fn exec_socket(&self) -> PathBuf {
//!         self.0.join("exec.sock")
//!     }
//!     fn output_log(&self) -> io::Result<Box<dyn OutputLog>> {
//!         let path = self.0.join("output");
//!         let file = OpenOptions::new().create(true).append(true).open(path)?;
//!         Ok(Box::new(Output(file)))
//!     }
//!     fn write_exit(&self, exit: &ExitRecord) -> io::Result<()> {
//!         fs::write(self.0.join("exit.json"), serde_json::to_vec(exit)?)
//!     }
//!     fn remove_sockets(&self) -> io::Result<()> {
//!         fs::remove_file(self.control_socket())?;
//!         fs::remove_file(self.exec_socket())
//!     }
//!     fn erase(&self) -> io::Result<()> {
//!         fs::remove_dir_all(&self.0)
//!     }
//! }
//!
//! struct Output(File);
//!
//! impl OutputLog for Output {
//!     fn append(&mut self, _: FrameType, bytes: &[u8]) -> io::Result<()> {
//!         self.0.write_all(bytes)
//!     }
//!     fn note_dropped(&mut self) -> io::Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! // Does not return in a process that was started for a VM.
//! sm_vmm::run_if_vmm(&Program);
//! ```
//!
//! Architecture invariants: the crate depends neither on the library that starts VMs nor
//! on a store of images; the supervisor waits for descriptors and deadlines only, and the
//! memory that input of a guest occupies is bounded. Platform: Linux with KVM.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod agent;
mod cache;
mod capturing;
mod clock_error;
mod conn;
mod descriptors;
pub mod disks;
pub mod environment;
mod failure;
mod guest;
mod log;
mod machine;
mod names;
mod paging;
mod prefetch;
mod process;
mod restart;
pub mod saved;
mod serving;
mod source;
mod supervisor;

/// Rules of networks, and their limits.
pub mod network {
    pub use crate::machine::{MAX_MTU, MIN_MTU};
    pub use sm_devices_net::policy::{NetRule, NetRuleError, RuleTarget};
}

use environment::VmmEnvironment;
pub use names::IMAGE_LABEL;
#[cfg(any(test, feature = "testing"))]
pub use supervisor::testing;

/// Environment variable of every VMM process. A process that has it and starts a VM was
/// started as a VMM and has not called [`run_if_vmm`]: the start is refused.
pub const VMM_VARIABLE: &str = "SM_VMM_PROCESS";

/// The hidden subcommand with which a program is started as the process of a VM.
pub const SUBCOMMAND: &str = "__vmm";

/// Runs the process of a VM in `environment`, and does not return, if this process was
/// started as one: its first argument is [`SUBCOMMAND`].
///
/// It must be called before any thread is started. The exit status is 0 if the VM was
/// supervised to its end, whatever that was, and 1 otherwise.
pub fn run_if_vmm(environment: &dyn VmmEnvironment) {
    let is_vmm = std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == SUBCOMMAND);
    if is_vmm {
        // The process exit releases everything that still refers to the machine.
        std::process::exit(match process::main(environment) {
            Ok(()) => 0,
            Err(error) => {
                tracing::error!(%error, "the VM's process failed");
                1
            }
        });
    }
}
