//! Building the product: the agent first, then `sm` with the agent inside.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::process::{output, run, step};
use crate::paths;

const AGENT_TARGET: &str = "x86_64-unknown-linux-musl";

/// What a build made.
pub struct Built {
    /// The command, with the agent embedded.
    pub sm: PathBuf,
    /// The agent by itself.
    pub agent: PathBuf,
}

/// The cargo that runs this program.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::workspace());
    // These describe xtask's own build; a nested cargo is not to inherit them.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST") {
            command.env_remove(name);
        }
    }
    command
}

/// Builds the agent for the guest.
pub fn agent() -> Result<PathBuf> {
    let targets = output(Command::new("rustup").args(["target", "list", "--installed"]));
    if targets.is_ok_and(|list| !list.lines().any(|line| line == AGENT_TARGET)) {
        step(&format!("Adding the Rust target {AGENT_TARGET}"));
        run(Command::new("rustup").args(["target", "add", AGENT_TARGET]))?;
    }
    step("Building the guest agent");
    run(cargo().args([
        "build",
        "--quiet",
        "--package",
        "sm-guest-agent",
        "--profile",
        "agent",
        "--target",
        AGENT_TARGET,
    ]))?;
    Ok(paths::target().join(AGENT_TARGET).join("agent/sm-guest-agent"))
}

/// Release builds of agent and command.
pub fn release() -> Result<Built> {
    let agent = agent()?;
    step("Building sm");
    run(cargo()
        .args(["build", "--quiet", "--release", "--package", "sm-cli"])
        .env("SM_AGENT_BIN", &agent))?;
    Ok(Built {
        sm: paths::target().join("release/sm"),
        agent,
    })
}
