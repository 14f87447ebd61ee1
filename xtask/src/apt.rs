//! Packages of the distribution: what is missing is installed (as root) or asked
//! for in one line.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// QEMU that emulates SVM well enough for nested guests (see ARCHITECTURE.md).
const QEMU_MAJOR: u32 = 10;
const QEMU: &str = "qemu-system-x86";
const BACKPORTS: &str = "/etc/apt/sources.list.d/sm-backports.sources";

/// What this process knows of apt.
#[derive(Default)]
pub(crate) struct Apt {
    updated: Cell<bool>,
}

impl Apt {
    /// Sees to it that `packages` are installed.
    pub(crate) fn ensure(&self, packages: &[&str]) -> Result<()> {
        let missing: Vec<_> = packages
            .iter()
            .copied()
            .filter(|package| !installed(package))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        if !is_root() {
            bail!(
                "packages are missing; install them and try again:\n  sudo apt-get install -y \
                 --no-install-recommends {}",
                missing.join(" ")
            );
        }
        self.update();
        self.install(&missing)
    }

    /// Sees to it that QEMU is new enough, from the backports suite where the
    /// distribution's own is older.
    pub(crate) fn ensure_qemu(&self) -> Result<()> {
        if qemu_major().is_some_and(|major| major >= QEMU_MAJOR) {
            return Ok(());
        }
        let new_enough = |version: &String| major(version) >= QEMU_MAJOR;
        let mut options = vec!["install", "-y", "-qq", "--no-install-recommends"];
        let mut entry = None;
        let suite;
        if !self.candidate(QEMU)?.as_ref().is_some_and(new_enough) {
            let known = self.versions(QEMU)?.iter().any(new_enough);
            let backports = backports_entry()?;
            suite = backports.0;
            entry = (!known && !Path::new(BACKPORTS).exists()).then_some(backports.1);
            // For the packages it depends on as well.
            options.extend(["-t", &suite]);
        }
        options.push(QEMU);
        if !is_root() {
            let add = entry.map_or_else(String::new, |entry| {
                let text = entry.replace('\n', "\\n");
                format!("printf '{text}' | sudo tee {BACKPORTS} && sudo apt-get update && ")
            });
            bail!(
                "QEMU {QEMU_MAJOR} or later is needed; install it and try again:\n  {add}sudo \
                 apt-get {}",
                options.join(" ")
            );
        }
        if entry.is_some() {
            self.add_backports()?;
        }
        self.update();
        cmd::step("installing QEMU");
        cmd::check(quiet(&mut cmd::command("apt-get", options)))?;
        match qemu_major() {
            Some(major) if major >= QEMU_MAJOR => Ok(()),
            _ => bail!("apt has no QEMU {QEMU_MAJOR} or later for this distribution"),
        }
    }

    /// Adds the backports suite if it can be told and is not there yet. Returns
    /// whether apt may know more than before.
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

    /// The version that apt would install, if it knows the package.
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

    /// The package that a meta package stands for: the first of its
    /// dependencies that begins with `prefix`.
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

    /// All versions that apt knows.
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
        // A source that does not answer is not ours to judge: what is missing
        // in the end is reported by the step that needs it.
        if let Err(error) = cmd::check(quiet(&mut cmd::command("apt-get", ["update", "-qq"]))) {
            cmd::note(format_args!("{error:#}; going on"));
        }
    }

    fn install(&self, packages: &[&str]) -> Result<()> {
        cmd::step(format_args!("installing {}", packages.join(" ")));
        let mut install = cmd::command(
            "apt-get",
            ["install", "-y", "-qq", "--no-install-recommends"],
        );
        cmd::check(quiet(install.args(packages)))
    }
}

