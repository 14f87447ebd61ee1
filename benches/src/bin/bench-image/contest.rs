//! Alternating runs of commands that do the same work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sm_benches::samples::{Comparison, Series};

/// A shell command with its name.
pub(crate) struct Subject {
    name: &'static str,
    command: String,
}

impl Subject {
    pub(crate) fn new(name: &'static str, command: String) -> Self {
        Self { name, command }
    }
}

/// Quotes a path for the shell.
pub(crate) fn shell(path: &Path) -> Result<String> {
    let text = path.to_str().context("a path is not UTF-8")?;
    Ok(format!("'{}'", text.replace('\'', "'\\''")))
}

pub(crate) struct Contest {
    work: PathBuf,
    iterations: usize,
}

impl Contest {
    pub(crate) fn new(work: &Path, iterations: usize) -> Self {
        Self {
            work: work.to_owned(),
            iterations,
        }
    }

    /// Runs all subjects, each in an empty directory. Also returns a sentence about the peak
    /// memory of the first one.
    pub(crate) fn run(
        &self,
        title: &str,
        subjects: &[Subject],
    ) -> Result<(Comparison, Vec<String>)> {
        let mut series: Vec<_> = subjects.iter().map(|s| Series::new(s.name)).collect();
        let mut peaks = vec![0; subjects.len()];
        // The first round fills the page cache.
        for round in 0..=self.iterations {
            for ((subject, series), peak) in subjects.iter().zip(&mut series).zip(&mut peaks) {
                let fresh = self.work.join("fresh");
                fs::create_dir(&fresh)?;
                let ran = run(&fresh, &subject.command)?;
                fs::remove_dir_all(&fresh)?;
                if round > 0 {
                    series.add(&[("wall time", ran.time)]);
                    *peak = ran.peak_kib.max(*peak);
                }
            }
        }
        let notes =
            subjects.iter().zip(peaks).take(1).map(|(subject, peak)| {
                format!("{title}: {} took {peak} KiB at most", subject.name)
            });
        let notes = notes.collect();
        let comparison = Comparison {
            title: title.to_owned(),
            series,
            since: None,
        };
        Ok((comparison, notes))
    }

    /// Repeats a subject in its directory; its output must show that no work was left.
    pub(crate) fn repeat(
        &self,
        title: &str,
        subject: &Subject,
        nothing_to_do: impl Fn(&str) -> bool,
    ) -> Result<Comparison> {
        let fresh = self.work.join("fresh");
        fs::create_dir(&fresh)?;
        run(&fresh, &subject.command)?;
        let mut series = Series::new(subject.name);
        for _ in 0..self.iterations {
            let ran = run(&fresh, &subject.command)?;
            if !nothing_to_do(&ran.log) {
                bail!("{} did something: {}", subject.command, ran.log);
            }
            series.add(&[("wall time", ran.time)]);
        }
        fs::remove_dir_all(&fresh)?;
        Ok(Comparison {
            title: title.to_owned(),
            series: vec![series],
            since: None,
        })
    }
}

struct Ran {
    time: Duration,
    peak_kib: i64,
    log: String,
}

/// Runs a command in `directory`, which is also the home of `sm`.
fn run(directory: &Path, command: &str) -> Result<Ran> {
    let time = directory.join("time");
    let begun = Instant::now();
    // GNU time reports the peak memory of the largest process of the command.
    let output = Command::new("time")
        .args(["--format", "%M", "--output"])
        .arg(&time)
        .args(["sh", "-c", command])
        .current_dir(directory)
        .env("XDG_DATA_HOME", directory.join("data"))
        .env("XDG_RUNTIME_DIR", directory.join("run"))
        .stdin(Stdio::null())
        .output()
        .context("cannot run \"time\" (package time)")?;
    let elapsed = begun.elapsed();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        bail!("{command}: {}: {log}", output.status);
    }
    let peak = fs::read_to_string(&time)?;
    Ok(Ran {
        time: elapsed,
        peak_kib: peak.trim().parse().context("what \"time\" said")?,
        log,
    })
}
