//! The tuned guest kernel: the distribution's `linux-source` with our fragment.
//!
//! The cache key is a digest of the inputs. The build is beside the cache entry and
//! renamed when it is complete; an interrupted build is continued.

use std::fs;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::apt::Apt;
use crate::deb::Deb;
use crate::{apt, cmd, kconfig, paths};

/// The source of the series for which the fragment was written and tested.
pub(crate) const SOURCE: &str = "linux-source-6.12";
/// Part of the cache key; it must be raised when a change of the recipe changes its
/// result.
const RECIPE: &str = "2";
/// File with the symbols that are enabled by default, in a build and in a cache entry.
const DEFAULTS: &str = "defaults";
/// Approximate number of lines that make prints, for the progress.
const MAKE_LINES: usize = 2500;
pub(crate) const PACKAGES: [&str; 8] = [
    "gcc",
    "make",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "libssl-dev",
    "xz-utils",
];

/// The inputs of a kernel build.
struct Recipe {
    package: String,
    version: String,
    fragment: PathBuf,
    compiler: String,
}

/// Returns the tuned kernel, built unless the cache has it.
pub(crate) fn tuned(apt: &Apt) -> Result<PathBuf> {
    let recipe = Recipe::of_this_host(apt)?;
    let kernels = paths::cache("kernels")?;
    let key = recipe.key()?;
    let done = kernels.join(&key);
    let image = done.join("vmlinux");
    let Some(_lock) = paths::lock_unless(&image, &kernels)? else {
        // The list may have changed since the build.
        recipe.review(&done)?;
        return Ok(image);
    };
    apt.ensure(&PACKAGES)?;
    let work = kernels.join(format!(".build-{key}"));
    remove_other_builds(&kernels, &work)?;
    fs::create_dir_all(&work)?;
    recipe.source(&work)?;
    recipe.configure(&work)?;
    make(&work)?;
    let fresh = recipe.collect(&work)?;
    fs::rename(&fresh, &done).with_context(|| format!("cannot publish {:?}", done.display()))?;
    paths::remove(&work)?;
    cmd::step(format_args!("the guest kernel is {}", image.display()));
    Ok(image)
}

/// Returns the tuned kernel if the cache has it.
pub(crate) fn built(apt: &Apt) -> Result<Option<PathBuf>> {
    let key = Recipe::of_this_host(apt)?.key()?;
    let image = paths::cache("kernels")?.join(key).join("vmlinux");
    Ok(image.exists().then_some(image))
}

/// Removes interrupted builds of other recipes, which are not used any more.
fn remove_other_builds(kernels: &Path, ours: &Path) -> Result<()> {
    for entry in fs::read_dir(kernels)?.flatten() {
        let is_build = entry.file_name().to_string_lossy().starts_with(".build-");
        if is_build && entry.path() != ours {
            paths::remove(&entry.path())?;
        }
    }
    Ok(())
}

impl Recipe {
    fn of_this_host(apt: &Apt) -> Result<Self> {
        let package = match apt.candidate(SOURCE)? {
            Some(_) => SOURCE.to_owned(),
            None if apt.add_backports()? && apt.candidate(SOURCE)?.is_some() => SOURCE.to_owned(),
            None => {
                let package = apt.depends_on("linux-source", "linux-source-")?;
                cmd::note(format_args!(
                    "apt does not know {SOURCE}: building {package} instead"
                ));
                package
            }
        };
        let version = apt
            .candidate(&package)?
            .with_context(|| format!("apt does not know {package}"))?;
        apt.ensure(&["gcc"])?;
        let compiler = cmd::text(&mut cmd::command("gcc", ["-dumpfullversion"]))?;
        Ok(Self {
            package,
            version,
            fragment: paths::root().join("guest/kernel/guest.config"),
            compiler: compiler.trim().to_owned(),
        })
    }

    /// Returns the name in the cache: the upstream version, for people, and a digest of
    /// all inputs.
    fn key(&self) -> Result<String> {
        let fragment = fs::read(&self.fragment)
            .with_context(|| format!("cannot read {:?}", self.fragment.display()))?;
        let parts: [&[u8]; 4] = [
            self.version.as_bytes(),
            &fragment,
            self.compiler.as_bytes(),
            RECIPE.as_bytes(),
        ];
        let upstream = self
            .version
            .split(['-', '~', '+'])
            .next()
            .unwrap_or("linux");
        Ok(format!("{upstream}-{}", paths::fingerprint(&parts)))
    }

