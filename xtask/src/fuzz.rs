//! `cargo xtask fuzz`: runs the fuzz targets for a given CPU time.
//!
//! Corpora, findings and the time of each target are in the cache, so that an hour can be
//! spent in parts. The repository has a minimised corpus of each target, as an archive.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::{cmd, paths};

/// `g++` compiles libFuzzer, `fsck.erofs` checks disks, and `time` measures CPU time.
const PACKAGES: [&str; 3] = ["erofs-utils", "g++", "time"];
/// Seconds that a target runs before another one gets a turn.
const TURN: u32 = 120;

/// Targets to run (all by default), and their time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FuzzOptions {
    pub(crate) names: Vec<String>,
    /// Total minutes of CPU time per target, including earlier runs.
    pub(crate) minutes: Option<u32>,
    /// True to write minimised corpora to the repository afterwards.
    pub(crate) save: bool,
}

/// A target with its program and directory.
struct FuzzTarget {
    name: String,
    program: PathBuf,
    home: PathBuf,
}

pub(crate) fn run(apt: &Apt, options: &FuzzOptions) -> Result<()> {
    apt.ensure(&PACKAGES)?;
    let targets = build(options)?;
    let enough = f64::from(options.minutes.unwrap_or(60)) * 60.0;
    cmd::step(format_args!(
        "running {} fuzz targets until each has had {enough} s of a CPU",
        targets.len()
    ));
    let waiting = Mutex::new(targets);
    let (done, broken) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let work = || -> Result<()> {
        loop {
            // The target with the least time is next; no other thread takes it.
            let target = {
                let mut waiting = waiting.lock().unwrap_or_else(|e| e.into_inner());
                waiting.sort_by(|a, b| b.spent().total_cmp(&a.spent()));
                match waiting.pop() {
                    None => return Ok(()),
                    Some(target) => target,
                }
            };
            if target.spent() >= enough {
                println!("{:<16} {:>6.0} s", target.name, target.spent());
                done.lock().unwrap_or_else(|e| e.into_inner()).push(target);
                continue;
            }
            let list = match target.turn()? {
                true => &waiting,
                false => &broken,
            };
            list.lock().unwrap_or_else(|e| e.into_inner()).push(target);
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| match worker.join() {
                Ok(done) => done,
                Err(_) => bail!("a thread panicked"),
            })
    })?;
    let broken = broken.into_inner().unwrap_or_else(|e| e.into_inner());
    for target in &broken {
        cmd::note(format_args!(
            "{} failed: see {:?}",
            target.name,
            target.log().display()
        ));
    }
    if !broken.is_empty() {
        bail!("{} fuzz targets found something", broken.len());
    }
    let done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.iter()
        .filter(|_| options.save)
        .try_for_each(FuzzTarget::save)
}

/// Builds the targets with the fuzzer's instrumentation, which needs a nightly compiler.
fn build(options: &FuzzOptions) -> Result<Vec<FuzzTarget>> {
    let fuzz = paths::root().join("fuzz");
    let mut names = Vec::new();
    for entry in fs::read_dir(fuzz.join("fuzz_targets"))? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        names.extend(name.strip_suffix(".rs").map(str::to_owned));
    }
    if let Some(name) = options.names.iter().find(|name| !names.contains(name)) {
        names.sort();
        bail!(
            "there is no fuzz target {name:?}; there are {}",
            names.join(", ")
        );
    }
    if !options.names.is_empty() {
        names.clone_from(&options.names);
    }
    let has = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&fuzz);
        let result = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        result.is_ok_and(|status| status.success())
    };
    if !has("cargo", &["+nightly", "--version"]) {
        cmd::step("adding the nightly Rust toolchain");
        let add = ["toolchain", "install", "nightly", "--profile", "minimal"];
        cmd::check(&mut cmd::command("rustup", add))?;
    }
    if !has("cargo", &["fuzz", "--version"]) {
        cmd::step("installing cargo-fuzz");
        cmd::check(&mut cmd::command(
            "cargo",
            ["install", "--locked", "cargo-fuzz"],
        ))?;
    }
    cmd::step("building the fuzz targets");
    let output = paths::target().join("fuzz");
    let mut cargo = Command::new("cargo");
    cargo
        .args(["+nightly", "fuzz", "build", "-O", "--target-dir"])
        .arg(&output)
        .current_dir(paths::root());
    // Cargo fuzz builds one target by name, or all.
    if let [name] = names.as_slice() {
        cargo.arg(name);
    }
    cmd::check(&mut cargo)?;
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cache = paths::cache("fuzz")?;
    names
        .into_iter()
        .map(|name| {
            let home = cache.join(&name);
            for part in ["corpus", "found"] {
                fs::create_dir_all(home.join(part))?;
            }
            let target = FuzzTarget {
                program: output.join(&triple).join("release").join(&name),
                home,
                name,
            };
            target.unpack()?;
            Ok(target)
        })
        .collect()
}

