//! `cargo xtask bench-restore`: builds and runs `bench-restore` of `sm-benches`, on this
//! host and, if its KVM cannot run Linux, in the lab.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::build::{BuildProfile, cargo};
use crate::cpio::CpioArchive;
use crate::lab::{self, JobOutput, LabJob};
use crate::{cmd, fixtures, host, kernel, paths};

/// The init of the benchmark's guest: it prints a line every few milliseconds without
/// starting a process, which would take longer than everything that is measured.
const INIT: &str = "#!/bin/busybox sh\nwhile :; do echo tick; read -t 0.005 nothing; done\n";
/// Creates a file system for data with a page cache that can be dropped; all others in
/// the lab are memory. Snapshots are sparse files.
const LAB_DISK: &str = "truncate -s 16G /tmp/disk && mkfs.ext4 -q -F /tmp/disk && \
     mkdir /tmp/state && mount -o loop /tmp/disk /tmp/state && \
     export XDG_DATA_HOME=/tmp/state TMPDIR=/tmp/state";
/// Memory for the guest, its snapshots and those of a rival.
const LAB_MEMORY_MIB: u32 = 8192;

/// Measurements to take, and paths of reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchRestoreOptions {
    pub(crate) iterations: Option<u32>,
    pub(crate) memory_mib: Vec<u32>,
    pub(crate) vcpus: Vec<u32>,
    pub(crate) rivals: Vec<String>,
    /// Skips whole commands and rivals.
    pub(crate) vmm_only: bool,
    /// Skips the VMM alone.
    pub(crate) path_only: bool,
    pub(crate) json: Option<PathBuf>,
    pub(crate) html: Option<PathBuf>,
}

pub(crate) fn run(apt: &Apt, options: &BenchRestoreOptions) -> Result<()> {
    let bench = build(BuildProfile::Release)?;
    let work = paths::target().join("bench-restore");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {work:?}"))?;
    let mut reports = Vec::new();
    if !options.path_only {
        let report = work.join("vmm.json");
        cmd::step("restoring a tiny guest on this host's KVM, against the floor");
        let mut command = cmd::measured(&bench);
        command.arg("vmm").args(sizes(options));
        // Snapshots are on the disk of the build, so that a cold cache is one of that
        // disk.
        command.current_dir(&work).stdout(File::create(&report)?);
        match cmd::check(&mut command) {
            Ok(()) => reports.push(report),
            Err(error) if Path::new("/dev/kvm").exists() => return Err(error),
            Err(_) => cmd::note("left out: there is no /dev/kvm here"),
        }
    }
    if !options.vmm_only {
        reports.push(whole_commands(apt, options, &bench, &work)?);
    }
    let mut render = Command::new(&bench);
    render.arg("render").args(&reports);
    for (option, path) in [("--json", &options.json), ("--html", &options.html)] {
        if let Some(path) = path {
            render.arg(option).arg(path);
        }
    }
    cmd::check(&mut render)
}

pub(crate) fn build(profile: BuildProfile) -> Result<PathBuf> {
    cmd::step("building the benchmark");
    let name = "bench-restore";
    let mut build = cargo(["build", "--locked", "-p", "sm-benches", "--bin", name]);
    let directory = match profile {
        BuildProfile::Debug => "debug".to_owned(),
        // Contenders are static programs, as `sm` is.
        BuildProfile::Release => {
            let target = crate::build::static_target()?;
            build.args(["--release", "--target", &target]);
            format!("{target}/release")
        }
    };
    cmd::check(&mut build)?;
    Ok(paths::target().join(directory).join(name))
}

fn sizes(options: &BenchRestoreOptions) -> Vec<String> {
    let mut arguments = Vec::new();
    if let Some(iterations) = options.iterations {
        arguments.extend(["--iterations".to_owned(), iterations.to_string()]);
    }
    for mib in &options.memory_mib {
        arguments.extend(["--memory".to_owned(), mib.to_string()]);
    }
    for vcpus in &options.vcpus {
        arguments.extend(["--vcpus".to_owned(), vcpus.to_string()]);
    }
    arguments
}

/// Measures whole commands on a host that runs Linux guests; returns the report's path.
fn whole_commands(
    apt: &Apt,
    options: &BenchRestoreOptions,
    bench: &Path,
    work: &Path,
) -> Result<PathBuf> {
    if options.rivals.iter().any(|rival| rival == "qemu") {
        apt.ensure_qemu()?;
    }
    let sm = crate::build::sm(apt, BuildProfile::Release)?;
    let kernel = kernel::tuned(apt)?;
    let image = fixtures::demo_image(apt)?;
    let initramfs = initramfs()?;
    let text = |path: &Path| -> Result<String> {
        let text = path.to_str().context("a path is not UTF-8")?;
        Ok(text.to_owned())
    };
    let mut command = vec![
        text(bench)?,
        "path".to_owned(),
        "--sm".to_owned(),
        text(&sm)?,
        "--image".to_owned(),
        format!("oci:{}", text(&image)?),
        "--kernel".to_owned(),
        text(&kernel)?,
        "--initramfs".to_owned(),
        text(&initramfs)?,
        "--cold-cache".to_owned(),
    ];
    command.extend(sizes(options));
    for rival in &options.rivals {
        command.extend(["--vs".to_owned(), rival.clone()]);
    }
    let environment = [("SM_KERNEL".to_owned(), text(&kernel)?)];
    let report = work.join("path.json");
    match host::why_not_here(&sm)? {
        None => {
            cmd::step("whole commands on this host's KVM");
            // The state is on the disk of the build, which has a page cache to drop.
            let state = tempfile::tempdir_in(work)?;
            let mut here = cmd::measured(bench);
            here.args(command.iter().skip(1))
                .envs(environment)
                .env("XDG_DATA_HOME", state.path().join("data"))
                .env("XDG_RUNTIME_DIR", state.path().join("run"))
                .stdout(File::create(&report)?);
            cmd::check(&mut here)?;
        }
        Some(reason) => {
            cmd::step("whole commands in the lab (some 20 times slower than hardware)");
            cmd::note(reason);
            let results = tempfile::tempdir()?;
            let quoted: Vec<_> = command.iter().map(|word| lab::quoted(word)).collect();
            let line = format!(
                "{LAB_DISK} && {} >\"$SM_LAB_RESULTS/path.json\"",
                quoted.join(" ")
            );
            let job = LabJob {
                command: vec!["sh".to_owned(), "-c".to_owned(), line],
                environment: environment.to_vec(),
                results: Some(results.path().to_owned()),
                memory_mib: LAB_MEMORY_MIB,
                ..LabJob::default()
            };
            let lab = lab::prepare(apt)?;
            match lab::outlive_crashes(|| lab::run(&lab, &job, &JobOutput::Inherit))? {
                0 => fs::copy(results.path().join("path.json"), &report)
                    .context("the lab has left no report")?,
                status => bail!("the benchmark failed in the lab: status {status}"),
            };
        }
    }
    Ok(report)
}

/// Creates the initramfs of the guest that contenders restore.
pub(crate) fn initramfs() -> Result<PathBuf> {
    let path = paths::target().join("bench-restore.initramfs");
    let mut archive = CpioArchive::default();
    archive.directory("bin")?;
    archive.directory("dev")?;
    archive.character_device("dev/console", (5, 1))?;
    let busybox = fs::read("/bin/busybox").context("cannot read /bin/busybox")?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    fs::write(&path, archive.finish()?).with_context(|| format!("cannot write {path:?}"))?;
    Ok(path)
}
