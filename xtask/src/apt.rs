//! Packages of the distribution: missing ones are installed (as root), or an error has
//! the command line that installs them.

mod sources;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use self::sources::backports_entry;
pub(crate) use self::sources::release_source;
use crate::cmd;

/// Minimum version of QEMU, whose SVM emulation can run nested guests (see
/// ARCHITECTURE.md).
const QEMU_MAJOR: u32 = 10;
const QEMU: &str = "qemu-system-x86";
const BACKPORTS: &str = "/etc/apt/sources.list.d/sm-backports.sources";
const INSTALL: [&str; 3] = ["install", "-y", "--no-install-recommends"];

/// Cached state of apt.
#[derive(Default)]
pub(crate) struct Apt {
    updated: Cell<bool>,
}

/// The packages that a command needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Packages that must be installed.
    pub(crate) packages: BTreeSet<&'static str>,
    /// A package that apt must know if possible, because it will be downloaded.
    pub(crate) known: Option<&'static str>,
    /// True for a QEMU that is new enough for the lab.
    pub(crate) qemu: bool,
}

/// The steps of an installation.
#[derive(Debug, Default, PartialEq, Eq)]
struct AptPlan {
    /// The sources entry of the backports suite, if apt lacks it.
    backports: Option<String>,
    packages: Vec<&'static str>,
    /// Installs QEMU, from the named suite unless the release itself has a new enough
    /// version.
    qemu: Option<Option<String>>,
}

impl AptPlan {
    /// Returns the command line for a person to run as root.
    fn line(&self) -> String {
        let mut steps = Vec::new();
        if let Some(entry) = &self.backports {
            let lines: Vec<_> = entry.lines().map(|line| format!("\"{line}\"")).collect();
            steps.push(format!(
                "printf \"%s\\n\" {} > {BACKPORTS}",
                lines.join(" ")
            ));
        }
        steps.push("apt-get update".to_owned());
        let install = |words: &[&str]| format!("apt-get {} {}", INSTALL.join(" "), words.join(" "));
        if !self.packages.is_empty() {
            steps.push(install(&self.packages));
        }
        match &self.qemu {
            None => {}
            Some(None) => steps.push(install(&[QEMU])),
            Some(Some(suite)) => steps.push(install(&["-t", suite, QEMU])),
        }
        format!("sudo sh -c '{}'", steps.join(" && "))
    }
}

