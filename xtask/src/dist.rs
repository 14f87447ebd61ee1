//! `cargo xtask dist`: a release, which is one static program with agent and kernel inside,
//! and its documents.
//!
//! The archive has the same bytes wherever the tree lies: paths are mapped in what the
//! compilers write, and entries are sorted and carry the time of the last commit.

mod check;
mod packages;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::apt::Apt;
use crate::build::{self, BuildDirectory};
use crate::{cmd, docs, kernel, paths};

pub(crate) const PACKAGES: [&str; 3] = ["zstd", "tar", "gzip"];

/// The work to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DistOptions {
    /// Runs the program from the archive in a lab that has nothing else of ours.
    pub(crate) check: bool,
}

/// Returns the archive.
pub(crate) fn run(apt: &Apt, options: DistOptions) -> Result<PathBuf> {
    apt.ensure(&PACKAGES)?;
    let kernel = kernel::tuned(apt)?;
    let dist = paths::target().join("dist");
    let version = env!("CARGO_PKG_VERSION");
    let name = format!("sm-{version}-{}-linux", std::env::consts::ARCH);
    let tree = dist.join(&name);
    paths::remove(&tree)?;
    fs::create_dir_all(&tree).with_context(|| format!("cannot create {tree:?}"))?;

    let packed = packed(&kernel, &dist)?;
    let build_directory = BuildDirectory::of_release(dist.join("build"), &kernel, &packed)?;
    let sm = build::sm_in(apt, &build_directory)?;
    fs::copy(&sm, tree.join("sm")).context("cannot copy the program")?;

    cmd::step("writing documents of the release");
    docs::run(apt, &docs::DocsOptions::Man(tree.join("man")))?;
    completions(&tree.join("sm"), &tree.join("completions"))?;
    fs::copy(paths::root().join("LICENSE"), tree.join("LICENSE"))?;
    let packages = packages::of_program(&build::static_target()?)?;
    fs::write(
        tree.join("THIRD-PARTY-LICENSES.txt"),
        packages::licences(&packages)?,
    )?;
    let sbom = packages::sbom(&packages, version, &meta(&kernel)?);
    fs::write(tree.join("sbom.cdx.json"), format!("{sbom:#}\n"))?;
    kernel_sources(&kernel, &tree.join("kernel"))?;

    let archive = archive(&dist, &name)?;
    let sums = cmd::text(
        cmd::command(
            "sha256sum",
            [format!("{name}.tar.gz"), format!("{name}/sm")],
        )
        .current_dir(&dist),
    )?;
    fs::write(dist.join("SHA256SUMS"), sums)?;
    if options.check {
        check::run(apt, &archive, &name)?;
    }
    Ok(archive)
}

/// Compresses the kernel, on one thread, which always gives the same bytes.
fn packed(kernel: &Path, dist: &Path) -> Result<PathBuf> {
    let packed = dist.join("vmlinux.zst");
    cmd::step("compressing the kernel");
    let mut zstd = cmd::command("zstd", ["-19", "-q", "-f", "--single-thread", "-o"]);
    cmd::check(zstd.arg(&packed).arg(kernel))?;
    Ok(packed)
}

fn completions(sm: &Path, directory: &Path) -> Result<()> {
    fs::create_dir(directory)?;
    for (shell, file) in [("bash", "sm.bash"), ("zsh", "_sm"), ("fish", "sm.fish")] {
        let script = cmd::text(&mut cmd::command(
            &sm.to_string_lossy(),
            ["completions", shell],
        ))?;
        fs::write(directory.join(file), script)?;
    }
    Ok(())
}

fn meta(kernel: &Path) -> Result<serde_json::Value> {
    let path = kernel.with_file_name("meta.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {path:?}"))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot parse {path:?}"))
}

/// Writes what is needed to obtain and build the kernel's source again, which its licence
/// (GPL-2.0) asks of whoever distributes it.
fn kernel_sources(kernel: &Path, directory: &Path) -> Result<()> {
    fs::create_dir(directory)?;
    fs::copy(kernel.with_file_name("config"), directory.join("config"))?;
    let fragment = paths::root().join("guest/kernel/guest.config");
    fs::copy(fragment, directory.join("guest.config"))?;
    let meta = meta(kernel)?;
    let of = |key: &str| meta[key].as_str().unwrap_or("unknown").to_owned();
    let text = format!(
        "The program contains a Linux kernel (GPL-2.0, without changes), built from Debian's\n\
         package {} {} with gcc {} and the configuration \"config\" here, which follows from\n\
         \"guest.config\". Its source:\n\n    apt-get download {}={}\n\n\
         or from Debian's archive of past versions, or from whoever gave you this one.\n\
         \"cargo xtask kernel\" in the source tree of sm builds it.\n",
        of("source"),
        of("version"),
        of("compiler"),
        of("source"),
        of("version"),
    );
    fs::write(directory.join("SOURCE"), text)?;
    Ok(())
}

/// Time stamp of all entries, in seconds since the epoch: that of the last commit.
fn epoch() -> Result<u64> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        return text
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH is {text:?}"));
    }
    let mut git = cmd::command("git", ["log", "-1", "--format=%ct"]);
    let text = cmd::text(git.current_dir(paths::root()))
        .context("cannot tell the time of the last commit; set SOURCE_DATE_EPOCH")?;
    text.trim().parse().context("git prints no time")
}

fn archive(dist: &Path, name: &str) -> Result<PathBuf> {
    let tar = dist.join(format!("{name}.tar"));
    let mut pack = cmd::command(
        "tar",
        [
            "--format=ustar",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--mode=u=rwX,go=rX",
            &format!("--mtime=@{}", epoch()?),
            "-cf",
        ],
    );
    cmd::check(pack.arg(&tar).arg("-C").arg(dist).arg(name))?;
    cmd::check(cmd::command("gzip", ["-9", "-n", "-f"]).arg(&tar))?;
    let archive = dist.join(format!("{name}.tar.gz"));
    if !archive.is_file() {
        bail!("gzip did not write {archive:?}");
    }
    Ok(archive)
}

/// Returns a component of a bill of materials.
fn component(kind: &str, name: &str, version: &str, licence: &str) -> serde_json::Value {
    json!({
        "type": kind,
        "name": name,
        "version": version,
        "licenses": [{ "expression": licence }],
    })
}
