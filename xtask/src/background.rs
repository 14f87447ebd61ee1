//! The kernel is built beside everything else: it takes the longest, and nothing but
//! guests waits for it.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};

use crate::cmd;

/// A build of the guest kernel that uses what processor time others leave.
///
/// It ends with this value, unless it has ended before; whoever needs the kernel then
/// goes on with the build where it was, and shows how.
pub(crate) struct KernelBuild(Option<Child>);

impl KernelBuild {
    /// Starts it. That it cannot be started shows when the kernel is needed.
    pub(crate) fn start() -> Self {
        let own = std::env::current_exe();
        let child = own.and_then(|own| {
            let mut build = cmd::command("nice", ["-n", "15"]);
            build
                .arg(own)
                .arg("kernel")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            // To be ended with all of its children.
            build.process_group(0).spawn()
        });
        Self(child.ok())
    }
}

impl Drop for KernelBuild {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else {
            return;
        };
        if matches!(child.try_wait(), Ok(None)) {
            let group = format!("-{}", child.id());
            // One that has just ended needs no signal.
            let _ = cmd::command("kill", ["-TERM", "--", &group])
                .stderr(Stdio::null())
                .status();
        }
        let _ = child.wait();
    }
}
