//! Running other programs, and saying what is being done.

use std::ffi::OsStr;
use std::fmt::Display;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Where `cargo run` has programs look for libraries first: some sixty places, in which
/// there are none of what ours need. It takes longer than many of them do.
pub(crate) const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// A program whose time is measured.
pub(crate) fn measured(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_remove(LIBRARY_PATH);
    command
}

/// Says which step begins. Steps go to standard error: standard output is for
/// results.
pub(crate) fn step(text: impl Display) {
    eprintln!("==> {text}");
}

/// Says something worth knowing within a step.
pub(crate) fn note(text: impl Display) {
    eprintln!("    {text}");
}

/// A command with arguments.
pub(crate) fn command<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Runs a command to its end; any status but 0 is an error.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", name(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command and returns what it prints.
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

/// Whether `program` is found in the search path.
pub(crate) fn found(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).is_file())
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// The command line, cut to what helps.
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