impl FuzzTarget {
    fn log(&self) -> PathBuf {
        self.home.join("log")
    }

    /// Returns the archive of its corpus in the repository.
    fn archive(&self) -> PathBuf {
        let name = format!("{}.tar.gz", self.name);
        paths::root().join("fuzz/corpus").join(name)
    }

    /// Returns the directory of the unpacked archive.
    fn unpacked_directory(&self) -> PathBuf {
        self.home.join("kept")
    }

    fn unpack(&self) -> Result<()> {
        let (archive, unpacked) = (self.archive(), empty(self.unpacked_directory())?);
        if archive.is_file() {
            let mut tar = Command::new("tar");
            tar.arg("-xzf").arg(archive).arg("-C").arg(unpacked);
            cmd::check(&mut tar)?;
        }
        Ok(())
    }

    /// Returns the directories of initial inputs.
    fn inputs(&self) -> impl Iterator<Item = PathBuf> {
        let seeds = paths::root().join("fuzz/seeds").join(&self.name);
        [self.home.join("corpus"), self.unpacked_directory(), seeds]
            .into_iter()
            .filter(|directory| directory.is_dir())
    }

    /// Archives a minimised corpus that reaches the code that all inputs reach.
    fn save(&self) -> Result<()> {
        cmd::step(format_args!("keeping the corpus of {}", self.name));
        let merged = empty(self.home.join("merged"))?;
        let log = self.home.join("merge-log");
        let mut fuzzer = Command::new(&self.program);
        fuzzer
            .args(["-merge=1", "-rss_limit_mb=3000"])
            .arg(&merged)
            .args(self.inputs())
            .current_dir(&self.home)
            .stdin(Stdio::null())
            .stderr(fs::File::create(log)?);
        cmd::check(&mut fuzzer)?;
        let archive = self.archive();
        fs::create_dir_all(archive.parent().context("a path without a directory")?)?;
        // The same files result in the same archive.
        let mut tar = Command::new("tar");
        tar.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0"])
            .args(["--numeric-owner", "--mode=u=rwX,go=rX"])
            .args(["--use-compress-program", "gzip -9n", "-cf"])
            .arg(archive)
            .arg("-C")
            .args([&merged, Path::new(".")]);
        cmd::check(&mut tar)
    }

    /// Returns its seconds of CPU time so far.
    fn spent(&self) -> f64 {
        let text = fs::read_to_string(self.home.join("cpu")).unwrap_or_default();
        text.trim().parse().unwrap_or(0.0)
    }

    /// Runs for one turn at low priority; returns false on a finding.
    fn turn(&self) -> Result<bool> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .with_context(|| format!("cannot write {:?}", self.log().display()))?;
        let took = self.home.join("took");
        let mut fuzzer = Command::new("time");
        fuzzer
            .args(["--quiet", "--format", "%U %S", "--output"])
            .arg(&took)
            .args(["nice", "-n", "19"])
            .arg(&self.program)
            .arg(format!("-max_total_time={TURN}"))
            .args(["-timeout=60", "-rss_limit_mb=3000", "-print_final_stats=1"])
            .arg(format!(
                "-artifact_prefix={}/",
                self.home.join("found").display()
            ))
            .args(self.inputs());
        let status = fuzzer
            .current_dir(&self.home)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .status()
            .context("cannot run time")?;
        let spent = self.spent() + seconds(&took)?;
        fs::write(self.home.join("cpu"), format!("{spent:.1}\n"))?;
        Ok(status.success())
    }
}

/// Creates the directory, or empties it.
fn empty(directory: PathBuf) -> Result<PathBuf> {
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => fs::create_dir_all(&directory),
    }
    .with_context(|| format!("cannot empty {directory:?}"))?;
    Ok(directory)
}

/// Returns the sum of the numbers in the last line of a file; earlier lines are about the
/// exit of the command.
fn seconds(path: &Path) -> Result<f64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path:?}"))?;
    let numbers = text.lines().last().unwrap_or_default().split_whitespace();
    let numbers: Result<Vec<f64>, _> = numbers.map(str::parse).collect();
    Ok(numbers
        .with_context(|| format!("no numbers in {path:?}"))?
        .iter()
        .sum())
}
