//! `cargo xtask test`: unit tests on this host, end-to-end tests on this host or in the
//! lab.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::apt::{self, Apt};
use crate::background::KernelBuild;
use crate::build::{self, BuildProfile, cargo};
use crate::lab::{self, JobOutput, Lab, LabJob};
use crate::{bench_restore, cmd, fidelity, fixtures, host, kernel, stock};

/// Programs with which unit and property tests compare results, and a compiler.
pub(crate) const UNIT_PACKAGES: [&str; 17] = [
    "acpica-tools",
    "containerd",
    "curl",
    "gcc",
    "libc6-dev",
    "docker-registry",
    "e2fsprogs",
    "erofs-utils",
    "git",
    "iproute2",
    "iputils-ping",
    "openssl",
    "podman",
    "python3",
    "skopeo",
    "sqlite3",
    "umoci",
];
/// Time limit of a test program, for one that hangs. The lab is about 20 times slower
/// than hardware, and a busy machine several times slower than an idle one.
const LAB_TIMEOUT: Duration = Duration::from_secs(40 * 60);
/// That limit with `--full`. The whole of `fidelity` takes 40 minutes beside other work.
const FULL_LAB_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
/// Memory for a 6 GiB guest that uses little of it.
const LAB_MEMORY_MIB: u32 = 8192;

/// Prefix of end-to-end tests that run with `--full` only.
const FULL: &str = "full_";
/// Variable that enables slow tests.
const FULL_VARIABLE: &str = "SM_TEST_FULL";

/// The tests to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TestOptions {
    pub(crate) unit: bool,
    pub(crate) e2e: bool,
    /// True to use the lab even if KVM works.
    pub(crate) force_lab: bool,
    pub(crate) profile: BuildProfile,
    /// True to run tests that are too slow for CI: end-to-end tests by their prefix
    /// [`FULL`], others by `SM_TEST_FULL` in their environment.
    pub(crate) full: bool,
    /// Parts of names of end-to-end tests; empty for all.
    pub(crate) names: Vec<String>,
}

impl Default for TestOptions {
    fn default() -> Self {
        Self {
            unit: true,
            e2e: true,
            force_lab: false,
            profile: BuildProfile::Release,
            full: false,
            names: Vec::new(),
        }
    }
}

impl TestOptions {
    /// Returns the arguments that select the tests in a test program.
    fn selection(&self) -> Vec<String> {
        let mut arguments = self.names.clone();
        if !self.has_full() {
            // libtest-mimic does not accept the value as a word of its own.
            arguments.push(format!("--skip={FULL}"));
        }
        arguments
    }

    /// Returns true if tests with the prefix [`FULL`] are selected, by option or by name.
    fn has_full(&self) -> bool {
        self.full || self.names.iter().any(|name| name.starts_with(FULL))
    }
}

/// Runs the tests. Their packages must be installed; `kernel` is built in the meantime.
pub(crate) fn run(apt: &Apt, options: &TestOptions, kernel: Option<KernelBuild>) -> Result<()> {
    let mut results = Vec::new();
    if options.unit {
        cmd::step("unit and property tests");
        let started = Instant::now();
        let mut tests = cargo(["test", "--workspace", "--locked", "--no-fail-fast"]);
        // Tests fail instead of being left out when one of these needs is not met.
        let mut required = vec!["programs"];
        if options.full {
            tests.env(FULL_VARIABLE, "1");
        }
        if !apt::is_root() {
            cmd::note(
                "not root: image disks are not mounted and compared, \
                 and the agent is tested in the lab only",
            );
        } else {
            required.push("root");
        }
        if let Err(error) = host::open_kvm() {
            cmd::note(format_args!(
                "{error}: what needs a hypervisor is left out here and runs in the lab only"
            ));
        } else {
            required.push("kvm");
        }
        tests.env("SM_TEST_REQUIRED", required.join(","));
        let result = cmd::check(&mut tests);
        results.push(("unit and property tests", started.elapsed(), result));
    }
    if options.e2e {
        let started = Instant::now();
        let result = end_to_end(apt, options, kernel);
        results.push(("end-to-end tests", started.elapsed(), result));
    }
    let mut failed = false;
    cmd::step("summary");
    for (name, time, result) in &results {
        let seconds = time.as_secs();
        match result {
            Ok(()) => cmd::note(format_args!("ok      {name} ({seconds} s)")),
            Err(error) => {
                failed = true;
                cmd::note(format_args!("FAILED  {name} ({seconds} s): {error:#}"));
            }
        }
    }
    if failed {
        bail!("some tests failed");
    }
    Ok(())
}

