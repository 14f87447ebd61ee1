//! Whole commands, `sm run` restored and cold, and contenders with the same guest.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use sm_benches::samples::{BenchReport, Comparison, Series};

use crate::BenchOptions;
use crate::rivals::{self, BenchGuest, Contender};
use crate::ticking::Ours;
use crate::vmm::{cache, evict};

/// Restored runs per cold one, which takes much longer.
const COLD_EVERY: usize = 4;
/// Runs that create snapshots and a working set.
const WARM_UP: usize = 4;
/// The image's name in the store: a look-up there is faster than reading a layout from an
/// unknown file system.
const IMAGE: &str = "bench:latest";
/// The sign of the contenders' guest: a line end and the next word. A word alone may have
/// been on its way to the console at the snapshot, and would appear without its program
/// having run.
const SIGN: &[u8] = b"\ntick";

/// Description of the measured runs.
const NOTE: &str = "Whole commands: sm run IMAGE echo. \"sm\" is restored from its image snapshot; \
     \"sm, new image\" from the base snapshot, with an image attached that has no snapshot yet, and \
     leaves one behind; \"sm --cold\" boots a kernel. They alternate.";

pub(crate) fn measure(options: &BenchOptions) -> Result<BenchReport> {
    // The check comes first, because a rival may be missing.
    let rivals: Vec<_> = options
        .rivals
        .iter()
        .map(|name| rivals::find(name))
        .collect::<Result<_>>()?;
    let iterations = options.iterations();
    store_image(options)?;
    let mut report = BenchReport {
        notes: vec![NOTE.to_owned()],
        comparisons: Vec::new(),
    };
    for &vcpus in &options.vcpus() {
        for &mib in &options.sizes() {
            report
                .comparisons
                .extend(commands(options, vcpus, mib, iterations)?);
        }
    }
    if !rivals.is_empty() {
        report.notes.push(
            "Contenders: from starting the process to the first word of the guest, with the same \
             kernel, initramfs and memory; each restores a snapshot of its own making."
                .to_owned(),
        );
        for &mib in &options.sizes() {
            report
                .comparisons
                .push(contenders(options, mib, iterations)?);
        }
    }
    Ok(report)
}

/// Stores the image with `sm`.
fn store_image(options: &BenchOptions) -> Result<()> {
    let sm = options.sm.as_deref().context("--sm is missing")?;
    let image = options.image.as_deref().context("--image is missing")?;
    for arguments in [&["pull", image][..], &["tag", image, IMAGE]] {
        let output = Command::new(sm).args(arguments).output();
        let output = output.with_context(|| format!("cannot run {sm:?}"))?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("sm {} failed: {errors}", arguments.join(" "));
        }
    }
    Ok(())
}

/// Measures one kind of machine, with a warm page cache and optionally a cold one.
fn commands(
    options: &BenchOptions,
    vcpus: u32,
    mib: u64,
    iterations: usize,
) -> Result<Vec<Comparison>> {
    let sm = options.sm.as_deref().context("--sm is missing")?;
    let (memory, vcpus_text) = (format!("{mib}m"), vcpus.to_string());
    let run = |more: &[&str]| {
        let kind = ["-m", &*memory, "--cpus", &*vcpus_text];
        timed(sm, &[&kind, more, &[IMAGE, "echo", "hi"]].concat())
    };
    for _ in 0..WARM_UP {
        run(&[])?;
    }
    let mut unused = NewImages::default();
    let mut comparisons = Vec::new();
    for cold in [false, true] {
        if cold && !options.cold_cache {
            continue;
        }
        let (mut restored, mut new) = (Series::new("sm"), Series::new("sm, new image"));
        let mut booted = Series::new("sm --cold");
        for iteration in 0..iterations {
            let evicted = || if cold { evict_all() } else { Ok(()) };
            evicted()?;
            let phases = run(&[])?;
            if !has(&phases, "state restored") {
                bail!("a run was not restored: {phases:?}");
            }
            add(&mut restored, &phases);
            if iteration % COLD_EVERY == 0 {
                evicted()?;
                let phases = run(&["--shm-size", &unused.next()])?;
                if !has(&phases, "state restored") || !has(&phases, "root attached") {
                    bail!("no image was attached to a base snapshot: {phases:?}");
                }
                add(&mut new, &phases);
                evicted()?;
                add(&mut booted, &run(&["--cold"])?);
            }
        }
        comparisons.push(Comparison {
            title: format!("sm run, {vcpus} vCPU, {mib} MiB, {}", cache(cold)),
            series: vec![restored, new, booted],
            since: None,
        });
    }
    Ok(comparisons)
}

fn has(phases: &[(String, Duration)], name: &str) -> bool {
    phases.iter().any(|(phase, _)| phase == name)
}

