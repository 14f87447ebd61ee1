//! Builds `sm` with its guest agent embedded.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::{cmd, paths};

/// The profile of `sm`; the agent always has its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum BuildProfile {
    Debug,
    #[default]
    Release,
}

/// A C compiler, and one for C code in dependencies of static programs.
pub(crate) const PACKAGES: [&str; 3] = ["gcc", "libc6-dev", "musl-tools"];

/// A directory for build output, and the environment of builds there.
#[derive(Clone, Debug)]
pub(crate) struct BuildDirectory {
    target: PathBuf,
    environment: Vec<(&'static str, OsString)>,
}

impl BuildDirectory {
    /// The build output of this workspace.
    fn usual() -> Self {
        Self {
            target: paths::target(),
            environment: Vec::new(),
        }
    }

    /// Builds with a kernel, whose output does not depend on the directories of the
    /// workspace, of the packages and of the toolchain.
    pub(crate) fn of_release(target: PathBuf, kernel: &Path, packed: &Path) -> Result<Self> {
        let sysroot = cmd::text(&mut cmd::command("rustc", ["--print", "sysroot"]))?;
        let home = std::env::var_os("CARGO_HOME").map_or_else(
            || {
                let home = std::env::var_os("HOME").context("HOME is not set")?;
                Ok::<_, anyhow::Error>(PathBuf::from(home).join(".cargo"))
            },
            |home| Ok(home.into()),
        )?;
        let maps = [
            (paths::root(), "/sm"),
            (home, "/cargo"),
            (PathBuf::from(sysroot.trim()), "/rust"),
            (target.clone(), "/target"),
        ];
        let mut rust = OsString::new();
        let mut c = OsString::from("-O2");
        for (from, to) in &maps {
            if !rust.is_empty() {
                // The separator of this variable, as paths may contain blanks.
                rust.push("\x1f");
            }
            rust.push("--remap-path-prefix=");
            rust.push(from);
            rust.push(format!("={to}"));
            // Blanks separate the flags of C compilers; such a path stays as it is.
            if !from.to_string_lossy().contains(' ') {
                c.push(" -ffile-prefix-map=");
                c.push(from);
                c.push(format!("={to}"));
            }
        }
        Ok(Self {
            target,
            environment: vec![
                ("CARGO_ENCODED_RUSTFLAGS", rust),
                ("CFLAGS", c),
                ("SM_KERNEL_BIN", kernel.into()),
                ("SM_KERNEL_ZST", packed.into()),
            ],
        })
    }

    fn cargo<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut cargo = cargo(arguments);
        cargo.envs(self.environment.iter().map(|(name, value)| (name, value)));
        cargo.arg("--target-dir").arg(&self.target);
        cargo
    }
}

/// Builds the agent, then `sm` with the agent embedded: one static program, which starts
/// in half the time of a dynamic one and needs no C library. Returns its path.
pub(crate) fn sm(apt: &Apt, profile: BuildProfile) -> Result<PathBuf> {
    let built = sm_of(apt, &BuildDirectory::usual(), profile)?;
    if profile == BuildProfile::Debug {
        return Ok(built);
    }
    // The path of a release is the same for all architectures.
    let released = paths::target().join("sm");
    let new = paths::target().join(".sm.new");
    fs::copy(&built, &new).with_context(|| format!("cannot write {new:?}"))?;
    fs::rename(&new, &released).with_context(|| format!("cannot write {released:?}"))?;
    Ok(released)
}

/// Builds the agent and `sm` in a directory of their own.
pub(crate) fn sm_in(apt: &Apt, build_directory: &BuildDirectory) -> Result<PathBuf> {
    sm_of(apt, build_directory, BuildProfile::Release)
}

fn sm_of(apt: &Apt, build_directory: &BuildDirectory, profile: BuildProfile) -> Result<PathBuf> {
    let agent = agent_in(apt, build_directory)?;
    cmd::step("building sm");
    let target = static_target()?;
    let mut build =
        build_directory.cargo(["build", "-p", "sm-cli", "--locked", "--target", &target]);
    let directory = match profile {
        BuildProfile::Debug => "debug",
        BuildProfile::Release => {
            build.arg("--release");
            "release"
        }
    };
    cmd::check(build.env("SM_AGENT_BIN", &agent))?;
    Ok(build_directory
        .target
        .join(target)
        .join(directory)
        .join("sm"))
}

/// Returns the target of static programs for this machine.
pub(crate) fn static_target() -> Result<String> {
    let target = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    ensure_target(&target)?;
    Ok(target)
}

/// Builds the guest agent.
pub(crate) fn agent(apt: &Apt) -> Result<PathBuf> {
    agent_in(apt, &BuildDirectory::usual())
}

fn agent_in(apt: &Apt, build_directory: &BuildDirectory) -> Result<PathBuf> {
    apt.ensure(&PACKAGES)?;
    let target = static_target()?;
    cmd::step("building the guest agent");
    cmd::check(&mut build_directory.cargo([
        "build",
        "-p",
        "sm-guest-agent",
        "--profile",
        "agent",
        "--target",
        &target,
    ]))?;
    Ok(build_directory
        .target
        .join(target)
        .join("agent/sm-guest-agent"))
}

/// Builds `sm-tree`, which can run in guests of any image.
pub(crate) fn tree(apt: &Apt) -> Result<PathBuf> {
    apt.ensure(&PACKAGES)?;
    let target = static_target()?;
    cmd::check(&mut cargo([
        "build",
        "-p",
        "sm-tree",
        "--profile",
        "agent",
        "--target",
        &target,
    ]))?;
    Ok(paths::target().join(target).join("agent/sm-tree"))
}

/// Builds the static program that tests run in guests.
pub(crate) fn guest_program(apt: &Apt) -> Result<PathBuf> {
    apt.ensure(&PACKAGES)?;
    let target = static_target()?;
    cmd::step("building a program for guests");
    let program = paths::target().join("lanes");
    let mut rustc = cmd::command("rustc", ["--edition", "2024", "-O", "-C", "strip=symbols"]);
    rustc
        .args([
            "-C",
            "target-feature=+crt-static",
            "--target",
            &target,
            "-o",
        ])
        .arg(&program)
        .arg(paths::root().join("tests/guest/lanes.rs"))
        .current_dir(paths::root());
    cmd::check(&mut rustc)?;
    Ok(program)
}

/// Adds the standard library for `target` to the toolchain.
fn ensure_target(target: &str) -> Result<()> {
    let sysroot =
        cmd::text(cmd::command("rustc", ["--print", "sysroot"]).current_dir(paths::root()))?;
    let library = Path::new(sysroot.trim())
        .join("lib/rustlib")
        .join(target)
        .join("lib");
    if library.exists() {
        return Ok(());
    }
    if !cmd::found("rustup") {
        bail!("the Rust toolchain has no standard library for {target}, and there is no rustup");
    }
    cmd::step(format_args!("adding the Rust target {target}"));
    cmd::check(cmd::command("rustup", ["target", "add", target]).current_dir(paths::root()))
        .context("cannot add the Rust target")
}

/// Returns a cargo command in this workspace.
pub(crate) fn cargo<const N: usize>(arguments: [&str; N]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut cargo = Command::new(program);
    cargo.args(arguments).current_dir(paths::root());
    cargo
}