fn end_to_end(apt: &Apt, options: &TestOptions, kernel: Option<KernelBuild>) -> Result<()> {
    let sm = build::sm(apt, options.profile)?;
    let mut tests = end_to_end_programs(apt)?;
    let mut environment = environment(apt, &sm, kernel)?;
    if options.has_full() {
        for (variable, images) in [
            ("SM_DOCKER", fixtures::docker(apt)?),
            ("SM_SYSTEMD", fixtures::systemd(apt)?),
            ("SM_WORK", fixtures::work(apt)?),
        ] {
            environment.push((variable.to_owned(), images.display().to_string()));
        }
    }
    if options.full {
        environment.push((FULL_VARIABLE.to_owned(), "1".to_owned()));
    }
    let here = host::why_not_here(&sm)?;
    match here {
        None if !options.force_lab => {
            cmd::step("end-to-end tests on this host's KVM");
            let tests = matching(tests, options)?;
            let failed = tests.iter().filter(|test| {
                !Command::new(test)
                    .args(options.selection())
                    .envs(environment.iter().cloned())
                    .status()
                    .is_ok_and(|status| status.success())
            });
            match failed.count() {
                0 => Ok(()),
                count => bail!("{count} of {} test programs failed", tests.len()),
            }
        }
        reason => {
            let reason = reason.unwrap_or_else(|| "asked for by --lab".to_owned());
            cmd::step("end-to-end tests in the lab");
            cmd::note(reason);
            // This host's KVM, if any, has run only tiny guests of these.
            tests.extend(backend_programs()?);
            let tests = matching(tests, options)?;
            in_the_lab(apt, options, &tests, &environment)
        }
    }
}

/// Boots the lab once for each test program, with as many concurrently as is sound: a
/// boot costs seconds, and when the emulated machine crashes, only one program has to be
/// repeated.
fn in_the_lab(
    apt: &Apt,
    options: &TestOptions,
    tests: &[PathBuf],
    environment: &[(String, String)],
) -> Result<()> {
    let lab = lab::prepare(apt)?;
    // The program that takes longest goes first, as all others fit beside it.
    let mut tests: Vec<_> = tests.iter().collect();
    tests.sort_by_key(|test| program_name(test) != "clones");
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(test) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !one_in_the_lab(&lab, options, test, environment)? {
                failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..lab::max_concurrent())
            .map(|_| scope.spawn(work))
            .collect();
        workers.into_iter().try_for_each(|worker| {
            let done = worker.join();
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    match failed.into_inner() {
        0 => Ok(()),
        count => bail!("{count} of {} test programs failed", tests.len()),
    }
}

/// Runs one test program; its output is printed when it has ended.
fn one_in_the_lab(
    lab: &Lab,
    options: &TestOptions,
    test: &Path,
    environment: &[(String, String)],
) -> Result<bool> {
    // An emulated machine can run two guests at a time; tests that start dozens of clones
    // run alone.
    let threads = match program_name(test) {
        "clones" => 1,
        _ => 2,
    };
    let mut command = vec![
        test.to_string_lossy().into_owned(),
        format!("--test-threads={threads}"),
    ];
    command.extend(options.selection());
    let job = LabJob {
        command,
        environment: environment.to_vec(),
        memory_mib: LAB_MEMORY_MIB,
        timeout: Some(match options.full {
            true => FULL_LAB_TIMEOUT,
            false => LAB_TIMEOUT,
        }),
        ..LabJob::default()
    };
    let buffered = Arc::default();
    let output = JobOutput::Buffer(Arc::clone(&buffered));
    let started = Instant::now();
    let ended = lab::outlive_crashes(|| lab::run(lab, &job, &output));
    let name = program_name(test);
    let seconds = started.elapsed().as_secs();
    let buffered = std::mem::take(&mut *buffered.lock().unwrap_or_else(PoisonError::into_inner));
    let mut out = io::stdout().lock();
    writeln!(out, "==> {name} in the lab, {seconds} s")?;
    out.write_all(&buffered)?;
    Ok(ended? == 0)
}

/// Returns the name of a test program, without the hash that Cargo appends.
fn program_name(test: &Path) -> &str {
    let name = test.file_name().and_then(OsStr::to_str).unwrap_or_default();
    name.rsplit_once('-').map_or(name, |(name, _)| name)
}

/// Returns the environment of the tests, as described in `tests/src/lib.rs`.
fn environment(apt: &Apt, sm: &Path, kernel: Option<KernelBuild>) -> Result<Vec<(String, String)>> {
    let mut environment = Vec::new();
    let mut set = |name: &str, path: PathBuf| -> Result<()> {
        let value = path.into_os_string().into_string();
        let value = value.ok().with_context(|| format!("{name} is not UTF-8"))?;
        environment.push((name.to_owned(), value));
        Ok(())
    };
    set("SM_BIN", sm.to_owned())?;
    set("SM_FIXTURES", fixtures::create(apt)?)?;
    // The value is empty if they cannot be created, which was reported.
    set("SM_FIDELITY", fidelity::create(apt)?.unwrap_or_default())?;
    set(
        "SM_BENCH_RESTORE",
        bench_restore::build(BuildProfile::Debug)?,
    )?;
    set("SM_LANES", build::guest_program(apt)?)?;
    set("SM_BENCH_INITRAMFS", bench_restore::initramfs()?)?;
    // The build continues below from its current state.
    drop(kernel);
    set("SM_KERNEL", kernel::tuned(apt)?)?;
    set("SM_STOCK_KERNEL", stock::kernel(apt)?)?;
    Ok(environment)
}

/// Returns the programs that contain one of the wanted tests.
fn matching(programs: Vec<PathBuf>, options: &TestOptions) -> Result<Vec<PathBuf>> {
    let mut matching = Vec::new();
    for program in programs {
        let list = cmd::text(
            Command::new(&program)
                .args(options.selection())
                .arg("--list"),
        )?;
        if list.lines().any(|line| line.ends_with(": test")) {
            matching.push(program);
        }
    }
    if matching.is_empty() {
        bail!("no test's name contains {}", options.names.join(" or "));
    }
    Ok(matching)
}

/// Returns tests of single crates that need a hypervisor, to run on the lab's as well,
/// and those that need root, unless they have run as root on this host.
fn backend_programs() -> Result<Vec<PathBuf>> {
    let mut build = cargo(["test", "--no-run", "--locked", "--message-format=json"]);
    build.args(["-p", "sm-hypervisor", "--test", "conformance"]);
    build.args(["-p", "sm-vmm-core", "--test", "machine_kvm"]);
    let mut programs = built(&mut build, 2)?;
    if !apt::is_root() {
        let mut build = cargo(["test", "--no-run", "--locked", "--message-format=json"]);
        build.args(["-p", "sm-guest-agent", "--test", "host"]);
        programs.extend(built(&mut build, 1)?);
    }
    Ok(programs)
}

/// Builds the test programs of `sm-e2e` and returns their paths.
fn end_to_end_programs(apt: &Apt) -> Result<Vec<PathBuf>> {
    let agent = build::agent(apt)?;
    cmd::step("building the end-to-end tests");
    let names = end_to_end_names()?;
    let mut build = cargo(["test", "-p", "sm-e2e", "--no-run"]);
    build.arg("--message-format=json-render-diagnostics");
    for name in &names {
        build.args(["--test", name]);
    }
    // The tests of the library are VMMs themselves.
    built(build.env("SM_AGENT_BIN", agent), names.len())
}

fn end_to_end_names() -> Result<Vec<String>> {
    let mut names: Vec<_> = fs::read_dir(crate::paths::root().join("tests/tests"))?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_suffix(".rs").map(str::to_owned)
        })
        .collect();
    names.sort();
    Ok(names)
}

