//! `cargo xtask bench-fs`: the server of shared directories without a guest, on this host.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::build::cargo;
use crate::{cmd, paths};

/// Measurements to take, and the path of the report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchFsOptions {
    pub(crate) rounds: Option<u32>,
    /// Number of small files.
    pub(crate) files: Option<u32>,
    /// Length of a stream.
    pub(crate) mib: Option<u32>,
    /// Only LOOKUP, which needs neither root nor `/dev/fuse`.
    pub(crate) lookups: bool,
    /// Directory for the files; by default in the build output.
    pub(crate) directory: Option<PathBuf>,
    pub(crate) json: Option<PathBuf>,
}

pub(crate) fn run(options: &BenchFsOptions) -> Result<()> {
    cmd::step("building the benchmark");
    let mut build = cargo(["build", "--locked", "-p", "sm-benches", "--bin", "fs"]);
    cmd::check(build.arg("--release"))?;
    let directory = match &options.directory {
        Some(directory) => directory.clone(),
        None => paths::target().join("bench-fs"),
    };
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {directory:?}"))?;
    let mut command = cmd::measured(paths::target().join("release/fs"));
    command.arg("--directory").arg(directory);
    for (name, number) in [
        ("--rounds", options.rounds),
        ("--files", options.files),
        ("--mib", options.mib),
    ] {
        if let Some(number) = number {
            command.arg(name).arg(number.to_string());
        }
    }
    if options.lookups {
        command.arg("--lookups");
    }
    if let Some(json) = &options.json {
        command.arg("--json").arg(json);
    }
    cmd::check(&mut command)
}
