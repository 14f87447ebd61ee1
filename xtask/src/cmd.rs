//! Runs other programs, and prints progress.

use std::ffi::OsStr;
use std::fmt::Display;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The variable with which `cargo run` makes programs search about sixty directories for
/// libraries first. None of them has a library that ours need, and the search takes
/// longer than many of our programs run.
pub(crate) const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// Returns a command whose time is measured.
pub(crate) fn measured(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_remove(LIBRARY_PATH);
    command
}

/// Prints the start of a step. Steps go to standard error: standard output is for
/// results.
pub(crate) fn step(text: impl Display) {
    eprintln!("==> {text}");
}

/// Prints a note within a step.
pub(crate) fn note(text: impl Display) {
    eprintln!("    {text}");
}

/// Returns a command with arguments.
pub(crate) fn command<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Runs a command to its end; a status other than 0 is an error.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", name(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command and returns its output.
pub(crate) fn text(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", name(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", shown(command), output.status);
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} does not print text", name(command)))
}

/// Returns true if `program` is in the search path.
pub(crate) fn found(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).is_file())
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// Returns the command line, truncated.
fn shown(command: &Command) -> String {
    let mut line = name(command);
    for argument in command.get_args().take(8) {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    if command.get_args().len() > 8 {
        line.push_str(" ...");
    }
    line
}
