//! Starting of external programs.

use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock};

/// Read-locked while a program is started. Until exec, the new process has all files open
/// that this process has.
static STARTING: RwLock<()> = RwLock::new(());

/// Starts a program that must be installed.
pub(crate) fn start(command: &mut Command) -> Child {
    // Most programs are written in Go, and exit before a garbage collection is
    // worthwhile.
    command.env("GOGC", "800");
    let _starting = STARTING.read().unwrap_or_else(PoisonError::into_inner);
    command
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?} is needed by this test: {error}"))
}

/// Runs a program and returns its output, or the last line of its errors.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = start(command).wait_with_output().unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(said.lines().next_back().unwrap_or_default().to_owned())
        }
    }
}

/// Runs `work` while no program is being started.
pub(crate) fn while_none_starts<T>(work: impl FnOnce() -> T) -> T {
    let _none = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    work()
}
