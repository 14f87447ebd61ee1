//! The tuned guest kernel, from the distribution's own source package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::process::{output, run, run_logged, step};
use crate::{apt, paths};

/// Series with which the fragment was tested.
const SERIES: &str = "linux-source-6.12";
const TOOLS: [&str; 9] = [
    "build-essential",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "libssl-dev",
    "cpio",
    "kmod",
    "xz-utils",
];

/// Path of the kernel's ELF file, built when it is not in the cache.
pub fn tuned() -> Result<PathBuf> {
    let fragment_path = paths::workspace().join("guest/kernel/guest.config");
    let fragment = fs::read_to_string(&fragment_path).context("cannot read the configuration")?;
    let cache = paths::cache("kernels")?;
    if let Some(found) = newest_for(&cache, &fragment) {
        return Ok(found);
    }
    apt::refresh()?;
    if !apt::is_available(SERIES) {
        apt::enable_backports()?;
    }
    apt::ensure(&TOOLS)?;
    apt::ensure(&[SERIES])?;
    let version = output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", SERIES]))?;
    let compiler = output(Command::new("gcc").arg("-dumpfullversion"))?;
    let key = format!(
        "tuned-{}-{}",
        version.split('-').next().unwrap_or("unknown"),
        digest(&[&version, &fragment, &compiler])
    );
    build(&cache, &key, &fragment)
}

fn digest(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let bytes = hash.finalize();
    bytes.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// A kernel in the cache that was built with this fragment.
fn newest_for(cache: &Path, fragment: &str) -> Option<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(cache)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| fs::read_to_string(path.join("fragment")).is_ok_and(|f| f == fragment))
        .map(|path| path.join("vmlinux"))
        .filter(|path| path.is_file())
        .collect();
    found.sort_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok());
    found.pop()
}

fn build(cache: &Path, key: &str, fragment: &str) -> Result<PathBuf> {
    let target = cache.join(key);
    step("Building the guest kernel (about 6 minutes on two cores, once)");
    let started = Instant::now();
    let draft = paths::draft(cache)?;
    let log = cache.join("build.log");
    let _ = fs::remove_file(&log);
    let source = draft.path().join("source");
    fs::create_dir(&source)?;
    let archive = format!("/usr/src/{SERIES}.tar.xz");
    run(Command::new("tar")
        .args(["--strip-components=1", "-xf", &archive, "-C"])
        .arg(&source))?;
    fs::write(draft.path().join("fragment"), fragment)?;
    let make = |arguments: &[&str]| {
        let mut command = Command::new("make");
        command.arg("-C").arg(&source).arg("ARCH=x86_64").args(arguments);
        // The same bytes from the same source, whoever builds and when.
        command
            .env("KBUILD_BUILD_USER", "sm")
            .env("KBUILD_BUILD_HOST", "sm")
            .env("KBUILD_BUILD_TIMESTAMP", "2024-01-01");
        run_logged(&mut command, &log)
    };
    make(&["allnoconfig"])?;
    let mut config = fs::read_to_string(source.join(".config"))?;
    config.push_str(fragment);
    // The last setting of a symbol wins.
    fs::write(source.join(".config"), config)?;
    make(&["olddefconfig"])?;
    report_lost(fragment, &fs::read_to_string(source.join(".config"))?);
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    make(&[&format!("-j{jobs}"), "vmlinux"])?;
    run(Command::new("strip")
        .arg("-o")
        .arg(draft.path().join("vmlinux"))
        .arg(source.join("vmlinux")))?;
    fs::copy(source.join(".config"), draft.path().join("config"))?;
    fs::remove_dir_all(&source)?;
    paths::publish(draft, &target)?;
    step(&format!("Built the guest kernel in {} s", started.elapsed().as_secs()));
    let path = target.join("vmlinux");
    if !path.is_file() {
        bail!("{} is missing after the build", path.display());
    }
    Ok(path)
}

/// Says which symbols of the fragment the kernel's configuration did not take.
fn report_lost(fragment: &str, config: &str) {
    let lost: Vec<&str> = fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !line.ends_with("=n"))
        .filter(|line| !config.lines().any(|other| other == *line))
        .collect();
    if !lost.is_empty() {
        eprintln!("    not in this kernel: {}", lost.join(" "));
    }
}
