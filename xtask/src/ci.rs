//! `cargo xtask ci`: everything a change has to pass.

use anyhow::Result;

use crate::apt::Apt;
use crate::build::cargo;
use crate::test::{self, Wanted};
use crate::{cmd, needs};

pub(crate) fn run(apt: &Apt) -> Result<()> {
    needs::everything(apt)?;
    cmd::step("checking the format");
    cmd::check(&mut cargo(["fmt", "--all", "--check"]))?;
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
    cmd::step("building the documentation");
    cmd::check(
        cargo(["doc", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    test::run(apt, &Wanted::default())
}