/// Options that make an image another one for the cache of snapshots.
#[derive(Default)]
struct NewImages(u64);

impl NewImages {
    fn next(&mut self) -> String {
        self.0 += 1;
        format!("{}k", 65536 + 4 * self.0)
    }
}

/// Drops the files of `sm` from the page cache.
fn evict_all() -> Result<()> {
    let data = std::env::var_os("XDG_DATA_HOME").context("XDG_DATA_HOME is not set")?;
    let mut directories = vec![PathBuf::from(data)];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if kind.is_file() {
                // A file may have been removed in the meantime.
                let _ = evict(&entry.path());
            }
        }
    }
    Ok(())
}

fn add(series: &mut Series, phases: &[(String, Duration)]) {
    let phases: Vec<_> = phases
        .iter()
        .map(|(name, took)| (name.as_str(), *took))
        .collect();
    series.add(&phases);
}

/// Runs `sm run` and returns the duration of each phase.
fn timed(sm: &Path, arguments: &[&str]) -> Result<Vec<(String, Duration)>> {
    let output = Command::new(sm)
        .args(["run", "--rm", "--timings", "--json"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {sm:?}"))?;
    if !output.status.success() {
        bail!(
            "sm run failed: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // The report is a line after the command's output.
    let all = [output.stdout, output.stderr].concat();
    let report = all
        .split(|&byte| byte == b'\n')
        .find_map(|line| {
            serde_json::from_slice::<Value>(line)
                .ok()
                .filter(Value::is_object)
        })
        .context("sm run --json has reported nothing")?;
    steps(&report)
}

/// Parses the phases in a report of `sm run --timings --json`.
fn steps(report: &Value) -> Result<Vec<(String, Duration)>> {
    let steps = report["timings"].as_array().context("no timings")?;
    steps
        .iter()
        // The first phase is the start of the clock.
        .skip(1)
        .map(|step| {
            let name = step["name"].as_str().context("a phase without a name")?;
            let took = step["took_ms"].as_f64().context("a phase without a time")?;
            Ok((
                name.to_owned(),
                Duration::try_from_secs_f64(took / 1000.0).unwrap_or_default(),
            ))
        })
        .collect()
}

/// Snapshots of each contender that are restored in turn: the point at which a guest was
/// interrupted makes a difference of 20 %.
const SNAPSHOTS: usize = 4;

/// Returns the guest of the contest.
pub(crate) fn guest(options: &BenchOptions, mib: u64) -> Result<BenchGuest> {
    Ok(BenchGuest {
        kernel: options.kernel.clone().context("--kernel is missing")?,
        initramfs: options
            .initramfs
            .clone()
            .context("--initramfs is missing")?,
        cmdline: "console=ttyS0 quiet".to_owned(),
        memory: mib << 20,
        sign: SIGN,
    })
}

fn contenders(options: &BenchOptions, mib: u64, iterations: usize) -> Result<Comparison> {
    let guest = guest(options, mib)?;
    let mut all: Vec<(Box<dyn Contender>, Series)> = vec![(
        Box::new(Ours::default()),
        Series::new(Ours::default().name()),
    )];
    for name in &options.rivals {
        let rival = rivals::find(name)?;
        let series = Series::new(rival.name());
        all.push((rival, series));
    }
    let snapshots = SNAPSHOTS.min(iterations.max(1));
    for snapshot in 0..snapshots {
        for (contender, _) in &mut all {
            contender
                .prepare(&guest)
                .with_context(|| format!("{} cannot be prepared", contender.name()))?;
        }
        let share = iterations * (snapshot + 1) / snapshots - iterations * snapshot / snapshots;
        for iteration in 0..=share {
            for (contender, series) in &mut all {
                let took = contender
                    .restore(&guest)
                    .with_context(|| format!("{} does not restore", contender.name()))?;
                // The first iteration loads programs and snapshots into the page cache.
                if iteration > 0 {
                    series.add(&[("process start to first word", took)]);
                }
            }
        }
    }
    Ok(Comparison {
        title: format!(
            "Restoring one guest, 1 vCPU, {mib} MiB, warm page cache ({snapshots} snapshots of each)"
        ),
        series: all.into_iter().map(|(_, series)| series).collect(),
        since: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_sm_is_read() {
        let report = serde_json::json!({"timings": [
            {"name": "command started", "at_ms": 0.0, "took_ms": 0.0},
            {"name": "image resolved", "at_ms": 1.5, "took_ms": 1.5},
        ]});
        let steps = steps(&report).unwrap();
        let expected = ("image resolved".to_owned(), Duration::from_micros(1500));
        assert_eq!(steps, [expected]);
        assert!(super::steps(&serde_json::json!({"timings": [{}, {}]})).is_err());
        assert!(super::steps(&Value::Null).is_err());
    }
}
