//! `cargo xtask ci`: all checks of a change.

use std::fs;

use anyhow::Result;

use crate::apt::Apt;
use crate::background::KernelBuild;
use crate::build::cargo;
use crate::test::{self, TestOptions};
use crate::{cmd, deny, needs, package, paths, tidy};

pub(crate) fn run(apt: &Apt) -> Result<()> {
    needs::everything(apt)?;
    note_space();
    let kernel = KernelBuild::start();
    cmd::step("checking the format");
    cmd::check(&mut cargo(["fmt", "--all", "--check"]))?;
    tidy::run()?;
    deny::run(apt)?;
    package::run(false)?;
    cmd::step("running clippy");
    cmd::check(&mut cargo([
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ]))?;
    // They are no tests of `cargo test`, so `--all-targets` leaves them out.
    cmd::check(&mut cargo([
        "clippy", "-p", "sm-e2e", "--test", "*", "--locked", "--", "-D", "warnings",
    ]))?;
    features()?;
    cmd::step("building the documentation");
    cmd::check(
        cargo(["doc", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    // Clippy has type-checked the benches; this links them. Unoptimised, they share their
    // dependencies with the unit tests.
    cmd::step("building the benches");
    cmd::check(&mut cargo([
        "build",
        "-p",
        "sm-benches",
        "--benches",
        "--locked",
    ]))?;
    cmd::step("checking the fuzz targets");
    cmd::check(
        cargo([
            "clippy",
            "--manifest-path",
            "fuzz/Cargo.toml",
            "--locked",
            "--bins",
            "--target-dir",
        ])
        .arg(paths::target())
        .args(["--", "-D", "warnings"])
        // The library is not linked, so it need not exist.
        .env("CUSTOM_LIBFUZZER_PATH", "/nowhere/libFuzzer.a"),
    )?;
    test::run(apt, &TestOptions::default(), Some(kernel))
}

/// Bytes that all steps write together, about.
const SPACE: u64 = 8 << 30;

/// Notes that the disk is probably too small: what fails then does not always say so.
fn note_space() {
    let free = fs::create_dir_all(paths::target())
        .ok()
        .and_then(|()| {
            let mut df = cmd::command("df", ["--output=avail", "--block-size=1"]);
            cmd::text(df.arg(paths::target())).ok()
        })
        .and_then(|text| text.lines().last()?.trim().parse().ok())
        .unwrap_or(u64::MAX);
    if free < SPACE {
        cmd::note(format_args!(
            "{} MiB are free for the build output, and the steps write about {}",
            free >> 20,
            SPACE >> 20
        ));
    }
}

/// The features of `sm-image`, each of which compiles alone. The workspace enables all.
const IMAGE_FEATURES: [&str; 4] = ["archive", "containers-storage", "engine", "registry"];

/// Checks `sm-image` without features and with each feature alone, and `sm-event-loop`
/// without features, as the guest agent uses it.
fn features() -> Result<()> {
    cmd::step("checking features");
    let without = [("sm-event-loop", ""), ("sm-image", "")];
    let with_one = IMAGE_FEATURES.map(|feature| ("sm-image", feature));
    for (package, feature) in without.into_iter().chain(with_one) {
        cmd::check(&mut cargo([
            "clippy",
            "-p",
            package,
            "--no-default-features",
            "--features",
            feature,
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]))?;
    }
    // Clippy only compiles; these run what disabled sources answer, and the examples of
    // the documentation.
    cmd::check(&mut cargo([
        "test",
        "-p",
        "sm-image",
        "--no-default-features",
        "--test",
        "features",
        "--locked",
    ]))?;
    cmd::check(&mut cargo([
        "test",
        "-p",
        "sm-event-loop",
        "--no-default-features",
        "--locked",
    ]))
}
