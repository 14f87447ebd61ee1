//! `cargo xtask bench-life`: what disks cost the commands of `sm`, and `sm cp`, on this
//! host or in the lab.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::build::{BuildProfile, cargo};
use crate::lab::{self, JobOutput, LabJob};
use crate::{cmd, fixtures, host, kernel, paths};

/// Measurements to take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchLifeOptions {
    pub(crate) rounds: Option<u32>,
    /// MiB of a file that is copied.
    pub(crate) mib: Option<u32>,
}

pub(crate) fn run(apt: &Apt, options: &BenchLifeOptions) -> Result<()> {
    cmd::step("building the benchmark");
    let mut build = cargo([
        "build",
        "--locked",
        "-p",
        "sm-benches",
        "--bin",
        "bench-life",
    ]);
    cmd::check(build.arg("--release"))?;
    let bench = paths::target().join("release/bench-life");
    let sm = crate::build::sm(apt, BuildProfile::Release)?;
    let kernel = kernel::tuned(apt)?;
    let image = fixtures::demo_image(apt)?;
    let text = |path: &Path| -> Result<String> {
        let text = path.to_str().context("a path is not UTF-8")?;
        Ok(text.to_owned())
    };
    let mut arguments = vec![
        "--sm".to_owned(),
        text(&sm)?,
        "--image".to_owned(),
        format!("oci:{}", text(&image)?),
    ];
    for (name, value) in [("--rounds", options.rounds), ("--mib", options.mib)] {
        if let Some(value) = value {
            arguments.extend([name.to_owned(), value.to_string()]);
        }
    }
    let environment = [("SM_KERNEL".to_owned(), text(&kernel)?)];
    let Some(reason) = host::why_not_here(&sm)? else {
        cmd::step("commands of sm on this host's KVM");
        let state = tempfile::tempdir()?;
        let mut here = cmd::measured(&bench);
        here.args(arguments)
            .envs(environment)
            .env("XDG_DATA_HOME", state.path().join("data"))
            .env("XDG_RUNTIME_DIR", state.path().join("run"));
        return cmd::check(&mut here);
    };
    cmd::step("commands of sm in the lab (some 20 times slower than hardware)");
    cmd::note(reason);
    let mut command = vec![text(&bench)?];
    command.extend(arguments);
    let job = LabJob {
        command,
        environment: environment.to_vec(),
        ..LabJob::default()
    };
    let lab = lab::prepare(apt)?;
    match lab::outlive_crashes(|| lab::run(&lab, &job, &JobOutput::Inherit))? {
        0 => Ok(()),
        status => bail!("the benchmark failed in the lab: status {status}"),
    }
}
