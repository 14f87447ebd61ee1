//! Packages fetched and unpacked without being installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

use crate::{apt, cmd, paths};

/// A package file; it is deleted with this value.
pub(crate) struct Deb {
    _directory: TempDir,
    path: PathBuf,
}

impl Deb {
    /// Downloads a package by apt's own means, so with its mirrors and its
    /// checks of signatures.
    pub(crate) fn fetch(package: &str) -> Result<Self> {
        cmd::step(format_args!("downloading {package}"));
        let directory = tempfile::tempdir_in(paths::cache("tmp")?)
            .context("cannot make a temporary directory")?;
        let mut get = cmd::command("apt-get", ["download", "-qq"]);
        if apt::is_root() {
            // The unprivileged user of apt cannot write into root's cache.
            get.args(["-o", "APT::Sandbox::User=root"]);
        }
        cmd::check(
            get.arg(package)
                .current_dir(directory.path())
                .stdout(std::io::stderr()),
        )?;
        let path = std::fs::read_dir(directory.path())?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|name| name == "deb"))
            .with_context(|| format!("apt downloaded nothing for {package}"))?;
        Ok(Self {
            _directory: directory,
            path,
        })
    }

    /// Unpacks all files below `target`.
    pub(crate) fn unpack(&self, target: &Path) -> Result<()> {
        cmd::check(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(&self.path)
                .arg(target),
        )
    }

    /// Streams one member of the package into a command's standard input.
    pub(crate) fn member_into(&self, member: &str, sink: &mut Command) -> Result<()> {
        let mut tar = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&self.path)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run dpkg-deb")?;
        let mut pick = Command::new("tar")
            .args(["-x", "-O", "-f", "-", member])
            .stdin(tar.stdout.take().context("dpkg-deb has no output")?)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run tar")?;
        let consumed = cmd::check(sink.stdin(pick.stdout.take().context("tar has no output")?));
        let picked = pick.wait()?;
        // tar may stop reading once it has the member: only its verdict counts.
        tar.wait()?;
        consumed?;
        if !picked.success() {
            bail!("{} has no {member}", self.path.display());
        }
        Ok(())
    }
}
