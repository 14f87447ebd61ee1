//! Packages that are downloaded and unpacked without being installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

use crate::{apt, cmd, paths};

/// A package file, which is deleted when this value is dropped.
pub(crate) struct Deb {
    _directory: TempDir,
    path: PathBuf,
}

impl Deb {
    /// Downloads a package with apt, and so with its mirrors and signature checks.
    pub(crate) fn fetch(package: &str) -> Result<Self> {
        cmd::step(format_args!("downloading {package}"));
        let directory = tempfile::tempdir_in(paths::cache("tmp")?)
            .context("cannot make a temporary directory")?;
        let mut get = cmd::command("apt-get", ["download", "-qq"]);
        if apt::is_root() {
            // The unprivileged user of apt cannot write to root's cache.
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
    ///
    /// The command is taken by value: a `Command` holds the pipe ends of its child until
    /// it is dropped. While this process holds the read end, the writer gets no SIGPIPE
    /// if the reader exits early, and blocks forever.
    pub(crate) fn member_into(&self, member: &str, mut sink: Command) -> Result<()> {
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
        sink.stdin(pick.stdout.take().context("tar has no output")?);
        let consumed = cmd::check(&mut sink);
        drop(sink);
        let picked = pick.wait()?;
        // tar may stop reading after the member: only its exit status counts.
        tar.wait()?;
        consumed?;
        if !picked.success() {
            bail!("{} has no {member}", self.path.display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::Deb;

    const MEMBER: &str = "./large";

    /// Creates a package with one file that is larger than any pipe.
    fn package() -> Deb {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("DEBIAN")).unwrap();
        let control = "Package: large\nVersion: 1\nArchitecture: all\n\
                       Maintainer: nobody <nobody@example.org>\nDescription: large\n";
        fs::write(tree.join("DEBIAN/control"), control).unwrap();
        fs::write(tree.join("large"), vec![b'x'; 4 << 20]).unwrap();
        let path = directory.path().join("large.deb");
        let made = Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Znone", "-b"])
            .args([&tree, &path])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        Deb {
            _directory: directory,
            path,
        }
    }

    #[test]
    fn a_member_arrives_whole() {
        let deb = package();
        let mut count = Command::new("sh");
        count.args(["-c", "test \"$(wc -c)\" -eq 4194304"]);
        deb.member_into(MEMBER, count).unwrap();
        let error = deb.member_into("./absent", Command::new("cat"));
        assert!(error.unwrap_err().to_string().contains("has no ./absent"));
    }

    #[test]
    fn a_reader_that_ends_early_is_an_error_and_no_hang() {
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            let failed = package().member_into(MEMBER, Command::new("false"));
            let missing = package().member_into(MEMBER, Command::new("/no/such/program"));
            let _ = done.send([failed, missing].map(|result| result.unwrap_err().to_string()));
        });
        let [failed, missing] = ended
            .recv_timeout(Duration::from_secs(60))
            .expect("the writer must not outlive its reader");
        assert!(failed.contains("false failed"), "{failed}");
        assert!(missing.contains("cannot run"), "{missing}");
    }
}
