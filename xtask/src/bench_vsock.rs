//! `cargo xtask bench-vsock`: the vsock device with a model of a guest on this host, and
//! published ports of a real guest, on this host or in the lab.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::build::{BuildProfile, cargo};
use crate::lab::{self, JobOutput, LabJob};
use crate::{cmd, fixtures, host, kernel, paths};

/// Measurements to take, and the path of the report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchVsockOptions {
    pub(crate) rounds: Option<u32>,
    /// Skips real guests.
    pub(crate) harness_only: bool,
    /// Skips the model.
    pub(crate) guest_only: bool,
    pub(crate) json: Option<PathBuf>,
}

pub(crate) fn run(apt: &Apt, options: &BenchVsockOptions) -> Result<()> {
    cmd::step("building the benchmark");
    let mut build = cargo(["build", "--locked", "-p", "sm-benches", "--bin", "vsock"]);
    cmd::check(build.arg("--release"))?;
    let bench = paths::target().join("release/vsock");
    let work = paths::target().join("bench-vsock");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {work:?}"))?;
    let mut reports = Vec::new();
    if !options.guest_only {
        cmd::step("the device with a model of a guest's driver");
        let report = work.join("harness.json");
        let mut command = cmd::measured(&bench);
        command.arg("--json").arg(&report).args(rounds(options));
        cmd::check(&mut command)?;
        reports.push(("harness", report));
    }
    if !options.harness_only {
        reports.push(("guest", real_guest(apt, options, &bench, &work)?));
    }
    if let Some(path) = &options.json {
        let mut parts = Vec::new();
        for (name, report) in reports {
            let text =
                fs::read_to_string(&report).with_context(|| format!("cannot read {report:?}"))?;
            parts.push(format!("\"{name}\": {text}"));
        }
        let text = format!("{{\n{}\n}}\n", parts.join(",\n"));
        fs::write(path, text).with_context(|| format!("cannot write {path:?}"))?;
    }
    Ok(())
}

fn rounds(options: &BenchVsockOptions) -> Vec<String> {
    let rounds = options.rounds.iter();
    rounds
        .flat_map(|rounds| ["--rounds".to_owned(), rounds.to_string()])
        .collect()
}

/// Measures a real guest on a host that runs Linux guests; returns the report's path.
fn real_guest(
    apt: &Apt,
    options: &BenchVsockOptions,
    bench: &Path,
    work: &Path,
) -> Result<PathBuf> {
    let sm = crate::build::sm(apt, BuildProfile::Release)?;
    let kernel = kernel::tuned(apt)?;
    let image = fixtures::demo_image(apt)?;
    let text = |path: &Path| -> Result<String> {
        let text = path.to_str().context("a path is not UTF-8")?;
        Ok(text.to_owned())
    };
    let why_not = host::why_not_here(&sm)?;
    let mut command = vec![
        text(bench)?,
        "--guest".to_owned(),
        text(&sm)?,
        "--image".to_owned(),
        format!("oci:{}", text(&image)?),
        "--mib".to_owned(),
        // Emulation is about 20 times slower.
        if why_not.is_none() { "512" } else { "16" }.to_owned(),
        "--json".to_owned(),
    ];
    let environment = [("SM_KERNEL".to_owned(), text(&kernel)?)];
    let report = work.join("guest.json");
    let Some(reason) = why_not else {
        cmd::step("published ports of a guest on this host's KVM");
        let state = tempfile::tempdir()?;
        let mut here = cmd::measured(bench);
        here.args(command.iter().skip(1))
            .arg(&report)
            .args(rounds(options))
            .envs(environment)
            .env("XDG_DATA_HOME", state.path().join("data"))
            .env("XDG_RUNTIME_DIR", state.path().join("run"));
        cmd::check(&mut here)?;
        return Ok(report);
    };
    cmd::step("published ports of a guest in the lab (some 20 times slower than hardware)");
    cmd::note(reason);
    let results = tempfile::tempdir()?;
    command.push("$SM_LAB_RESULTS/guest.json".to_owned());
    command.extend(rounds(options));
    let quoted: Vec<_> = command
        .iter()
        .map(|word| match word.starts_with('$') {
            true => format!("\"{word}\""),
            false => lab::quoted(word),
        })
        .collect();
    let job = LabJob {
        command: vec!["sh".to_owned(), "-c".to_owned(), quoted.join(" ")],
        environment: environment.to_vec(),
        results: Some(results.path().to_owned()),
        ..LabJob::default()
    };
    let lab = lab::prepare(apt)?;
    match lab::outlive_crashes(|| lab::run(&lab, &job, &JobOutput::Inherit))? {
        0 => fs::copy(results.path().join("guest.json"), &report)
            .context("the lab has left no report")?,
        status => bail!("the benchmark failed in the lab: status {status}"),
    };
    Ok(report)
}
