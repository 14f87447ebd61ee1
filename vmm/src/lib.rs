//! The VMM process: one machine and its supervisor.
//!
//! Started by the launcher as `PROGRAM __vmm SHORT_ID`, with the launch stream
//! as standard input. The first message on it is the whole request; everything
//! after that is reports and, for an attached launcher, the workload's session.

mod agent;
mod beginning;
mod cache;
mod capturing;
mod conn;
mod descriptors;
pub mod environment;
mod failure;
mod guest;
pub mod identity;
mod log;
mod machine;
pub mod names;
mod paging;
mod prefetch;
mod process;
pub mod saved;
mod serving;
mod supervisor;

#[cfg(any(test, feature = "testing"))]
pub use supervisor::testing;

use environment::Environment;

/// Set in the environment of VMMs, so that a program that was started as one and
/// starts VMs instead is found out.
pub const VMM_VARIABLE: &str = "SM_VMM_PROCESS";

/// The hidden subcommand that makes a program the VMM.
pub const SUBCOMMAND: &str = "__vmm";

/// The sentence for a host whose hypervisor cannot run Linux.
pub fn unusable(reason: &str) -> String {
    format!(
        "this host's /dev/kvm cannot run Linux guests: {reason}. Use a host with hardware \
         virtualisation (vmx or svm in /proc/cpuinfo)"
    )
}

/// Becomes a VMM in `environment`, and does not return, if this process was started as
/// one.
pub fn run_if_asked(environment: &dyn Environment) {
    let asked = std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == SUBCOMMAND);
    if asked {
        // Whatever still holds on to the machine goes with the process.
        std::process::exit(match process::main(environment) {
            Ok(()) => 0,
            Err(error) => {
                tracing::error!(%error, "the VM's process failed");
                1
            }
        });
    }
}
