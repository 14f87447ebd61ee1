//! What has to pass before anything lands.

use anyhow::Result;

use crate::process::{run as run_command, step};
use crate::{build, test};

pub fn run() -> Result<()> {
    step("Formatting");
    run_command(build::cargo().args(["fmt", "--all", "--check"]))?;
    step("Lints");
    run_command(build::cargo().args([
        "clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings",
    ]))?;
    step("Documentation");
    run_command(
        build::cargo()
            .args(["doc", "--quiet", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    test::run(&[])
}
