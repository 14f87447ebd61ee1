//! `cargo xtask bench-disk`: disks of layers and raw files, on this host.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::build::cargo;
use crate::{cmd, paths};

/// Measurements to take, and the path of the report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchDiskOptions {
    pub(crate) rounds: Option<u32>,
    /// A part of the names of measurements.
    pub(crate) only: Option<String>,
    /// Directory for the files; by default in the build output.
    pub(crate) directory: Option<PathBuf>,
    pub(crate) json: Option<PathBuf>,
}

pub(crate) fn run(options: &BenchDiskOptions) -> Result<()> {
    cmd::step("building the benchmark");
    let mut build = cargo(["build", "--locked", "-p", "sm-benches", "--bin", "disk"]);
    cmd::check(build.arg("--release"))?;
    let directory = match &options.directory {
        Some(directory) => directory.clone(),
        None => paths::target().join("bench-disk"),
    };
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {directory:?}"))?;
    let mut command = cmd::measured(paths::target().join("release/disk"));
    command.arg("--directory").arg(directory);
    if let Some(rounds) = options.rounds {
        command.arg("--rounds").arg(rounds.to_string());
    }
    if let Some(only) = &options.only {
        command.arg("--only").arg(only);
    }
    if let Some(json) = &options.json {
        command.arg("--json").arg(json);
    }
    cmd::check(&mut command)
}