/// Non-interactive, and with its chatter on standard error.
fn quiet(command: &mut Command) -> &mut Command {
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
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

/// The upstream major version of a package version.
fn major(version: &str) -> u32 {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    let digits = upstream.split(|c: char| !c.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// The backports suite of this release and a sources entry for it, made from the
/// configured entry of the release itself: same mirror, same key.
fn backports_entry() -> Result<(String, String)> {
    let (codename, origin) = release_origin().with_context(|| {
        format!("cannot tell where QEMU {QEMU_MAJOR} or later is; put one in the PATH")
    })?;
    let suite = format!("{codename}-backports");
    let entry = origin.entry(&suite);
    Ok((suite, entry))
}

/// This release's code name, and its configured archive as a one-line entry.
pub(crate) fn release_source() -> Result<(String, String)> {
    let (codename, origin) = release_origin()?;
    let line = origin.line(&codename);
    Ok((codename, line))
}

fn release_origin() -> Result<(String, Origin)> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME")?;
    if !release.lines().any(|line| line == "ID=debian") {
        bail!("this distribution is not Debian");
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let origin = match file.extension().and_then(|name| name.to_str()) {
            Some("sources") => origin_of_stanzas(&text, &codename),
            Some("list") => origin_of_lines(&text, &codename),
            _ => None,
        };
        if let Some(origin) = origin {
            return Ok((codename, origin));
        }
    }
    bail!("no apt source for {codename}/main is configured")
}

/// Where a suite comes from.
#[derive(Debug, PartialEq, Eq)]
struct Origin {
    uris: String,
    signed_by: Option<String>,
}

impl Origin {
    fn entry(&self, suite: &str) -> String {
        let mut entry = format!(
            "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n",
            self.uris
        );
        if let Some(key) = &self.signed_by {
            entry.push_str(&format!("Signed-By: {key}\n"));
        }
        entry
    }

    fn line(&self, suite: &str) -> String {
        let uri = self.uris.split_whitespace().next().unwrap_or_default();
        match &self.signed_by {
            Some(key) => format!("deb [signed-by={key}] {uri} {suite} main"),
            None => format!("deb {uri} {suite} main"),
        }
    }
}

/// deb822 stanzas (sources.list(5)).
fn origin_of_stanzas(text: &str, codename: &str) -> Option<Origin> {
    let text: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    text.split(|line| line.trim().is_empty())
        .find_map(|stanza| {
            let field = |name: &str| {
                stanza.iter().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    key.eq_ignore_ascii_case(name).then(|| value.trim())
                })
            };
            let has =
                |name, word| field(name).is_some_and(|v| v.split_whitespace().any(|w| w == word));
            let usable = has("Types", "deb")
                && has("Suites", codename)
                && has("Components", "main")
                && !has("Enabled", "no");
            Some(Origin {
                uris: field("URIs").filter(|_| usable)?.to_owned(),
                // A key block that continues on other lines cannot be copied as one
                // word; without it apt falls back on its own keyring.
                signed_by: field("Signed-By")
                    .filter(|key| key.starts_with('/'))
                    .map(str::to_owned),
            })
        })
}

/// One-line entries (sources.list(5)).
fn origin_of_lines(text: &str, codename: &str) -> Option<Origin> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        let usable = words.next() == Some(codename) && words.any(|word| word == "main");
        usable.then(|| Origin {
            uris: uri.to_owned(),
            signed_by: options
                .split_whitespace()
                .find_map(|option| option.strip_prefix("signed-by="))
                .map(str::to_owned),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::{Origin, major, origin_of_lines, origin_of_stanzas};

    #[test]
    fn versions_with_and_without_an_epoch() {
        assert_eq!(major("1:10.0.2+ds-2"), 10);
        assert_eq!(major("7.2+dfsg-7"), 7);
        assert_eq!(major("junk"), 0);
    }

    #[test]
    fn a_stanza_of_the_release_is_found_among_others() {
        let text = "Types: deb\nURIs: http://security.example/d\nSuites: twelve-security\n\
                    Components: main\n\n# the archive\nTypes: deb\n# old\nURIs: http://mirror.example/d\n\
                    Suites: twelve twelve-updates\nComponents: main contrib\nSigned-By: /k.gpg\n";
        let origin = origin_of_stanzas(text, "twelve").unwrap();
        assert_eq!(origin.uris, "http://mirror.example/d");
        assert_eq!(
            origin.entry("twelve-backports"),
            "Types: deb\nURIs: http://mirror.example/d\nSuites: twelve-backports\n\
             Components: main\nSigned-By: /k.gpg\n"
        );
        assert_eq!(origin_of_stanzas(text, "thirteen"), None);
    }

    #[test]
    fn a_line_of_the_release_is_found_among_others() {
        let text = "# deb http://no.example/d twelve main\ndeb-src http://s.example/d twelve main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/d twelve contrib main\n";
        assert_eq!(
            origin_of_lines(text, "twelve"),
            Some(Origin {
                uris: "http://mirror.example/d".into(),
                signed_by: Some("/k.gpg".into())
            })
        );
    }
}