impl Apt {
    /// Ensures that `packages` are installed.
    pub(crate) fn ensure(&self, packages: &[&'static str]) -> Result<()> {
        self.ensure_all(&Needs {
            packages: packages.iter().copied().collect(),
            ..Needs::default()
        })
    }

    /// Ensures that QEMU is new enough; it comes from the backports suite if the version
    /// of the distribution is older.
    pub(crate) fn ensure_qemu(&self) -> Result<()> {
        self.ensure_all(&Needs {
            qemu: true,
            ..Needs::default()
        })
    }

    /// Ensures everything at once: installs it as root, otherwise fails with a command
    /// line that does.
    pub(crate) fn ensure_all(&self, needs: &Needs) -> Result<()> {
        let packages = missing(&needs.packages);
        let qemu = needs.qemu && qemu_major().is_none_or(|major| major < QEMU_MAJOR);
        if packages.is_empty() && !qemu {
            return Ok(());
        }
        let plan = self.plan(packages, qemu, needs.known)?;
        if !is_root() {
            bail!(
                "packages are missing; install them by this line, then try again:\n  {}",
                plan.line()
            );
        }
        if plan.backports.is_some() {
            self.add_backports()?;
        }
        self.update();
        if !plan.packages.is_empty() {
            self.install(&plan.packages)?;
        }
        match &plan.qemu {
            None => return Ok(()),
            Some(None) => self.install(&[QEMU])?,
            // Its dependencies come from the suite as well.
            Some(Some(suite)) => self.install(&["-t", suite, QEMU])?,
        }
        match qemu_major() {
            Some(major) if major >= QEMU_MAJOR => Ok(()),
            _ => bail!("apt has no QEMU {QEMU_MAJOR} or later for this distribution"),
        }
    }

    fn plan(
        &self,
        packages: Vec<&'static str>,
        qemu: bool,
        known: Option<&str>,
    ) -> Result<AptPlan> {
        let new_enough = |version: &String| major(version) >= QEMU_MAJOR;
        let release_has_qemu = !qemu || self.candidate(QEMU)?.as_ref().is_some_and(new_enough);
        let apt_has_qemu = release_has_qemu || self.versions(QEMU)?.iter().any(new_enough);
        let apt_knows = match known {
            Some(package) => self.candidate(package)?.is_some(),
            None => true,
        };
        let backports = backports_entry();
        let suite = match (&backports, release_has_qemu) {
            (_, true) => None,
            (Ok((suite, _)), false) => Some(suite.clone()),
            (Err(error), false) => {
                bail!("there is no QEMU {QEMU_MAJOR} or later: {error:#}; put one in the PATH")
            }
        };
        let there = Path::new(BACKPORTS).exists() || (apt_has_qemu && apt_knows);
        Ok(AptPlan {
            backports: backports.ok().filter(|_| !there).map(|(_, entry)| entry),
            packages,
            qemu: qemu.then_some(suite),
        })
    }

    /// Adds the backports suite if it can be determined and is missing. Returns true if
    /// apt may know more packages than before.
    pub(crate) fn add_backports(&self) -> Result<bool> {
        if !is_root() || Path::new(BACKPORTS).exists() {
            return Ok(false);
        }
        let Ok((_, entry)) = backports_entry() else {
            return Ok(false);
        };
        cmd::step(format_args!("adding the backports suite in {BACKPORTS}"));
        fs::write(BACKPORTS, entry).with_context(|| format!("cannot write {BACKPORTS}"))?;
        self.updated.set(false);
        self.update();
        Ok(true)
    }

    /// Returns the version that apt would install, if it knows the package.
    pub(crate) fn candidate(&self, package: &str) -> Result<Option<String>> {
        let look = || -> Result<Option<String>> {
            let policy = cmd::text(&mut cmd::command("apt-cache", ["policy", package]))?;
            Ok(policy
                .lines()
                .find_map(|line| line.trim().strip_prefix("Candidate: "))
                .filter(|version| *version != "(none)")
                .map(str::to_owned))
        };
        match look()? {
            None if is_root() && !self.updated.get() => {
                self.update();
                look()
            }
            found => Ok(found),
        }
    }

    /// Returns the package that a meta package stands for: the first of its dependencies
    /// with this `prefix`.
    pub(crate) fn depends_on(&self, package: &str, prefix: &str) -> Result<String> {
        if self.candidate(package)?.is_none() {
            bail!("apt does not know the package {package}; try \"apt-get update\"");
        }
        let text = cmd::text(&mut cmd::command("apt-cache", ["depends", package]))?;
        text.lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .with_context(|| format!("the package {package} depends on no {prefix}*"))
    }

    /// Returns all versions that apt knows.
    fn versions(&self, package: &str) -> Result<Vec<String>> {
        let text = cmd::text(&mut cmd::command("apt-cache", ["madison", package]))?;
        Ok(text
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(|version| version.trim().to_owned())
            .collect())
    }

    fn update(&self) {
        if self.updated.replace(true) {
            return;
        }
        cmd::step("updating the package lists");
        // A failing source may not matter: the step that needs a missing package reports
        // it.
        if let Err(error) = cmd::check(quiet(&mut cmd::command("apt-get", ["update", "-qq"]))) {
            cmd::note(format_args!("{error:#}; continuing"));
        }
    }

    fn install(&self, packages: &[&str]) -> Result<()> {
        cmd::step(format_args!("installing {}", packages.join(" ")));
        let mut install = cmd::command("apt-get", INSTALL);
        cmd::check(quiet(install.arg("-qq").args(packages)))
    }
}

/// Makes apt non-interactive, with its messages on standard error.
fn quiet(command: &mut Command) -> &mut Command {
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// Returns those of `packages` that are not installed.
fn missing(packages: &BTreeSet<&'static str>) -> Vec<&'static str> {
    let installed = Command::new("dpkg-query")
        .args(["-W", "-f=${Package} ${db:Status-Abbrev}\n"])
        .args(packages)
        .stderr(Stdio::null())
        .output();
    let installed = installed.map_or_else(|_| Vec::new(), |output| output.stdout);
    let installed = String::from_utf8_lossy(&installed);
    let is_installed = |package: &&str| {
        let mut lines = installed.lines().map(str::split_whitespace);
        lines.any(|mut words| words.next() == Some(package) && words.next() == Some("ii"))
    };
    let packages = packages.iter().copied();
    packages.filter(|package| !is_installed(package)).collect()
}

pub(crate) fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Abbrev}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.stdout.starts_with(b"ii"))
}

fn qemu_major() -> Option<u32> {
    let output = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (_, version) = text.split_once("version ")?;
    Some(major(version))
}

/// Returns the upstream major version of a package version.
fn major(version: &str) -> u32 {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    let digits = upstream.split(|c: char| !c.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{AptPlan, major};

    #[test]
    fn versions_with_and_without_an_epoch() {
        assert_eq!(major("1:10.0.2+ds-2"), 10);
        assert_eq!(major("7.2+dfsg-7"), 7);
        assert_eq!(major("junk"), 0);
    }

    #[test]
    fn everything_is_asked_for_in_one_line() {
        let plan = AptPlan {
            backports: Some("Types: deb\nURIs: http://m.example/d\n".into()),
            packages: vec!["bc", "gcc"],
            qemu: Some(Some("twelve-backports".into())),
        };
        assert_eq!(
            plan.line(),
            "sudo sh -c 'printf \"%s\\n\" \"Types: deb\" \"URIs: http://m.example/d\" \
             > /etc/apt/sources.list.d/sm-backports.sources && apt-get update && \
             apt-get install -y --no-install-recommends bc gcc && \
             apt-get install -y --no-install-recommends -t twelve-backports qemu-system-x86'"
        );
        let plan = AptPlan {
            packages: vec!["gcc"],
            ..AptPlan::default()
        };
        assert_eq!(
            plan.line(),
            "sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends gcc'"
        );
    }
}
