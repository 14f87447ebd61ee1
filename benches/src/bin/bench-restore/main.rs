//! Measures the phases of restoring a machine.
//!
//! `bench-restore vmm` restores a tiny hand-written guest in this process and compares
//! that with a *floor*: the same KVM calls without a VMM. It runs on any `/dev/kvm`.
//! `bench-restore path` runs whole `sm` commands, and optionally rivals; it needs a KVM
//! that can run Linux. `bench-restore render` creates a report from their output. `cargo
//! xtask bench-restore` calls them. `bench-restore depth` measures nothing: it compares a
//! chain of diffs with the machine that was captured.

mod config_probe;
mod depth;
mod floor;
mod path;
mod rivals;
mod ticking;
mod tiny;
mod vmm;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;
use sm_benches::report;
use sm_benches::samples::BenchReport;

/// The allocator of `sm`.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

const HELP: &str = "\
bench-restore vmm [--iterations N] [--memory MIB]... [--vcpus N]...
bench-restore path --sm FILE --image REFERENCE --kernel FILE [--iterations N]
                   [--memory MIB]... [--vcpus N]... [--cold-cache]
                   [--vs RIVAL]... [--initramfs FILE]
bench-restore depth --kernel FILE --initramfs FILE
bench-restore render [--json FILE] [--html FILE] REPORT...
";

/// Parsed command line.
#[derive(Debug, Default)]
struct BenchOptions {
    iterations: Option<usize>,
    memory_mib: Vec<u64>,
    vcpus: Vec<u32>,
    /// Also measure whole commands with a cold page cache: the files must be on a file
    /// system with its own page cache.
    cold_cache: bool,
    sm: Option<PathBuf>,
    image: Option<String>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    rivals: Vec<String>,
    json: Option<PathBuf>,
    html: Option<PathBuf>,
    reports: Vec<PathBuf>,
}

impl BenchOptions {
    fn iterations(&self) -> usize {
        self.iterations.unwrap_or(100)
    }

    /// Returns the sizes of memory in MiB.
    fn sizes(&self) -> Vec<u64> {
        match &*self.memory_mib {
            [] => vec![128, 512, 2048, 8192],
            given => given.to_vec(),
        }
    }

    fn vcpus(&self) -> Vec<u32> {
        match &*self.vcpus {
            [] => vec![1, 4],
            given => given.to_vec(),
        }
    }
}

fn main() -> Result<()> {
    // The process start benchmark reads this time.
    let started = vmm::monotonic();
    let mut parser = lexopt::Parser::from_env();
    let Some(Value(command)) = parser.next()? else {
        bail!("say what to do:\n{HELP}");
    };
    let mut options = BenchOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("iterations") => options.iterations = Some(parser.value()?.parse()?),
            Long("memory") => options.memory_mib.push(parser.value()?.parse()?),
            Long("vcpus") => options.vcpus.push(parser.value()?.parse()?),
            Long("cold-cache") => options.cold_cache = true,
            Long("sm") => options.sm = Some(parser.value()?.into()),
            Long("image") => options.image = Some(parser.value()?.string()?),
            Long("kernel") => options.kernel = Some(parser.value()?.into()),
            Long("initramfs") => options.initramfs = Some(parser.value()?.into()),
            Long("vs") => options.rivals.push(parser.value()?.string()?),
            Long("json") => options.json = Some(parser.value()?.into()),
            Long("html") => options.html = Some(parser.value()?.into()),
            Value(report) => options.reports.push(report.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    let print = |report: BenchReport| -> Result<()> {
        println!("{}", serde_json::to_string(&report)?);
        Ok(())
    };
    match command.string()?.as_str() {
        "vmm" => print(vmm::measure(&options)?),
        "path" => print(path::measure(&options)?),
        "start" => {
            println!("{}", started.as_nanos());
            Ok(())
        }
        "depth" => depth::check(&path::guest(&options, 128)?),
        // Serves one clone of this project, for the comparison with the rivals.
        "serve" => ticking::serve(options.reports.first().context("no store")?),
        "render" => render(&options),
        other => bail!("there is no {other:?}:\n{HELP}"),
    }
}

fn render(options: &BenchOptions) -> Result<()> {
    let mut all = BenchReport::default();
    for path in &options.reports {
        let bytes = fs::read(path).with_context(|| format!("cannot read {path:?}"))?;
        let part: BenchReport =
            serde_json::from_slice(&bytes).with_context(|| format!("{path:?} is no report"))?;
        all.notes.extend(part.notes);
        all.comparisons.extend(part.comparisons);
    }
    print!("{}", report::text(&all));
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_vec(&all)?)
            .with_context(|| format!("cannot write {path:?}"))?;
    }
    if let Some(path) = &options.html {
        fs::write(
            path,
            report::html("Restoring a machine, phase by phase", &all),
        )
        .with_context(|| format!("cannot write {path:?}"))?;
    }
    Ok(())
}
