//! `cargo xtask bench-image`: images into disks, against the usual tools.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Result, bail};

use crate::apt::{self, Apt};
use crate::build::{BuildProfile, cargo};
use crate::{cmd, paths};

/// The tools to compare with, and those that create the image.
const PACKAGES: [&str; 7] = [
    "docker-registry",
    "erofs-utils",
    "gzip",
    "mmdebstrap",
    "skopeo",
    "time",
    "umoci",
];
/// Version of the image; it must be raised when the image changes.
const RECIPE: &str = "1";
/// Packages that add up to an image of about 200 MB.
const DEBIAN: &str = "ca-certificates,curl,openssl,perl,python3";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchImageOptions {
    pub(crate) iterations: Option<u32>,
    pub(crate) json: Option<PathBuf>,
    pub(crate) html: Option<PathBuf>,
}

pub(crate) fn run(apt: &Apt, options: &BenchImageOptions) -> Result<()> {
    apt.ensure(&PACKAGES)?;
    let sm = crate::build::sm(apt, BuildProfile::Release)?;
    cmd::step("building the benchmark");
    cmd::check(&mut cargo([
        "build",
        "--locked",
        "--release",
        "-p",
        "sm-benches",
        "--bin",
        "bench-image",
    ]))?;
    let layer = debian(apt)?;
    let work = paths::target().join("bench-image");
    fs::create_dir_all(&work)?;
    cmd::step("measuring");
    let mut bench = cmd::measured(paths::target().join("release/bench-image"));
    bench
        .current_dir(&work)
        .args(["measure", "--sm"])
        .arg(sm)
        .arg("--layer")
        .arg(layer);
    if let Some(iterations) = options.iterations {
        bench.args(["--iterations", &iterations.to_string()]);
    }
    let here = std::env::current_dir()?;
    for (option, path) in [("--json", &options.json), ("--html", &options.html)] {
        if let Some(path) = path {
            bench.arg(option).arg(here.join(path));
        }
    }
    cmd::check(&mut bench)
}

/// Creates a layout of one gzip layer, which contains a Debian system, with umoci.
fn debian(apt: &Apt) -> Result<PathBuf> {
    let cache = paths::cache("bench-image")?;
    let done = cache.join(format!("debian-v{RECIPE}"));
    let Some(_lock) = paths::lock_unless(&done, &cache)? else {
        return Ok(done);
    };
    if !apt::is_root() {
        bail!("the image is made as root, once: run \"sudo -E cargo xtask bench-image\"");
    }
    apt.ensure(&PACKAGES)?;
    cmd::step("making an image of some 200 MB (mmdebstrap)");
    let work = tempfile::tempdir_in(paths::cache("tmp")?)?;
    let tar = work.path().join("debian.tar");
    let (codename, source) = apt::release_source()?;
    cmd::check(
        cmd::command("mmdebstrap", ["--mode=root", "--variant=minbase"])
            .args(["--format=tar", &format!("--include={DEBIAN}")])
            .arg(codename)
            .arg(&tar)
            .arg(source)
            .stderr(Stdio::null()),
    )?;
    let umoci = |arguments: &[&str]| {
        let mut umoci = cmd::command("umoci", arguments);
        cmd::check(umoci.current_dir(work.path()).stdout(Stdio::null()))
    };
    umoci(&["init", "--layout", "debian"])?;
    umoci(&["new", "--image", "debian:latest"])?;
    umoci(&["raw", "add-layer", "--image", "debian:latest", "debian.tar"])?;
    umoci(&["gc", "--layout", "debian"])?;
    fs::rename(work.path().join("debian"), &done)?;
    Ok(done)
}