    fn source(&self, work: &Path) -> Result<()> {
        let tree = work.join("linux");
        if tree.exists() {
            cmd::step("continuing an interrupted kernel build");
            return Ok(());
        }
        let partial = work.join("linux.partial");
        paths::remove(&partial)?;
        fs::create_dir(&partial)?;
        let archive = format!("usr/src/{}.tar.xz", self.package);
        let mut unpack = cmd::command("tar", ["-xJ", "--strip-components=1", "-C"]);
        unpack.arg(&partial);
        let installed = Path::new("/").join(&archive);
        if apt::installed(&self.package) && installed.exists() {
            cmd::step(format_args!("unpacking {}", installed.display()));
            cmd::check(unpack.arg("-f").arg(&installed))?;
        } else {
            let deb = Deb::fetch(&format!("{}={}", self.package, self.version))?;
            cmd::step(format_args!("unpacking {}", self.package));
            unpack.args(["-f", "-"]);
            deb.member_into(&format!("./{archive}"), unpack)?;
        }
        fs::rename(&partial, &tree)?;
        Ok(())
    }

    /// Configures: all symbols off, then the fragment, then defaults of the visible
    /// symbols.
    fn configure(&self, work: &Path) -> Result<()> {
        let tree = work.join("linux");
        if tree.join(".config").exists() {
            return Ok(());
        }
        cmd::step("configuring the guest kernel");
        let quiet =
            |command: &mut Command| cmd::check(command.current_dir(&tree).stdout(Stdio::null()));
        quiet(clean_make(&["allnoconfig"]).env("KCONFIG_CONFIG", ".config.none"))?;
        // The script does not support blanks in paths.
        fs::copy(&self.fragment, tree.join(".config.asked"))?;
        let merge = ["-m", ".config.none", ".config.asked"];
        quiet(
            cmd::command("scripts/kconfig/merge_config.sh", merge)
                .env("KCONFIG_CONFIG", ".config.fresh"),
        )?;
        quiet(clean_make(&["olddefconfig"]).env("KCONFIG_CONFIG", ".config.fresh"))?;
        let fresh = tree.join(".config.fresh");
        let config = fs::read_to_string(&fresh)?;
        let mismatches = kconfig::mismatches(kconfig::FRAGMENT, &config);
        for line in &mismatches.other {
            cmd::note(format_args!("not in this kernel: {line}"));
        }
        if !mismatches.essential.is_empty() {
            bail!(
                "the configuration lost what sm needs: {}",
                mismatches.essential.join(", ")
            );
        }
        let newly_enabled =
            kconfig::newly_enabled(&kconfig::prompts(&tree)?, kconfig::FRAGMENT, &config);
        fs::write(work.join(DEFAULTS), newly_enabled.join("\n"))?;
        self.review(work)?;
        fs::rename(fresh, tree.join(".config"))?;
        Ok(())
    }

    /// Checks the symbols enabled by default in `directory`, a build or a cache entry,
    /// against the reviewed list.
    fn review(&self, directory: &Path) -> Result<()> {
        let path = directory.join(DEFAULTS);
        let newly_enabled = fs::read_to_string(&path)
            .with_context(|| format!("cannot read {:?}", path.display()))?;
        let newly_enabled: Vec<_> = newly_enabled.lines().collect();
        let unreviewed = kconfig::unreviewed(&newly_enabled, kconfig::REVIEWED);
        if unreviewed.is_empty() {
            return Ok(());
        }
        self.refuse(&format!(
            "the kernel's configuration turned on what nobody has asked for or reviewed: {}; \
             have it off in guest/kernel/guest.config, or on, or say in \
             guest/kernel/defaults.reviewed why it may be",
            unreviewed.join(", ")
        ))
    }

    /// Fails for the source for which the fragment and the lists were written. Other
    /// sources, which are built if that one is not available, have other symbols: prints
    /// a note.
    fn refuse(&self, why: &str) -> Result<()> {
        if self.package == SOURCE {
            bail!("{why}");
        }
        cmd::note(why);
        Ok(())
    }

