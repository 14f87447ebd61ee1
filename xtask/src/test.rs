//! All tests: those of the workspace here, and the end-to-end tests wherever
//! guests can run.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::process::{run as run_command, step};
use crate::{build, demo, fixtures, kernel, lab, stock};

/// The end-to-end test targets.
const END_TO_END: [&str; 3] = ["bad_use", "run", "lifecycle"];

pub fn run(arguments: &[OsString]) -> Result<()> {
    let built = build::release()?;
    let kernel = kernel::tuned()?;
    let stock_kernel = stock::guest_kernel()?;
    let fixtures = fixtures::all()?;
    if arguments.is_empty() {
        step("Unit, property and documentation tests");
        run_command(
            build::cargo()
                .args(["test", "--workspace", "--quiet"])
                .env("SM_AGENT_BIN", &built.agent),
        )?;
    }
    step("Building the end-to-end tests");
    let tests = end_to_end_binaries()?;
    let environment: Vec<(String, OsString)> = [
        ("SM_BIN", built.sm.clone()),
        ("SM_FIXTURES", fixtures),
        ("SM_KERNEL", kernel),
        ("SM_STOCK_KERNEL", stock_kernel),
    ]
    .map(|(name, path)| (name.to_owned(), path.into_os_string()))
    .into();
    let place = demo::why_not_here(&built);
    if let Some(reason) = &place {
        eprintln!("{reason} So the end-to-end tests run in the lab.");
    }
    let mut failed = Vec::new();
    for test in &tests {
        let mut words: Vec<OsString> = vec![test.clone().into(), "--test-threads=2".into()];
        words.extend_from_slice(arguments);
        let ok = if place.is_some() {
            let options = lab::Options {
                memory: 12_288,
                timeout: 1800,
                environment: environment.clone(),
                ..lab::Options::default()
            };
            lab::run(&options, &words)? == 0
        } else {
            Command::new(&words[0])
                .args(&words[1..])
                .envs(environment.iter().map(|(name, value)| (name, value)))
                .status()?
                .success()
        };
        if !ok {
            failed.push(test.display().to_string());
        }
    }
    if failed.is_empty() {
        step("All tests passed");
        Ok(())
    } else {
        bail!("these tests failed: {}", failed.join(", "))
    }
}

/// Builds the test programs and finds them.
fn end_to_end_binaries() -> Result<Vec<PathBuf>> {
    let mut command = build::cargo();
    command.args(["test", "--no-run", "--package", "sm-e2e"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    for name in END_TO_END {
        command.args(["--test", name]);
    }
    let output = command.stderr(std::process::Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("the end-to-end tests do not build");
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut found = Vec::new();
    for message in messages {
        let name = message.pointer("/target/name").and_then(|name| name.as_str());
        let path = message.get("executable").and_then(|path| path.as_str());
        if let (Some(name), Some(path)) = (name, path)
            && END_TO_END.contains(&name)
        {
            found.push(PathBuf::from(path));
        }
    }
    if found.len() != END_TO_END.len() {
        bail!("expected {} test programs, found {found:?}", END_TO_END.len());
    }
    Ok(found)
}