/// Builds `count` test programs with cargo, and returns their paths.
fn built(build: &mut Command, count: usize) -> Result<Vec<PathBuf>> {
    let output = build
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("test programs do not build");
    }
    let found: Vec<PathBuf> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact")
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    if found.len() != count {
        bail!("cargo built {} of {count} test programs", found.len());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{TestOptions, end_to_end_names};

    /// Cargo finds programs that are not in the manifest, and runs them as unit tests.
    #[test]
    fn end_to_end_programs_are_no_unit_tests() {
        let manifest = crate::paths::root().join("tests/Cargo.toml");
        let manifest = std::fs::read_to_string(manifest).unwrap();
        for name in end_to_end_names().unwrap() {
            let entry = format!("[[test]]\nname = \"{name}\"\ntest = false\n");
            assert!(manifest.contains(&entry), "{name}");
        }
    }

    /// libtest skips by a part of a name, not by its beginning.
    #[test]
    fn only_long_tests_have_the_prefix_in_their_name() {
        for name in end_to_end_names().unwrap() {
            let source = crate::paths::root().join(format!("tests/tests/{name}.rs"));
            let source = std::fs::read_to_string(source).unwrap();
            for line in source.lines().filter(|line| line.starts_with("fn ")) {
                let name = line.trim_start_matches("fn ");
                let name = name.split('(').next().unwrap();
                assert_eq!(
                    name.contains(super::FULL),
                    name.starts_with(super::FULL),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn long_tests_run_when_all_are_wanted_or_they_are_named() {
        let mut options = TestOptions::default();
        assert_eq!(options.selection(), ["--skip=full_"]);
        options.names = vec!["run".to_owned()];
        assert_eq!(options.selection(), ["run", "--skip=full_"]);
        options.names = vec!["full_docker".to_owned()];
        assert_eq!(options.selection(), ["full_docker"]);
        let all = TestOptions {
            full: true,
            ..TestOptions::default()
        };
        assert!(all.selection().is_empty());
    }
}