    /// Collects the cache entry in a directory beside its final path.
    fn collect(&self, work: &Path) -> Result<PathBuf> {
        let tree = work.join("linux");
        let out = work.join("out");
        paths::remove(&out)?;
        fs::create_dir(&out)?;
        let image = out.join("vmlinux");
        cmd::check(
            Command::new("strip")
                .arg("-o")
                .arg(&image)
                .arg(tree.join("vmlinux")),
        )?;
        // XEN_ELFNOTE_PHYS32_ENTRY, the PVH entry point.
        let notes = cmd::text(Command::new("readelf").arg("-n").arg(&image))?;
        if !notes.contains("0x00000012") {
            bail!("the kernel that was built has no PVH entry point");
        }
        fs::copy(tree.join(".config"), out.join("config"))?;
        fs::copy(work.join(DEFAULTS), out.join(DEFAULTS))?;
        let meta = json!({
            "source": self.package,
            "version": self.version,
            "compiler": self.compiler,
            "recipe": RECIPE,
        });
        fs::write(out.join("meta.json"), format!("{meta:#}\n"))?;
        fs::File::open(&image)?.sync_all()?;
        Ok(out)
    }
}

/// Returns `make` with an environment independent of an outer make and of the clock.
fn clean_make(arguments: &[&str]) -> Command {
    let mut make = cmd::command("make", ["ARCH=x86_64"]);
    make.args(arguments)
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .env_remove("MAKELEVEL")
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
        .env("KBUILD_BUILD_USER", "sm")
        .env("KBUILD_BUILD_HOST", "sm")
        .stdin(Stdio::null());
    make
}

fn make(work: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    cmd::step(format_args!(
        "building the guest kernel with {jobs} jobs (about 15 CPU minutes, once)"
    ));
    let log_path = work.join("make.log");
    let mut log = fs::File::create(&log_path)?;
    let mut child = clean_make(&[&format!("-j{jobs}"), "vmlinux"])
        .current_dir(work.join("linux"))
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("cannot run make")?;
    let output = child.stdout.take().context("make has no output")?;
    let mut progress = BuildProgress::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        log.write_all(&line)?;
        log.write_all(b"\n")?;
        progress.line();
    }
    progress.end();
    if !child.wait()?.success() {
        let text = fs::read_to_string(&log_path).unwrap_or_default();
        let tail: Vec<_> = text.lines().rev().take(30).collect();
        for line in tail.iter().rev() {
            eprintln!("{line}");
        }
        bail!(
            "the kernel does not build; the log is {:?}",
            log_path.display()
        );
    }
    Ok(())
}

/// Progress: rewrites one line on a terminal; otherwise prints a line now and then.
struct BuildProgress {
    started: Instant,
    lines: usize,
    terminal: bool,
}

impl BuildProgress {
    fn new() -> Self {
        Self {
            started: Instant::now(),
            lines: 0,
            terminal: std::io::stderr().is_terminal(),
        }
    }

    fn line(&mut self) {
        self.lines += 1;
        let every = if self.terminal { 10 } else { 500 };
        if !self.lines.is_multiple_of(every) {
            return;
        }
        let percent = (self.lines * 100 / MAKE_LINES).min(99);
        let seconds = self.started.elapsed().as_secs();
        if self.terminal {
            eprint!("\r    {percent:2} % after {seconds} s ");
        } else {
            cmd::note(format_args!("{percent} % after {seconds} s"));
        }
    }

    fn end(&self) {
        if self.terminal {
            eprint!("\r");
        }
        cmd::note(format_args!(
            "make took {} s",
            self.started.elapsed().as_secs()
        ));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::{DEFAULTS, Recipe, SOURCE};

    fn recipe(package: &str) -> Recipe {
        Recipe {
            package: package.to_owned(),
            version: "1".to_owned(),
            fragment: PathBuf::new(),
            compiler: "1".to_owned(),
        }
    }

    #[test]
    fn an_unreviewed_default_fails_the_build() {
        let work = tempfile::tempdir().unwrap();
        let write = |names: &str| fs::write(work.path().join(DEFAULTS), names).unwrap();
        write("CONFIG_COMPACTION\nCONFIG_MITIGATION_YET_UNKNOWN");
        recipe(SOURCE).review(work.path()).unwrap();
        write("CONFIG_COMPACTION\nCONFIG_VSOCKETS_LOOPBACK\nCONFIG_VSOCKETS_DIAG");
        let error = recipe(SOURCE).review(work.path()).unwrap_err().to_string();
        assert!(
            error.contains("CONFIG_VSOCKETS_LOOPBACK, CONFIG_VSOCKETS_DIAG;"),
            "{error}"
        );
        // The lists are for one series.
        recipe("linux-source-6.1").review(work.path()).unwrap();
    }

    #[test]
    fn a_kernel_without_its_list_of_defaults_is_not_used() {
        let work = tempfile::tempdir().unwrap();
        let error = recipe(SOURCE).review(work.path()).unwrap_err();
        assert!(error.to_string().contains("cannot read"), "{error}");
    }
}
