//! Builds the kernel in the background: it takes longest, and only guests need it.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};

use crate::cmd;

/// A build of the guest kernel at low priority.
///
/// Dropping this value stops it, if it still runs; the command that needs the kernel then
/// continues the build in the foreground, with progress.
pub(crate) struct KernelBuild(Option<Child>);

impl KernelBuild {
    /// Starts the build. A failure shows when the kernel is needed.
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
            // The group allows to kill the build with all its children.
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
            // An error means that the build has just ended.
            let _ = cmd::command("kill", ["-TERM", "--", &group])
                .stderr(Stdio::null())
                .status();
        }
        let _ = child.wait();
    }
}
